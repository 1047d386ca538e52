"""A model as it is for a while: in eval mode, and left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_SMALL = 1 << 16  # numbers of a buffer that is compared


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules of a model into eval mode, and back into train mode at the end those that were."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class LeftAsItWas:
    """Context manager that puts back what a forward changes on a model's modules, and says what that was.

    BigBird goes over to full attention for good when it meets a short document; some rotary embeddings keep the longest
    document's frequencies. Attributes: ``changed``, a line for each change.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.changed: list[str] = []

    def __enter__(self) -> LeftAsItWas:
        self._before = [
            (module, _plain(module), dict(module._modules), dict(module._buffers)) for module in self.model.modules()
        ]
        self._numbers = [
            (f"{name or 'a buffer'} of {type(module).__name__}", buffer, buffer.clone(), buffer._version)
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.numel() <= _SMALL and not buffer.is_meta and not buffer.is_inference()
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for what, buffer, before, version in self._numbers:
            if buffer._version != version and not torch.equal(buffer, before):
                self.changed.append(f"the buffer {what} from {_shown(before)} to {_shown(buffer)}")
                with torch.no_grad():
                    buffer.copy_(before)
        for module, values, children, buffers in self._before:
            kind = type(module).__name__
            for name, value in _plain(module).items():
                if name in values and values[name] != value:
                    self.changed.append(f"{kind}.{name} from {values[name]!r} to {value!r}")
                    vars(module)[name] = values[name]
            for name, there, now in (("modules", children, module._modules), ("buffers", buffers, module._buffers)):
                if {key: id(one) for key, one in there.items()} != {key: id(one) for key, one in now.items()}:
                    self.changed.append(f"the {name} of {kind}")
                    now.clear()
                    now.update(there)  # type: ignore[arg-type]


def _shown(numbers: torch.Tensor) -> str:
    return f"{numbers.item():g}" if numbers.numel() == 1 else "other numbers"


def _plain(module: nn.Module) -> dict[str, Any]:
    return {n: v for n, v in vars(module).items() if isinstance(v, bool | int | float | str) and n != "training"}

"""A model as it is for a while: in eval mode, and left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


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
        return self

    def __exit__(self, *error: object) -> None:
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


def _plain(module: nn.Module) -> dict[str, Any]:
    return {n: v for n, v in vars(module).items() if isinstance(v, bool | int | float | str) and n != "training"}

"""Values as bytes: what a digest of weights is made of, whatever form a module keeps them in.

Quantized weights are no plain tensors: packed parameters come out of a state dict as tuples, torchao's are wrappers
around several tensors, and a module's extra state can be anything. Here each is taken apart into plain tensors and
JSON values. What cannot be is refused: bytes that nobody hashes would let two models share a cache.
"""

from __future__ import annotations

import dataclasses
import enum
import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from actcache.errors import ModelError
from actcache.models.partial_vocabulary import Whole

#: What a value comes down to: ``None``, truth values, numbers and texts stand for themselves.
Leaf = torch.Tensor | Whole | None | bool | int | float | str

_NAMED_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format, torch.qscheme, type)


def leaves(name: str, value: Any) -> Iterator[tuple[str, Leaf]]:
    """Yield the parts of a value by name: plain strided tensors (detached, on their device), and JSON values.

    Raises:
        ModelError: the value, which it names, has bytes that cannot be told.
    """
    if isinstance(value, torch.Tensor):
        yield from _of_tensor(name, value)
    elif isinstance(value, Whole) or value is None or isinstance(value, bool | int | str):
        yield name, value
    elif isinstance(value, float):
        yield name, value.hex()  # JSON has no NaN
    elif isinstance(value, _NAMED_CONSTANTS):
        yield name, str(value)
    elif isinstance(value, torch.device):
        return  # where numbers lie is no part of them
    elif isinstance(value, bytes | bytearray | io.BytesIO):
        data = value.getvalue() if isinstance(value, io.BytesIO) else bytes(value)
        yield name, torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
    elif isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        yield name, torch.from_numpy(np.array(value))
    elif isinstance(value, Mapping):
        yield name, len(value)
        for key, item in value.items():
            yield from leaves(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        yield name, len(value)
        for i, item in enumerate(value):
            yield from leaves(f"{name}.{i}", item)
    elif isinstance(value, enum.Enum):
        yield name, f"{type(value).__name__}.{value.name}"
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield name, type(value).__name__
        for field in dataclasses.fields(value):
            yield from leaves(f"{name}.{field.name}", getattr(value, field.name))
    elif isinstance(value, torch.ScriptObject):
        yield from leaves(name, _state_of(name, value))
    else:
        raise _unknown(name, value)


def _of_tensor(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, Leaf]]:
    if tensor.is_meta:
        raise ModelError(f"weight {name} is on the meta device, so it has no bytes; load the model into memory first")
    if hasattr(tensor, "full_tensor"):
        raise ModelError(
            f"weight {name} is distributed over several processes: make the recycler from a model that is whole "
            "(before it is sharded)"
        )
    if is_traceable_wrapper_subclass(tensor):
        inner, context = tensor.__tensor_flatten__()
        yield name, f"{type(tensor).__name__} {list(tensor.shape)} {tensor.dtype}"
        for attribute in inner:
            yield from leaves(f"{name}.{attribute}", getattr(tensor, attribute))
        yield from leaves(f"{name}.context", context)
        return
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ or is_lazy(tensor):
        raise _unknown(name, tensor)
    with torch.no_grad():
        plain = tensor.detach()
        if plain.is_nested or plain.is_mkldnn:
            raise _unknown(name, plain)
        if plain.layout != torch.strided:  # COO, CSR, ...: the same numbers have one dense form
            yield name, str(plain.layout)
            yield f"{name}.dense", plain.to_dense()
        elif plain.is_quantized:
            yield from _of_quantized(name, plain)
        else:
            yield name, plain.as_subclass(torch.Tensor).resolve_conj().resolve_neg()


def _of_quantized(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, Leaf]]:
    yield name, f"{tensor.dtype} {tensor.qscheme()}"
    yield f"{name}.values", tensor.int_repr()
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        yield f"{name}.scale", tensor.q_scale().hex()
        yield f"{name}.zero_point", tensor.q_zero_point()
    else:
        yield f"{name}.scales", tensor.q_per_channel_scales()
        yield f"{name}.zero_points", tensor.q_per_channel_zero_points()
        yield f"{name}.axis", tensor.q_per_channel_axis()


def _state_of(name: str, packed: torch.ScriptObject) -> Any:
    try:
        return packed.__getstate__()
    except (AttributeError, RuntimeError):  # its class cannot be saved
        raise _unknown(name, packed) from None


def _unknown(name: str, value: Any) -> ModelError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return ModelError(
        f"{name} of the lower half is a {kind}, whose bytes cannot be told, so two models that differ in it would "
        "share one cache: give a model whose lower half is made of tensors (model.dequantize() makes them)"
    )

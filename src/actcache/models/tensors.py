"""Small things over tensors that several modules need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from actcache.errors import ModelError


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as recipes have it: ``float16``."""
    return str(dtype).removeprefix("torch.")


def padded(arrays: Sequence[NDArray[np.integer]], value: int) -> torch.Tensor:
    """Return one-dimensional arrays as int64 ``[arrays, longest]``, filled up with a value on the right."""
    out = np.full((len(arrays), max(len(array) for array in arrays)), value, np.int64)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(out)


def first_parameter(module: nn.Module) -> nn.Parameter:
    """Return the first floating point parameter of a module; raises ``ModelError`` where it has none."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter
    raise ModelError(f"{type(module).__name__} has no floating point parameter")


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place of the one of that name."""
    path, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(path), attribute, parameter)


def without_bytes(name: str) -> ModelError:
    """Return the error for a weight on the meta device."""
    return ModelError(
        f"weight {name} is on the meta device, so it has no bytes (device_map may have left it on a disk): load the "
        "model into memory first"
    )


def unshared(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict's tensors as safetensors takes them: on the CPU, contiguous, each with memory of its own."""
    result: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        result[name] = plain
    return result

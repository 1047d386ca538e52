"""Arrays of callers: NumPy arrays and torch tensors alike, without importing torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ShapeError


def _is_tensor(array: Any) -> bool:
    return type(array).__module__.partition(".")[0] == "torch" or hasattr(array, "detach")


def _is_bfloat16(array: Any) -> bool:
    return str(array.dtype) == "torch.bfloat16"


def to_numpy(array: Any) -> NDArray[Any]:
    """Return an array or tensor (on any device) as NumPy; bfloat16 becomes float32, which holds it exactly.

    Raises:
        ShapeError: nested lists of unequal lengths, or something that is no array at all.
    """
    if not _is_tensor(array):
        try:
            return np.asarray(array)
        except (ValueError, TypeError) as error:
            raise ShapeError(f"a {type(array).__name__} is no array: {error}") from None
    tensor = array.detach()
    if _is_bfloat16(tensor):
        tensor = tensor.float()
    return np.asarray(tensor.cpu().numpy())


def to_buffer(array: Any, dtype: np.dtype[np.generic], what: str) -> NDArray[Any]:
    """Return the memory of an array or CPU tensor, to write into, as a NumPy array of ``dtype``.

    A bfloat16 tensor is its bits, uint16.

    Raises:
        ShapeError: it is not C-contiguous, not writable, not on the CPU, or of another dtype.
    """
    buffer = array
    if _is_tensor(array):
        if array.device.type != "cpu":
            raise ShapeError(f"{what} is on {array.device}; read into host memory and copy it over")
        tensor = array.detach()
        bits = tensor.new_empty(0).short().dtype  # torch.int16, without importing torch
        buffer = tensor.view(bits).numpy().view(np.uint16) if _is_bfloat16(tensor) else tensor.numpy()
    if not isinstance(buffer, np.ndarray) or buffer.dtype != dtype:
        found = getattr(buffer, "dtype", type(buffer).__name__)
        raise ShapeError(f"{what} must hold {dtype}, the stored dtype, not {found}; decode after reading")
    if not buffer.flags.c_contiguous or not buffer.flags.writeable:
        raise ShapeError(f"{what} must be C-contiguous and writable")
    return buffer

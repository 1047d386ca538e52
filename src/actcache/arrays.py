"""Arrays of callers: NumPy arrays and torch tensors alike, without importing torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ShapeError


def _is_tensor(array: Any) -> bool:
    return hasattr(array, "detach")


def _is_bfloat16(array: Any) -> bool:
    return str(array.dtype) == "torch.bfloat16"


def to_numpy(array: Any) -> NDArray[Any]:
    """Return an array or tensor (on any device) as NumPy.

    Floating point that NumPy has not (bfloat16, float8) becomes float32, which holds it exactly; sparse tensors become
    dense, quantized ones the numbers that they stand for.

    Raises:
        ShapeError: nested lists of unequal lengths, a tensor without numbers (``meta``) or of a dtype that has no such
            form, a masked array, or something that is no array at all.
    """
    if _is_tensor(array):
        return _of_tensor(array)
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise ShapeError("a masked array has places without numbers: fill them, or take those rows out")
    try:
        made = np.asarray(array)
    except (ValueError, TypeError) as error:
        raise ShapeError(f"a {type(array).__name__} is no array: {error}") from None
    if made.dtype == object and not made.ndim:
        raise ShapeError(f"a {type(array).__name__} is no array: give an array, a tensor or a list of numbers")
    return made


def _of_tensor(tensor: Any) -> NDArray[Any]:
    if tensor.is_meta:
        raise ShapeError("the tensor is on the meta device and has no numbers: load or compute them first")
    kind = f"{tensor.dtype} {tensor.layout}".replace("torch.", "")
    tensor = tensor.detach().cpu()
    try:
        if tensor.is_quantized:
            tensor = tensor.dequantize()
        tensor = tensor.to_dense().resolve_conj().resolve_neg()
        if tensor.is_floating_point() and tensor.dtype.itemsize < 4 and str(tensor.dtype) != "torch.float16":
            tensor = tensor.float()
        return np.asarray(tensor.numpy())
    except (TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ShapeError(f"a tensor of {kind} cannot be read as an array ({reason:.200}): convert it first") from None


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
        try:
            buffer = tensor.view(bits).numpy().view(np.uint16) if _is_bfloat16(tensor) else tensor.numpy()
        except (TypeError, RuntimeError) as error:  # sparse, negated, quantized, float8, ...
            reason = str(error).partition("\n")[0]
            raise ShapeError(f"{what} is a tensor that cannot be written into ({reason:.200})") from None
    if not isinstance(buffer, np.ndarray) or buffer.dtype != dtype:
        found = getattr(buffer, "dtype", type(buffer).__name__)
        raise ShapeError(f"{what} must hold {dtype}, the stored dtype, not {found}; decode after reading")
    if not buffer.flags.c_contiguous or not buffer.flags.writeable:
        raise ShapeError(f"{what} must be C-contiguous and writable")
    return buffer

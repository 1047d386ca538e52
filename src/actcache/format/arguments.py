"""What callers give: numbers and truth values as Python's own, and arrays of any library as NumPy's.

NumPy's numbers are taken, what only looks like one is not. torch is never imported.
"""

from __future__ import annotations

import re
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ShapeError, UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_QUALIFIED = re.compile(r"(?:torch|np|numpy)\.(\w+)")
_DTYPES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
_DTYPES |= {"float8_e4m3fn": "float8_e4m3", "fp8": "float8_e4m3"}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", re.IGNORECASE)


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number, Python's or NumPy's; truth values and durations are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool | np.timedelta64)


def dtype_name(value: Any) -> Any:
    """Return the name of a dtype of NumPy or torch, or what people write for one (``torch.float16``, ``fp16``), as
    recipes have it (``float16``); other values as they are."""
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return np.dtype(value).name
    if not isinstance(value, str) and type(value).__name__ != "dtype":
        return value
    found = _QUALIFIED.fullmatch(str(value))
    name = found[1] if found else value
    return _DTYPES.get(name, name) if isinstance(name, str) else value


def whole(name: str, value: Any, least: int) -> int:
    """Return a whole number as Python's own, which prints and is digested in one way; ``UsageError`` where it is none,
    or below ``least``."""
    if not is_whole(value) or value < least:
        raise UsageError(f"{name} is a whole number of {least} or more, not {value!r:.80}")
    return int(value)


def whole_numbers(name: str, values: Any) -> NDArray[np.int64]:
    """Return whole numbers, of any container, as ``[n]``, where NumPy alone would cut off fractions; ``UsageError``
    where they are none."""
    try:
        given = values if hasattr(values, "__array__") else list(values)
        array = np.asarray(given)
    except (ValueError, TypeError):
        given, array = [], np.empty((), object)
    mixed = isinstance(given, list) and any(map(is_truth, given))  # of which NumPy makes numbers beside numbers
    if array.ndim != 1 or mixed or (array.size and array.dtype.kind not in "iu"):
        raise UsageError(f"{name} are whole numbers, not {values!r:.80}")
    return array.astype(np.int64)


def is_truth(value: object) -> bool:
    """Return whether a value is a truth value, Python's or NumPy's; 0 and 1 are none."""
    return isinstance(value, bool | np.bool_)


def truth(name: str, value: Any) -> bool:
    """Return a truth value as Python's own; ``UsageError`` where it is none."""
    if not is_truth(value):
        raise UsageError(f"{name} is True or False, not {value!r:.80}")
    return bool(value)


def nbytes_of(name: str, value: int | str) -> int:
    """Return a number of bytes, given as such or as ``"8GiB"``; ``UsageError`` where it is neither."""
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None or match[2].lower() not in _UNITS:
            raise UsageError(f"{name} is a number of bytes or a size like '8GiB', not {value!r:.80}")
        return int(float(match[1]) * _UNITS[match[2].lower()])
    return whole(name, value, 0)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse what is none of some words, with a ``UsageError``."""
    if value not in choices:
        raise UsageError(f"{name} is {' or '.join(map(repr, choices))}, not {value!r:.80}")


def to_numpy(array: Any) -> NDArray[Any]:
    """Return an array or tensor (on any device) as NumPy.

    Floating point that NumPy has not (bfloat16, float8) becomes float32, which holds it exactly; sparse tensors become
    dense, quantized ones the numbers that they stand for.

    Raises:
        ShapeError: it is ragged, masked, without numbers (``meta``), of a dtype without such a form, or no array.
    """
    if hasattr(array, "detach"):  # a tensor
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
    """Return the memory of an array or CPU tensor, to write into, as NumPy of ``dtype``; bfloat16 as its bits, uint16.

    Raises:
        ShapeError: it is not C-contiguous, not writable, not on the CPU, or of another dtype.
    """
    buffer = array
    if hasattr(array, "detach"):  # a tensor
        if array.device.type != "cpu":
            raise ShapeError(f"{what} is on {array.device}; read into host memory and copy it over")
        tensor = array.detach()
        bits = tensor.new_empty(0).short().dtype  # torch.int16, without importing torch
        try:
            buffer = (
                tensor.view(bits).numpy().view(np.uint16) if str(tensor.dtype) == "torch.bfloat16" else tensor.numpy()
            )
        except (TypeError, RuntimeError) as error:  # sparse, negated, quantized, float8, ...
            reason = str(error).partition("\n")[0]
            raise ShapeError(f"{what} is a tensor that cannot be written into ({reason:.200})") from None
    if not isinstance(buffer, np.ndarray) or buffer.dtype != dtype:
        found = getattr(buffer, "dtype", type(buffer).__name__)
        raise ShapeError(f"{what} must hold {dtype}, the stored dtype, not {found}; decode after reading")
    if not buffer.flags.c_contiguous or not buffer.flags.writeable:
        raise ShapeError(f"{what} must be C-contiguous and writable")
    return buffer

"""What a space takes and gives: entries, and how they are checked and converted on their way in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.backend import EXTRAS, TOKEN_IDS, VALUES, Columns
from actcache.errors import KeyFormatError, ShapeError
from actcache.format import codec
from actcache.format.arguments import to_numpy
from actcache.format.ragged import offsets_of
from actcache.format.recipe import Recipe


@dataclass(frozen=True)
class Entry:
    """One document's activations, ``[tokens, hidden]``; bfloat16 entries as float32, others in the stored dtype.

    The arrays are views into the memory of the whole ``get``.
    """

    activations: NDArray[Any]
    token_ids: NDArray[np.int32] | None = None  # [tokens]
    extras: dict[str, NDArray[Any]] = field(default_factory=dict)  # spans, word_ids, type_ids where they were stored


@dataclass(frozen=True)
class ReadReport:
    """What ``read_into`` found: ``lengths`` [n] int64 tokens of each entry, 0 where it is absent."""

    lengths: NDArray[np.int64]

    @property
    def found(self) -> NDArray[np.bool_]:
        """``[n]``: which keys were there."""
        return self.lengths > 0

    @property
    def offsets(self) -> NDArray[np.int64]:
        """``[n + 1]``: where each entry's rows begin in a packed buffer."""
        return offsets_of(self.lengths)


@dataclass(frozen=True)
class PackedEntries(ReadReport):
    """All arrays of some entries in stored form, one entry's rows after another's; absent entries have none."""

    columns: dict[str, NDArray[Any]]  # ``values``, and the optional arrays that any of the entries has
    has: dict[str, NDArray[np.bool_]]  # [n] which entries have each of those


def columns_of(recipe: Recipe) -> Columns:
    """Return dtype and trailing shape of each ragged array of a recipe's space."""
    return {VALUES: (codec.get(recipe.dtype).stored.str, (recipe.hidden_size,)), TOKEN_IDS: ("<i4", ()), **EXTRAS}


def listed(name: str, arrays: Any) -> list[Any]:
    """Return the arrays of several entries as a list: some sequences (a Series) are not indexed by position.
    ``ShapeError`` where they cannot be iterated over."""
    try:
        return list(arrays)
    except TypeError:
        raise ShapeError(f"{name}: give a list of arrays, one a key, not a {type(arrays).__name__}") from None


def check_lists(keys: Sequence[bytes], lists: Mapping[str, Sequence[Any]]) -> None:
    """Refuse a key that stands twice (``KeyFormatError``), and what is not one array of each kind a key
    (``ShapeError``)."""
    if len(set(keys)) != len(keys):
        raise KeyFormatError("the same key stands twice in one put; drop the second copy")
    for name, rows in lists.items():
        if len(rows) != len(keys):
            raise ShapeError(f"{len(keys)} keys and {len(rows)} arrays of {name}: give one a key")


def check_digits(arrays: Sequence[Any], recipe: Recipe) -> None:
    """Refuse rows that have fewer digits than the recipe of a model's weights promises.

    A recycler takes what stands under such a recipe for its own numbers. So rows have to come in the dtype that they
    were computed in, or one that holds all of its numbers; in a smaller one only where the recipe's dtype and lineage
    would have made them that. Recipes without a digest of weights are the caller's own, and so are their dtypes.

    Raises:
        ShapeError: it names the first such array; also one that says no dtype: lists may hold rows of several.
    """
    if recipe.weights is None:
        return
    for i, array in enumerate(arrays):
        given = _dtype_name(array)
        if given is None:
            raise ShapeError(
                f"array {i} is a {type(array).__name__}, which says no dtype: give an array or a tensor, in the dtype "
                f"that its rows were computed in ({recipe.compute_dtype})"
            )
        if codec.holds(given, recipe.compute_dtype):
            continue
        rounded = given in codec.names()
        if not rounded or codec.traces((given, *recipe.via, recipe.dtype), recipe.compute_dtype) != recipe.via:
            raise ShapeError(
                f"array {i} holds {given}, but the recipe is of rows computed in {recipe.compute_dtype} and stored as "
                f"{recipe.stored_as}: the digits are gone. Put rows as they were computed"
            )


def _dtype_name(array: Any) -> str | None:
    """Return the name of an array's or tensor's dtype, without importing torch; None where it says none."""
    dtype = getattr(array, "dtype", None)
    return None if dtype is None else str(getattr(dtype, "name", None) or dtype).removeprefix("torch.")


def encode_entry(
    key: bytes, lists: Mapping[str, Sequence[Any]], i: int, columns: Columns, stored_as: codec.Codec
) -> dict[str, NDArray[Any]]:
    """Return all arrays of the ``i``-th of some entries in stored form, the caller's own where they are so. Raises as
    ``Space.put``."""
    what, values = f"document {key.hex()}", lists[VALUES][i]
    return {name: _encode(name, rows[i], values, columns[name], stored_as, what) for name, rows in lists.items()}


def _encode(
    name: str, rows: Any, values: Any, column: tuple[str, tuple[int, ...]], stored_as: codec.Codec, what: str
) -> NDArray[Any]:
    try:
        array = to_numpy(rows)
    except ShapeError as error:
        raise ShapeError(f"{what}: {name}: {error}") from None
    dtype, trailing = column
    tokens = len(values) if getattr(values, "ndim", 1) and hasattr(values, "__len__") else 0
    if array.shape != (tokens, *trailing) or not tokens:
        expected = ", ".join(["tokens >= 1" if name == VALUES else str(tokens), *map(str, trailing)])
        raise ShapeError(f"{what}: {name} must be [{expected}], not {list(array.shape)}")
    if name == VALUES:
        if array.dtype.kind != "f":
            raise ShapeError(f"{what}: activations must be floating point, not {array.dtype}")
        return stored_as.stored_rows(array, what=what)
    if array.dtype.kind not in "iu":
        raise ShapeError(f"{what}: {name} must be integers, not {array.dtype}")
    limits = np.iinfo(dtype)
    if array.min() < limits.min or array.max() > limits.max:
        raise ShapeError(f"{what}: {name} must fit {np.dtype(dtype)}")
    return array.astype(dtype)

"""Entries on their way in: what a caller gives, checked and converted to stored form.

Rows of many entries are converted together, as much at a time as stays in the processor's cache between the conversion
and the look for numbers that are none. Only where something is wrong are they looked at one by one, to say where.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.backend import EXTRAS, OWN, VALUES, Columns
from actcache.errors import KeyFormatError, ShapeError, UsageError
from actcache.format import codec
from actcache.format.arguments import to_numpy, whole_numbers
from actcache.format.keys import key_list
from actcache.format.ragged import runs
from actcache.format.recipe import Recipe

_PIECE_BYTES = 256 << 10  # converted, then looked at

#: Lengths of some entries, and by array what has all of their rows, one after another.
Parts = tuple[NDArray[np.int64], dict[str, list[NDArray[Any]]]]
#: Writes the rows of some entries in stored form into buffers, one a ragged array.
Encode = Callable[[Mapping[str, NDArray[Any]]], None]


class Incoming(ABC):
    """Entries as a caller gives them: ragged arrays by name, ``values`` first.

    Attributes:
        columns: the names of the arrays.
    """

    columns: frozenset[str]

    @abstractmethod
    def check(self, count: int) -> None:
        """Refuse, with a ``ShapeError``, what is not made of so many entries."""

    @abstractmethod
    def rows(self, i: int) -> dict[str, Any]:
        """Return the rows of one entry by array, as they were given."""

    @abstractmethod
    def parts(self, which: NDArray[np.int64], columns: Columns) -> Parts:
        """Return some entries, of which there is one or more.

        ``ShapeError`` where something has another shape or kind of number than the columns ask for.
        """

    def encoding(
        self, which: NDArray[np.int64], names: NDArray[np.uint8], columns: Columns, stored_as: codec.Codec
    ) -> tuple[NDArray[np.int64], Encode]:
        """Return the lengths of some entries, and what writes their rows in stored form into buffers.

        ``names``: the keys of all entries, ``[n, 32]``. Both raise as ``Space.put``, naming the first entry that is
        refused.
        """
        with self._named(which, names, columns, stored_as):
            lengths, parts = self.parts(which, columns)

        def encode(out: Mapping[str, NDArray[Any]]) -> None:
            with self._named(which, names, columns, stored_as):
                for name, arrays in parts.items():
                    begin = 0
                    for rows in _cached(arrays):
                        buffer = out[name][begin : begin + len(rows)]
                        begin += len(rows)
                        if name == VALUES:
                            stored_as.encode(rows, buffer)
                        else:
                            _copy_integers(name, rows, buffer)

        return lengths, encode

    @contextmanager
    def _named(
        self, which: NDArray[np.int64], names: NDArray[np.uint8], columns: Columns, stored_as: codec.Codec
    ) -> Iterator[None]:
        """Have an error name its document: the first of them that is refused alone."""
        try:
            yield
        except UsageError:
            for i in which.tolist():
                _refuse(f"document {names[i].tobytes().hex()}", self.rows(i), columns, stored_as)
            raise


class Lists(Incoming):
    """One array an entry. Some of them (a Series) are not indexed by position: they become lists."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self.lists = {name: _listed(name, given) for name, given in arrays.items()}
        self.columns = frozenset(arrays)

    def beside(self, name: str, given: Any) -> Lists:
        """Return the same with one more ragged array."""
        return Lists({**self.lists, name: given})

    def check(self, count: int) -> None:
        for name, arrays in self.lists.items():
            if len(arrays) != count:
                raise ShapeError(f"{count} keys and {len(arrays)} arrays of {name}: give one a key")

    def rows(self, i: int) -> dict[str, Any]:
        return {name: arrays[i] for name, arrays in self.lists.items()}

    def parts(self, which: NDArray[np.int64], columns: Columns) -> Parts:
        parts: dict[str, list[NDArray[Any]]] = {}
        lengths: list[int] = []
        for name, given in self.lists.items():
            chosen = given if len(which) == len(given) else [given[i] for i in which.tolist()]
            arrays = [array if type(array) is np.ndarray else to_numpy(array) for array in chosen]
            if name == VALUES:
                lengths = [len(array) if array.ndim else 0 for array in arrays]
            trailing = columns[name][1]
            if [array.shape for array in arrays] != [(length, *trailing) for length in lengths] or 0 in lengths:
                raise ShapeError(f"arrays of {name} have other shapes")
            for dtype in {array.dtype for array in arrays}:
                _check_kind(name, dtype)
            parts[name] = arrays
        return np.array(lengths, np.int64), parts


class Packed(Incoming):
    """The rows of all entries in one array of each kind; entry i has rows ``offsets[i]:offsets[i + 1]``.

    ``ShapeError`` where an array is none, or the offsets are no whole numbers.
    """

    def __init__(self, arrays: Mapping[str, Any], offsets: Any) -> None:
        self.arrays = {name: _array(name, given) for name, given in arrays.items()}
        self.columns = frozenset(arrays)
        try:
            self.offsets = whole_numbers("offsets", _array("offsets", offsets))
        except UsageError as error:
            raise ShapeError(str(error)) from None

    def beside(self, name: str, given: Any) -> Packed:
        """Return the same with one more ragged array."""
        return Packed({**self.arrays, name: given}, self.offsets)

    def check(self, count: int) -> None:
        values, offsets = self.arrays[VALUES], self.offsets
        if values.ndim != 2:
            raise ShapeError(f"{VALUES} must be [tokens, hidden], not {list(values.shape)}")
        if len(offsets) != count + 1:
            raise ShapeError(f"{count} keys and {len(offsets)} offsets: give one more than keys, the last one the end")
        if offsets[0] != 0 or offsets[-1] != len(values):
            raise ShapeError(
                f"offsets go from 0 to the {len(values)} rows of values, not from {offsets[0]} to {offsets[-1]}"
            )
        if (np.diff(offsets) < 0).any():
            raise ShapeError("offsets must rise: each is where one entry ends and the next one begins")
        for name, array in self.arrays.items():
            expected = [len(values), *(EXTRAS[name][1] if name in EXTRAS else ())]
            if name not in (VALUES, OWN) and list(array.shape) != expected:
                raise ShapeError(f"{name} must be {expected}, not {list(array.shape)}")

    def rows(self, i: int) -> dict[str, Any]:
        return {name: array[self.offsets[i] : self.offsets[i + 1]] for name, array in self.arrays.items()}

    def parts(self, which: NDArray[np.int64], columns: Columns) -> Parts:
        lengths = np.diff(self.offsets)[which]
        for name, array in self.arrays.items():
            if array.shape[1:] != columns[name][1] or not lengths.all():
                raise ShapeError(f"{name} has another shape")
            _check_kind(name, array.dtype)
        first = np.flatnonzero(np.diff(which, prepend=-2) != 1)  # of each run of neighbours
        last = np.append(first[1:], len(which)) - 1
        stretches = list(zip(self.offsets[which[first]].tolist(), self.offsets[which[last] + 1].tolist(), strict=True))
        return lengths, {name: [array[a:b] for a, b in stretches] for name, array in self.arrays.items()}


def _listed(name: str, arrays: Any) -> list[Any]:
    try:
        return list(arrays)
    except TypeError:
        raise ShapeError(f"{name}: give a list of arrays, one a key, not a {type(arrays).__name__}") from None


def _array(name: str, given: Any) -> NDArray[Any]:
    try:
        return to_numpy(given)
    except ShapeError as error:
        raise ShapeError(f"{name}: {error}") from None


def check_distinct(keys: NDArray[np.uint8]) -> None:
    """Refuse a key that stands twice among ``[n, 32]``, with a ``KeyFormatError``."""
    if len(set(key_list(keys))) != len(keys):
        raise KeyFormatError("the same key stands twice in one put; drop the second copy")


def check_digits(arrays: Mapping[str, Any], recipe: Recipe) -> None:
    """Refuse rows that have fewer digits than the recipe of a model's weights promises.

    A recycler takes what stands under such a recipe for its own numbers. So rows have to come in the dtype that they
    were computed in, or one that holds all of its numbers; in a smaller one only where the recipe's dtype and lineage
    would have made them that. Recipes without a digest of weights are the caller's own, and so are their dtypes.

    ``arrays`` are named as an error is to name them.

    Raises:
        ShapeError: it names the first such array; also one that says no dtype: lists may hold rows of several.
    """
    if recipe.weights is None:
        return
    for name, array in arrays.items():
        given = _dtype_name(array)
        if given is None:
            raise ShapeError(
                f"{name} is a {type(array).__name__}, which says no dtype: give an array or a tensor, in the dtype "
                f"that its rows were computed in ({recipe.compute_dtype})"
            )
        if codec.holds(given, recipe.compute_dtype):
            continue
        rounded = given in codec.names()
        if not rounded or codec.traces((given, *recipe.via, recipe.dtype), recipe.compute_dtype) != recipe.via:
            raise ShapeError(
                f"{name} holds {given}, but the recipe is of rows computed in {recipe.compute_dtype} and stored as "
                f"{recipe.stored_as}: the digits are gone. Put rows as they were computed"
            )


def _dtype_name(array: Any) -> str | None:
    """Return the name of an array's or tensor's dtype, without importing torch; None where it says none."""
    dtype = getattr(array, "dtype", None)
    return None if dtype is None else str(getattr(dtype, "name", None) or dtype).removeprefix("torch.")


def _cached(arrays: list[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """Yield the rows of all these arrays in pieces that fit the processor's cache."""
    alike = len({array.dtype for array in arrays}) == 1  # joined, others would be rounded
    sizes = np.array([array.nbytes for array in arrays], np.int64)
    for run in runs(sizes, _PIECE_BYTES):
        for rows in [np.concatenate(arrays[run])] if alike and run.stop - run.start > 1 else arrays[run]:
            step = max(1, _PIECE_BYTES * len(rows) // rows.nbytes)
            for begin in range(0, len(rows), step):
                yield rows[begin : begin + step]


def _check_kind(name: str, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in ("f" if name == VALUES else "iu"):
        kind = "floating point" if name == VALUES else "integers"
        raise ShapeError(f"{'activations' if name == VALUES else name} must be {kind}, not {dtype}")


def _copy_integers(name: str, rows: NDArray[Any], out: NDArray[Any]) -> None:
    limits = np.iinfo(out.dtype)
    if rows.dtype != out.dtype and (rows.min() < limits.min or rows.max() > limits.max):
        raise ShapeError(f"{name} must fit {out.dtype}")
    out[:] = rows


def _refuse(what: str, rows: Mapping[str, Any], columns: Columns, stored_as: codec.Codec) -> None:
    """Raise what is wrong with an entry, if anything is, naming it ``what``."""
    tokens = 0
    for name, given in rows.items():  # ``values`` first
        dtype, trailing = columns[name]
        try:
            array = to_numpy(given)
        except ShapeError as error:
            raise ShapeError(f"{what}: {name}: {error}") from None
        if name == VALUES and array.ndim:
            tokens = len(array)
        if array.shape != (tokens, *trailing) or not tokens:
            expected = ", ".join(["tokens >= 1" if name == VALUES else str(tokens), *map(str, trailing)])
            raise ShapeError(f"{what}: {name} must be [{expected}], not {list(array.shape)}")
        try:
            _check_kind(name, array.dtype)
            if name != VALUES:
                _copy_integers(name, array, np.empty(array.shape, dtype))
        except ShapeError as error:
            raise ShapeError(f"{what}: {error}") from None
        if name == VALUES:
            stored_as.stored_rows(array, what=what)

"""Columns of the caller's own: named arrays beside the tokens of an entry, such as ``loss_mask`` or ``labels``.

The columns of a space are fields of one NumPy record a token, without gaps, and so are stored as one ragged array of
bytes, ``[tokens, width]``: whatever moves, checks or compacts rows moves, checks and compacts them. A space has one set
of columns, which is declared by whoever first puts some, and never changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.errors import FormatError, ShapeError, UsageError
from actcache.format.arguments import to_numpy
from actcache.format.ragged import EXTRAS, OWN, TOKEN_IDS, VALUES
from actcache.io.cached import cached_property

BLOB = "columns.json"  # of a space

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_TAKEN = frozenset({VALUES, TOKEN_IDS, OWN, *EXTRAS, "activations", "attention_mask", "documents", "positions", "keys"})
_KINDS = "biufcSUMmV"
_MOST_BYTES = 1 << 16  # of a token's record
_MOST = 64  # columns


@dataclass(frozen=True)
class Schema:
    """Names, dtypes and shapes (of one token) of a space's own columns, in the order of their names."""

    fields: tuple[tuple[str, str, tuple[int, ...]], ...]

    @cached_property
    def record(self) -> np.dtype[np.void]:
        """One token's record."""
        return np.dtype([(name, dtype, shape) for name, dtype, shape in self.fields])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _, _ in self.fields)

    @property
    def width(self) -> int:
        """The bytes of a token's record."""
        return self.record.itemsize

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> Schema:
        """Return the schema of arrays ``[tokens, ...]``.

        Raises:
            UsageError: a name is none, or taken; a dtype has no fixed size.
        """
        fields = []
        for name in sorted(arrays):
            _check_name(name)
            dtype, shape = arrays[name].dtype, tuple(arrays[name].shape[1:])
            _check_dtype(name, dtype)
            fields.append((name, dtype.newbyteorder("<").str, shape))
        made = cls(tuple(fields))
        if len(fields) > _MOST or not 0 < made.width <= _MOST_BYTES:
            raise UsageError(
                f"columns hold {made.width} bytes a token in {len(fields)} columns: a space takes 1 to {_MOST_BYTES} "
                f"bytes, in {_MOST} columns at most"
            )
        return made

    def pack(self, arrays: Mapping[str, NDArray[Any]], tokens: int, what: str = "") -> NDArray[np.uint8]:
        """Return records as bytes ``[tokens, width]``.

        Raises:
            UsageError: columns are missing, or others are given.
            ShapeError: an array has another length, shape, or kind of number, or one that does not fit. ``what`` names
                the document in both.
        """
        what = f"{what}: " if what else ""
        if set(arrays) != set(self.names):
            here, given = ", ".join(self.names), ", ".join(sorted(map(str, arrays))) or "none"
            raise UsageError(
                f"{what}this space's own columns are {here}, not {given}: give all of them, or none; others need a "
                "store of their own"
            )
        records = np.zeros(tokens, self.record)
        for name, text, shape in self.fields:
            array, dtype = arrays[name], np.dtype(text)
            if array.shape != (tokens, *shape):
                raise ShapeError(f"{what}column {name} must be {[tokens, *shape]}, not {list(array.shape)}")
            if array.dtype.newbyteorder("<") != dtype:
                _check_fits(what, name, array, dtype)
            records[name] = array
        return records.view(np.uint8).reshape(tokens, self.width)

    def unpack(self, packed: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Return the columns of records ``[..., width]``, each ``[..., *shape]``, contiguous."""
        records = np.ascontiguousarray(packed).view(self.record)[..., 0]
        return {name: np.ascontiguousarray(records[name]) for name in self.names}

    def dumps(self) -> bytes:
        """Return the schema as JSON with a checksum (docs/format.md)."""
        fields = [[name, dtype, list(shape)] for name, dtype, shape in self.fields]
        return json.dumps({"format_version": 1, "columns": fields, "checksum": _checksum(fields)}).encode() + b"\n"

    @classmethod
    def loads(cls, data: bytes, where: str) -> Schema:
        """Return what ``dumps`` was given; ``FormatError``, naming ``where``, where it is damaged."""
        try:
            value = json.loads(data)
            fields = value["columns"]
            if value["format_version"] != 1 or value["checksum"] != _checksum(fields):
                raise ValueError("it fails its checksum, or is of a newer release")
            empty = {str(name): np.empty((0, *shape), np.dtype(str(dtype))) for name, dtype, shape in fields}
            made = cls.of(empty)
            if made != cls(tuple((name, dtype, tuple(shape)) for name, dtype, shape in fields)):
                raise ValueError("its columns are in another order")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError) as error:
            raise FormatError(f"{where} is damaged: {error}") from None
        return made


def as_arrays(columns: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Return what a caller gives for each column as NumPy; ``UsageError`` where it is no mapping."""
    if not isinstance(columns, Mapping) or not columns:
        raise UsageError(f"columns are a mapping of names to arrays, not {columns!r:.80}")
    made = {}
    for name, given in columns.items():
        try:
            made[name] = to_numpy(given)
        except ShapeError as error:
            raise ShapeError(f"column {name}: {error}") from None
        if made[name].ndim == 0:
            raise ShapeError(f"column {name} must be [tokens, ...], not one number")
    return made


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"a column's name is a word of letters, digits and underscores, not {name!r:.80}")
    if name in _TAKEN:
        raise UsageError(f"{name} is a name of the package's own: call the column something else")


def _check_dtype(name: str, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in _KINDS or dtype.hasobject or not dtype.itemsize or dtype.names is not None:
        raise UsageError(f"column {name} holds {dtype}: columns hold numbers, or other values of one fixed size")


def _check_fits(what: str, name: str, array: NDArray[Any], dtype: np.dtype[Any]) -> None:
    """Refuse values that change where they become those of a dtype."""
    try:
        with np.errstate(all="ignore"):
            same = np.array_equal(array.astype(dtype), array, equal_nan=array.dtype.kind in "fc")
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ShapeError(f"{what}column {name} holds {array.dtype}, which does not fit {dtype}, as it is stored here")


def _checksum(fields: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(fields, separators=(",", ":")).encode())

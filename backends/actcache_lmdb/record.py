"""The records of a space in LMDB; docs/format.md gives them in a form that needs no actcache.

Four named databases in one environment:

- ``state``: one record, the space's sequence number and totals.
- ``heads``: entry key -> one head a version, newest first (sorted duplicates of one size). A deletion is a head too.
- ``entries``: entry number -> header, rows and the other arrays. Never so small that it would lie inside of a page of
  the B-tree, so an entry is one extent of ``data.mdb`` for as long as it lives, and its head names the first page.
- ``retired``: what later transactions may remove, by the sequence number that superseded it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.backend import Columns
from actcache.errors import FormatError, FormatVersionError
from actcache.format.keys import KEY_BYTES
from actcache.format.ragged import EXTRAS, OWN, PAYLOAD, TOKEN_IDS, VALUES

FORMAT_VERSION = 1
PAGE_HEADER = 16  # bytes that LMDB puts before a value that has pages of its own
HEADER_BYTES = 112  # of an entry, so that rows begin 128 bytes into their page
ROWS_AT = PAGE_HEADER + HEADER_BYTES
OVERFLOW = 0x04  # LMDB's flag of such pages
ENTRY_MAGIC = 0x45544341  # "ACTE"

#: Ragged arrays by their bit in ``columns``.
COLUMNS = (VALUES, TOKEN_IDS, *EXTRAS, OWN)

HEAD = np.dtype(
    [
        ("age", ">u8"),  # 2**64 - 1 - sequence: duplicates are sorted by their bytes, so the newest comes first
        ("id", "<u8"),  # number of the entry; 0: deleted
        ("page", "<u8"),  # first page in data.mdb
        ("tokens", "<u4"),
        ("columns", "<u4"),  # bits of COLUMNS
        ("checksum", "<u8"),
        ("extra", "<u8"),  # checksum of the optional arrays
        ("check", "<u8"),  # of the key and the fields before
    ]
)
RECORD = np.dtype([("key", "u1", KEY_BYTES), ("head", HEAD)])
RETIRED = struct.Struct("<Q32s56s")  # microseconds since 1970, key, head
HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u4"),
        ("id", "<u8"),
        ("tokens", "<u4"),
        ("columns", "<u4"),
        ("sequence", "<u8"),
        ("key", "u1", KEY_BYTES),
        ("checksum", "<u8"),
        ("extra", "<u8"),
        ("payload", "<u8"),  # bytes of the entry's frames; 0 where its rows are not compressed
        ("zeros", "u1", 24),
    ]
)
_STATE = struct.Struct("<4sI7QQ")
_NEWEST = np.uint64(2**64 - 1)
_WORDS = (KEY_BYTES + HEAD.itemsize) // 8
_PRIMES = np.array(
    [0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5], np.uint64
)
with np.errstate(over="ignore"):
    _FACTORS = np.resize(_PRIMES, _WORDS - 1) * np.arange(1, 2 * _WORDS - 2, 2, dtype=np.uint64)


def checks(records: NDArray[np.void]) -> NDArray[np.uint64]:
    """Return what ``check`` has to be in each of these records, ``[n]``."""
    words: NDArray[np.uint64] = records.view(np.uint64).reshape(-1, _WORDS)[:, :-1]
    mixed: NDArray[np.uint64] = np.multiply(words, _FACTORS)
    folded: NDArray[np.uint64] = np.right_shift(mixed, np.uint64(32))
    total: NDArray[np.uint64] = np.bitwise_xor(mixed, folded).sum(axis=1, dtype=np.uint64)
    return total


def joined(parts: Iterable[NDArray[np.void]]) -> NDArray[np.void]:
    """Return these records one after another. (``np.concatenate`` would turn the big-endian field around.)"""
    return np.frombuffer(bytearray(b"".join(part.tobytes() for part in parts)), RECORD)


def sequences(records: NDArray[np.void]) -> NDArray[np.uint64]:
    """Return the sequence numbers of these records."""
    ages: NDArray[np.uint64] = records["head"]["age"].astype(np.uint64)
    return _NEWEST - ages


@dataclass(frozen=True)
class State:
    """The record of ``state``."""

    sequence: int = 0  # number of the last transaction that changed entries
    next_id: int = 1  # number that the next entry gets
    horizon: int = 0  # a snapshot older than this sequence number may have lost entries to removal
    entries: int = 0  # that are live; ``tokens`` and ``nbytes`` are theirs: of their arrays, compressed where they are
    tokens: int = 0
    nbytes: int = 0
    created: int = 0  # when this generation was made, microseconds since 1970

    KEY = b"state"

    def pack(self) -> bytes:
        data = _STATE.pack(b"ACTL", FORMAT_VERSION, *astuple(self), 0)[:-8]
        return data + struct.pack("<Q", xxhash.xxh3_64_intdigest(data))

    @classmethod
    def unpack(cls, data: bytes | memoryview | None, where: object) -> State:
        """Raises ``FormatError``, ``FormatVersionError``."""
        if data is None or len(data) != _STATE.size:
            raise FormatError(f"{where} has no record of its state: it is no space of actcache, or damaged")
        magic, version, *fields, check = _STATE.unpack(data)
        if magic != b"ACTL" or xxhash.xxh3_64_intdigest(data[:-8]) != check:
            raise FormatError(f"the record of {where}'s state is damaged")
        if version > FORMAT_VERSION:
            raise FormatVersionError(f"{where} has format version {version}; this release reads {FORMAT_VERSION}")
        return cls(*fields)

    def changed(self, **fields: int) -> State:
        return replace(self, **fields)

    def added(self, entries: int, tokens: int, nbytes: int) -> State:
        """Raise no error where damaged entries say other sizes when they go than when they came."""
        nbytes = max(0, self.nbytes + nbytes)
        return replace(self, entries=self.entries + entries, tokens=self.tokens + tokens, nbytes=nbytes)


def bits(names: Sequence[str] | Mapping[str, object]) -> int:
    """Return the ``columns`` of an entry that has these arrays."""
    return sum(1 << COLUMNS.index(name) for name in names)


class Shapes:
    """Where each array of an entry lies in its value. The caller's own columns may be declared later.

    Where rows are compressed, their frames come last: how long they are, only the entry's header says.
    """

    def __init__(self, columns: Columns) -> None:
        self.compressed = PAYLOAD in columns
        self.item = np.dtype(columns[VALUES][0]).itemsize
        self._columns, self._counted, self._row_bytes = columns, 0, dict[str, int]()

    @property
    def row_bytes(self) -> Mapping[str, int]:
        """The bytes of a row of each array; of one that nobody has declared, 0."""
        if self._counted != len(self._columns):
            self._counted = len(self._columns)
            self._row_bytes = {OWN: 0} | {
                name: np.dtype(dtype).itemsize * int(np.prod(trailing, dtype=np.int64))
                for name, (dtype, trailing) in self._columns.items()
            }
        return self._row_bytes

    def places(self, tokens: NDArray[np.int64], columns: int) -> dict[str, NDArray[np.int64]]:
        """Return where arrays begin after the page's first byte, by name and for each entry, and their ``"end"``;
        without frames.

        Every array after the first begins at a multiple of 8.
        """
        places: dict[str, NDArray[np.int64]] = {}
        position = np.full(len(tokens), ROWS_AT, np.int64)
        for name in self.order(columns):
            position = (position + 7) & ~7
            places[name] = position
            if name != VALUES or not self.compressed:
                position = position + tokens * self.row_bytes[name]
        places["end"] = position
        return places

    def order(self, columns: int) -> list[str]:
        """Return the names of an entry's arrays in the order in which they lie."""
        names = [name for number, name in enumerate(COLUMNS) if columns >> number & 1]
        return [*names[1:], VALUES] if self.compressed and names[:1] == [VALUES] else names

    def nbytes(self, tokens: int, columns: int) -> int:
        """Return the bytes of an entry's arrays, without header and padding, as they are before they are compressed."""
        return sum(tokens * self.row_bytes[name] for i, name in enumerate(COLUMNS) if columns >> i & 1)

    def count(self, records: NDArray[np.void]) -> tuple[int, int]:
        """Return the tokens of these records, and the bytes of their arrays before they are compressed."""
        tokens, columns = records["head"]["tokens"].astype(np.int64), records["head"]["columns"]
        nbytes = sum(self.nbytes(int(tokens[columns == kind].sum()), kind) for kind in np.unique(columns).tolist())
        return int(tokens.sum()), nbytes

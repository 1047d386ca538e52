"""The compiled loops of the read path (``loops.c``): what they are given, and what they are without a compiler.

One call looks up a batch of keys; one brings all rows of a batch into the caller's buffers, makes the digests of each
entry while it is in the processor's cache, and compares them; where all is in mapped memory, one does both. None holds
the GIL, and the threads that share the work are not Python's. XXH3 is the ``xxhash`` package's own, by the C symbol
that its extension exports.

Where the library or that symbol is missing, ``numpy_loops`` does the same, correctly and slowly; the tests hold the two
against each other. Everything here is thread-safe.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
import xxhash._xxhash as xxhash_extension
from numpy.typing import NDArray

from actcache.errors import UsageError
from actcache.io import numpy_loops
from actcache.io.workers import available_cpus

LIBRARY = Path(__file__).with_name("_loops.dylib" if sys.platform == "darwin" else "_loops.so")
_VERSION = 10
_FAILED, _NOWHERE = (
    4,
    5,
)  # the states of an entry whose file could not be read, and of one whose target is beyond its buffer
_MOST_THREADS = 8  # copies and digests are bound by the memory's bandwidth, which a few cores use up


def threads_asked_for(text: str | None) -> int:
    """Return the threads that the environment variable ``ACTCACHE_THREADS`` asks for; None: it is not set.

    Raises:
        UsageError: it is no number of threads.
    """
    if not text:
        return min(available_cpus(), _MOST_THREADS)
    if not re.fullmatch(r"[0-9]{1,4}", text.strip()) or not (threads := int(text)):
        raise UsageError(f"ACTCACHE_THREADS is a number of threads, 1 or more, not {text!r}: set another, or unset it")
    return threads


#: That share a batch whose rows are in memory. Whoever measures may set another number, for all calls from then on.
THREADS = threads_asked_for(os.environ.get("ACTCACHE_THREADS"))
_NONE = np.empty(0, np.int64)
LOOKS = 32  #: pages of a batch that are looked at to see whether it is in memory, at most


class EntryReadError(OSError):
    """The file of an entry could not be read."""

    entry = 0  # its position in the batch


class LookupTable(NamedTuple):
    """Entries sorted by key, and what the space knows of them now; see ``segments.index.Table`` for the arrays."""

    prefix: NDArray[np.uint64]  # [size] ascending
    rest: NDArray[np.uint8]  # [size, 24]
    segment: NDArray[np.uint32] | None  # [size]; None: all are in the first one
    origin: NDArray[np.uint32] | None  # [size]; None: all are of the first one
    tokens: NDArray[np.uint32]  # [size]
    row: NDArray[np.int64]  # [size]
    checksum: NDArray[np.uint64]  # [size]
    alive: NDArray[np.bool_] | None  # [size]; None: all are served
    numbers: NDArray[np.int64]  # [segments of the table] the space's number of each, -1 where it is gone
    ranks: NDArray[np.int64]  # [origins of the table] of their names among all


class Found(NamedTuple):
    """Where the entries of a batch of keys lie, ``[n]`` each."""

    tokens: NDArray[np.int64]  # 0: absent
    checksums: NDArray[np.uint64]
    segment: NDArray[np.int64]
    row: NDArray[np.int64]
    outside: int  # how many entries a table places outside of their segments; they are absent


class Scattered(NamedTuple):
    """The rows of a batch, as they would be packed, go to these rows of the buffer: ``out[targets[j]]`` is row j."""

    targets: NDArray[np.int64]  # each once


class Pooled(NamedTuple):
    """Each entry's rows come to one, the entry's row of the buffer, ``[n, ...]``.

    By dimension a ``"mean"`` (sums of 64 rows at most in float32, these in float64) or the ``"max"``, float32; or the
    row ``"at"`` a position, as it is. Where an entry is absent, its row of the buffer is left alone.
    """

    how: str
    form: str = "float32"  # of the numbers, one of ``FORMS``
    at: NDArray[np.int64] | None = None  # [n] of each entry, from 0


Placing = Scattered | Pooled
FORMS = ("float32", "float16", "bfloat16")  #: that numbers take; bfloat16 as its bits, uint16
_SCATTERED, _POOLED = 1, {"at": 2, "mean": 3, "max": 4}  # how rows get into a buffer (``way`` of a column in loops.c)


class Column(NamedTuple):
    """One ragged array of a batch: where each entry's rows are, and the buffer that they go into.

    With ``files``, what of ``memory`` is not in physical memory is read from them. ``placing`` says
    that rows do not go where their entry's place in the batch is; rows of ``out`` may then lie apart.
    """

    row_bytes: int
    out: NDArray[Any] | None = None  # rows of the whole batch; None: digested where they are, in memory
    memory: NDArray[Any] | None = None
    begins: NDArray[np.int64] | None = None  # [n] where each entry's rows begin in it, in bytes
    files: NDArray[np.int32] | None = None  # [n] descriptors
    places: NDArray[np.int64] | None = None  # [n] where its rows begin in its file, in bytes
    sizes: NDArray[np.int64] | None = None  # [n] bytes of each entry's frames of zstd, which make its rows; None: rows
    item: int = 1  # bytes of a number: an entry's first frame has all first ones, the next all second ones, ...
    placing: Placing | None = None


class MappedColumn(NamedTuple):
    """One ragged array of all segments of a space, in mapped memory.

    Where the tables count pages instead of rows (``unit`` bytes each), an entry's rows begin ``at`` bytes behind where
    its first page does, and ``before`` bytes for each of its tokens, at the next multiple of 8.
    """

    row_bytes: int
    memory: NDArray[Any]
    firsts: NDArray[np.int64]  # [segments] the first row of each in it, by its number; -1 where it is not mapped
    unit: int | None = None  # None: rows
    at: int = 0
    before: int = 0


@dataclass(frozen=True, slots=True)
class Digests:
    """Which digests to make of each entry (see ``format.checksum``), and what they have to be.

    The first ``chained`` columns of the batch are the first chain, the others the second one, which begins with what
    the first one should give (``expected``).
    """

    chained: int
    seed: int = 0
    keys: NDArray[np.uint8] | None = None  # [n, 32], mixed into the first seeds
    seeds: NDArray[np.uint64] | None = None  # [n] first seeds, where there are no keys
    expected: NDArray[np.uint64] | None = None  # [n]
    expected_more: NDArray[np.uint64] | None = None
    sums: NDArray[np.uint64] | None = None  # [n] what the first chain gives goes here
    more: NDArray[np.uint64] | None = None


# --- the library ------------------------------------------------------------------------------------------------------

_P, _I64, _I32, _U64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_uint64


class _Table(ctypes.Structure):
    _fields_ = [
        ("size", _I64),
        *((name, _P) for name in ("prefix", "rest", "segment", "origin", "tokens", "row", "checksum", "alive")),
        ("segments", _I64),
        ("origins", _I64),
        ("numbers", _P),
        ("ranks", _P),
    ]


class _Lookup(ctypes.Structure):
    _fields_ = [
        ("count", _I64),
        ("keys", _P),
        ("tables", _I64),
        ("table", _P),
        ("segments", _I64),
        ("limits", _P),
        ("names", _P),
        ("tokens", _P),
        ("checksums", _P),
        ("segment", _P),
        ("row", _P),
        ("outside", _I64),
    ]


class _Column(ctypes.Structure):
    _fields_ = [
        ("row_bytes", _I64),
        ("base", _P),
        ("size", _I64),
        ("begins", _P),
        ("files", _P),
        ("places", _P),
        ("out", _P),
        ("sizes", _P),
        ("item", _I64),
        ("way", _I32),
        ("form", _I32),
        ("targets", _P),
        ("apart", _I64),
        ("room", _I64),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("count", _I64),
        ("lengths", _P),
        ("starts", _P),
        ("ends", _P),
        ("columns", _I64),
        ("column", _P),
        ("chained", _I64),
        ("direct", _I32),
        ("digests", _I32),
        ("keys", _P),
        ("seed", _U64),
        ("seeds", _P),
        ("expected", _P),
        ("expected_more", _P),
        ("sums", _P),
        ("more", _P),
        ("state", _P),
        ("part", _I64),
        ("looks", _I64),
        ("looked", _I64),
        ("streams", _I32),
        ("bad", _I64),
        ("error", _I32),
    ]


class _Framing(ctypes.Structure):
    _fields_ = [
        ("count", _I64),
        ("data", _P),
        ("edges", _P),
        ("item", _I64),
        ("room", _I64),
        ("out", _P),
        ("sizes", _P),
        ("failed", _I32),
    ]


class _Conversion(ctypes.Structure):
    _fields_ = [
        ("rows", _I64),
        ("hidden", _I64),
        ("code", _I32),
        ("form", _I32),
        ("stored", _P),
        ("numbers", _P),
        ("bad", _I64),
    ]


_READ_COLUMNS = 2


class _MappedColumn(ctypes.Structure):
    _fields_ = [
        ("row_bytes", _I64),
        ("base", _P),
        ("size", _I64),
        ("firsts", _P),
        ("unit", _I64),
        ("at", _I64),
        ("before", _I64),
        ("out", _P),
        ("way", _I32),
        ("form", _I32),
        ("targets", _P),
        ("apart", _I64),
        ("room", _I64),
    ]


class _Reading(ctypes.Structure):
    _fields_ = [
        ("tables", _I64),
        ("table", _P),
        ("segments", _I64),
        ("limits", _P),
        ("names", _P),
        ("columns", _I64),
        ("column", _MappedColumn * _READ_COLUMNS),
        ("looks", _I64),
        ("looked", _I64),
        ("count", _I64),
        ("keys", _P),
        ("width", _I64),
        ("room", _I64),
        ("digests", _I32),
        ("seed", _U64),
        ("work", _P),
        ("state", _P),
        ("total", _I64),
    ]


def _load() -> tuple[Any, str]:
    """Return the library, None where it cannot be used, and why."""
    named = os.environ.get("ACTCACHE_LOOPS")  # "numpy", or the path of another build
    if named == "numpy":
        return None, "ACTCACHE_LOOPS=numpy asks for that"
    try:
        library = ctypes.CDLL(named or str(LIBRARY))
        digest = ctypes.CDLL(xxhash_extension.__file__).XXH3_64bits_withSeed
    except (OSError, AttributeError) as error:
        return None, str(error)
    digest.restype, digest.argtypes = _U64, (_P, ctypes.c_size_t, _U64)
    known = bytes(range(256)) * 2
    if digest(known, len(known), 7) != xxhash.xxh3_64_intdigest(known, 7):
        return None, f"XXH3_64bits_withSeed of xxhash {xxhash.VERSION} is another function than its digests"
    if library.act_version() != _VERSION:
        return None, f"{LIBRARY} is of another release"
    library.act_locate.restype, library.act_locate.argtypes = None, (_P, _I32)
    library.act_gather.restype, library.act_gather.argtypes = _I64, (_P, _I32)
    library.act_read.restype, library.act_read.argtypes = _I64, (_P, _I32)
    library.act_seems_absent.restype, library.act_seems_absent.argtypes = _I32, (_P, _I64, _P, _I64)
    library.act_permute.restype, library.act_permute.argtypes = None, (_P, _I64, _U64)
    library.act_moments.restype = _I32
    library.act_moments.argtypes = (_P, _I32, _I64, _I64, *(_P,) * 6)
    library.act_halves.restype, library.act_halves.argtypes = _I32, (_P, _P, _I64)
    library.act_frame.restype, library.act_frame.argtypes = _I32, (_P, _I32)
    library.act_set_zstd.restype, library.act_set_zstd.argtypes = None, (_P,)
    library.act_widen.restype, library.act_widen.argtypes = _I64, (_P, _I32)
    library.act_narrow.restype, library.act_narrow.argtypes = _I64, (_P, _I32)
    library.act_set_digest.restype, library.act_set_digest.argtypes = None, (_P,)
    library.act_set_digest(ctypes.cast(digest, _P))
    return library, ""


_library, missing = _load()  #: ``missing``: why the compiled loops cannot be used; empty where they are


def _address(array: NDArray[Any] | None) -> int | None:
    """Return where the memory of a C-contiguous array begins. NumPy's own ways take a microsecond each."""
    if array is None:
        return None
    if array.flags.writeable and array.size:
        return ctypes.addressof(_Byte.from_buffer(array))  # type: ignore[arg-type]
    address: int = array.__array_interface__["data"][0]
    return address


_Byte = ctypes.c_char


def _is_whole(out: NDArray[Any]) -> bool:
    return bool(out[:1].flags.c_contiguous)


def _begin(out: NDArray[Any]) -> int:
    """Return where a buffer begins, whose rows may lie apart."""
    address: int = out.__array_interface__["data"][0]
    return address


# --- what they do -----------------------------------------------------------------------------------------------------


class Lookup:
    """Finds keys in some tables; immutable.

    Args:
        limits: ``[segments]`` rows that each segment of the space has, by its number.
        names: ``[segments]`` ranks of their names: of copies of one origin, that in the last name's segment is served.
    """

    def __init__(self, tables: Sequence[LookupTable], limits: NDArray[np.int64], names: NDArray[np.int64]) -> None:
        # A stranger's index may begin anywhere in its file: what is not aligned is copied.
        self._tables = [LookupTable(*(_aligned(array) for array in table)) for table in tables]
        self._limits, self._names = limits, names
        described = [
            _Table(
                len(table.prefix),
                *map(_address, table[: len(table) - 2]),
                len(table.numbers),
                len(table.ranks),
                _address(table.numbers),
                _address(table.ranks),
            )
            for table in self._tables
        ]
        self._described = (_Table * len(described))(*described)
        self._fixed = (
            len(described),
            ctypes.addressof(self._described),
            len(limits),
            _address(limits),
            _address(names),
        )

    def locate(self, keys: NDArray[np.uint8]) -> Found:
        """Look up ``[n, 32]`` keys, C-contiguous."""
        if _library is None:
            return Found(*numpy_loops.locate(self._tables, self._limits, self._names, keys))
        count = len(keys)
        made = np.empty((4, count), np.int64)
        first = _address(made)
        assert first is not None
        call = _Lookup(count, _address(keys), *self._fixed, *(first + 8 * count * i for i in range(4)))
        _library.act_locate(ctypes.byref(call), THREADS)
        tokens, checksums, segment, row = made
        return Found(tokens, checksums.view(np.uint64), segment, row, call.outside)

    def reading(self, columns: Sequence[MappedColumn], looked: int | None) -> Reading | None:
        """Return what reads batches of these columns, which are the first chain of digests, by one call; None where
        nothing can. The rows of the column at ``looked`` are looked at first (see ``seems_absent``)."""
        if _library is None or not 0 < len(columns) <= _READ_COLUMNS:
            return None
        if any(len(column.firsts) < len(self._limits) for column in columns):
            return None  # not all segments are mapped yet
        looks = {} if looked is None else {"looks": LOOKS, "looked": looked}
        return Reading(self, _Reading(*self._fixed, len(columns), **looks), columns)


class Reading:
    """Reads batches of some mapped columns, each by one call that looks up, plans, copies and compares; immutable."""

    def __init__(self, lookup: Lookup, described: _Reading, columns: Sequence[MappedColumn]) -> None:
        self._alive = lookup, columns
        for place, column in zip(described.column, columns, strict=False):
            place.row_bytes, place.base, place.size = column.row_bytes, _begin(column.memory), column.memory.nbytes
            place.firsts, place.at, place.before = _address(column.firsts), column.at, column.before
            place.unit = column.row_bytes if column.unit is None else column.unit
        self._columns = len(columns)
        self._described = bytes(described)

    def read(
        self,
        keys: NDArray[np.uint8],
        out: Sequence[NDArray[Any]],
        width: int | None,
        seed: int | None,
        placing: Sequence[Placing | None] | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Bring the rows of ``[n, 32]`` keys, C-contiguous, into one buffer a column, ``[rows, ...]``.

        Args:
            width: None for packed rows, else the rows of each entry's place, whose rest becomes zeros.
            seed: of the digests, which keys are mixed into; None: nothing is compared.
            placing: of each column, as of ``Column``; the rows are packed then.

        Returns:
            The tokens of each entry, ``[n]``, 0 where it is absent, and the positions of what is not intact. None where
            the batch has to be read step by step: its rows seem not to be in memory, are not mapped, or do not fit.
        """
        count = len(keys)
        call = _Reading.from_buffer_copy(self._described)
        work = np.empty((6 + self._columns, count), np.int64)
        state = np.empty(count, np.uint8)
        call.count, call.keys, call.work, call.state = count, _address(keys), _address(work), _address(state)
        call.width, call.room = -1 if width is None else width, min(map(len, out))
        if seed is not None:
            call.digests, call.seed = 1, seed
        if placing is None:
            for place, buffer in zip(call.column, out, strict=False):
                place.out = _address(buffer)
        else:
            call.room = min(len(o) if of is None else _room_for(of) for o, of in zip(out, placing, strict=True))
            for place, buffer, of in zip(call.column, out, placing, strict=False):
                _put_down(place, buffer, of, place.row_bytes, count)
        bad = _library.act_read(ctypes.byref(call), THREADS)
        if bad < 0:
            return None
        return work[0], _bad(state) if bad else _NONE


def _room_for(placing: Placing) -> int:
    """Return for how many packed rows there is room."""
    return len(placing.targets) if isinstance(placing, Scattered) else sys.maxsize


def _put_down(place: Any, out: NDArray[Any], placing: Placing | None, stored: int, count: int) -> None:
    """Say in a column's structure where rows of so many bytes of so many entries go."""
    if placing is None:
        place.out = _address(out)
        return
    if isinstance(placing, Scattered):
        place.way, place.targets = _SCATTERED, _address(_checked(placing.targets))
    else:
        place.way, place.form = _POOLED[placing.how], FORMS.index(placing.form)
        if placing.how == "at":
            assert placing.at is not None
            place.targets = _address(_checked(placing.at, count))
        elif out.dtype != np.float32:
            raise TypeError(f"what is pooled is float32, not {out.dtype}")
    own = out.itemsize * math.prod(out.shape[1:])
    if stored_row(out, placing)[0] != stored or (len(out) > 1 and out.strides[0] < own) or not _is_whole(out):
        raise TypeError(f"stored rows of {stored} bytes do not fit {out.dtype} {list(out.shape)}")
    place.out, place.apart, place.room = _begin(out), out.strides[0], len(out)


def _checked(targets: NDArray[np.int64], least: int = 0) -> NDArray[np.int64]:
    if targets.dtype != np.int64 or not targets.flags.c_contiguous or len(targets) < least:
        raise TypeError(f"targets and positions are int64 and contiguous, not {targets.dtype} {list(targets.shape)}")
    return targets


def _bad(state: NDArray[np.uint8]) -> NDArray[np.int64]:
    if (state == _NOWHERE).any():
        raise IndexError("rows have targets beyond their buffer")
    return np.flatnonzero(state)


def _aligned(array: Any) -> Any:
    return None if array is None else np.require(array, requirements=["A", "C"])


def gather(
    columns: Sequence[Column],
    lengths: NDArray[np.int64],
    offsets: NDArray[np.int64],
    digests: Digests | None = None,
    *,
    threads: int | None = None,
    direct: bool = False,
) -> NDArray[np.int64]:
    """Bring rows of a batch into its buffers and make their digests; return the positions of what is not intact.

    That is entries whose digests are not what they should be, or whose memory or file is too short.

    Args:
        columns: in the order of the chain of digests.
        lengths: ``[n]`` rows of each entry, 0 where it is absent.
        offsets: ``[n + 1]`` where the place of each begins in the buffers, in rows; what its own rows leave of it
            becomes zeros. Or ``[2, n]``, the begins and the ends, where the places do not follow one another.
        threads: that share the work, ``THREADS`` if not given; more than there are processors where they wait for a
            disk.
        direct: whether the files were opened for direct reads, which go past the page cache.

    Raises:
        EntryReadError: a file could not be read.
    """
    found = _gather(columns, lengths, offsets, digests, threads or THREADS, direct, None)
    assert found is not None
    return found


def gather_if_present(
    columns: Sequence[Column],
    lengths: NDArray[np.int64],
    offsets: NDArray[np.int64],
    digests: Digests | None,
    looked: int,
) -> NDArray[np.int64] | None:
    """``gather``, unless the rows of the column at ``looked`` seem not to be in memory (see ``seems_absent``): then
    nothing is brought, and None returned."""
    return _gather(columns, lengths, offsets, digests, THREADS, False, looked)


def _gather(
    columns: Sequence[Column],
    lengths: NDArray[np.int64],
    offsets: NDArray[np.int64],
    digests: Digests | None,
    threads: int,
    direct: bool,
    looked: int | None,
) -> NDArray[np.int64] | None:
    if lengths.dtype != np.int64 or offsets.dtype != np.int64:
        raise TypeError(f"lengths and offsets are int64, not {lengths.dtype} and {offsets.dtype}")
    count = len(lengths)
    starts, ends = (offsets[:-1], offsets[1:]) if offsets.ndim == 1 else offsets
    for column in columns:
        if column.placing is not None and _room_for(column.placing) < ends.max(initial=0):
            raise TypeError(f"{ends.max()} rows have fewer targets: {_room_for(column.placing)}")
    state = np.zeros(count, np.uint8)
    if _library is None or (any(column.sizes is not None for column in columns) and not zstd_is_compiled()):
        numpy_loops.gather(columns, lengths, starts, ends, digests, direct, state)
        return _bad(state)
    described = (_Column * len(columns))(*(_described(column, count) for column in columns))
    batch = _Batch(
        count, _address(lengths), _address(starts), _address(ends), len(columns), ctypes.addressof(described)
    )
    batch.direct, batch.state = direct, _address(state)
    if digests is not None:
        batch.digests, batch.chained, batch.seed, batch.keys = 1, digests.chained, digests.seed, _address(digests.keys)
        for name in ("seeds", "expected", "expected_more", "sums", "more"):
            if (array := getattr(digests, name)) is not None:
                setattr(batch, name, _address(array))
    if looked is not None:
        batch.looks, batch.looked = LOOKS, looked
    found = _library.act_gather(ctypes.byref(batch), threads)
    if found <= 0:
        return _NONE if not found else None
    if batch.error:
        error = EntryReadError(batch.error, os.strerror(batch.error))
        error.entry = int(np.flatnonzero(state == _FAILED)[0])
        raise error
    return _bad(state)


def _described(column: Column, count: int) -> _Column:
    size_of_row, out, memory, begins, files, places, sizes, item, placing = column
    size = 0 if memory is None else memory.nbytes
    addresses = _address(memory), size, _address(begins), _address(files), _address(places)
    described = _Column(size_of_row, *addresses, None, _address(sizes), item)
    if placing is None:
        described.out = _address(out)
    elif out is not None:
        _put_down(described, out, placing, size_of_row, count)
    return described


def stored_row(out: NDArray[Any], placing: Placing | None = None) -> tuple[int, int]:
    """Return the bytes of a stored row that goes into a buffer, and those of a number of it."""
    item = out.itemsize
    if isinstance(placing, Pooled) and placing.how != "at":
        item = 4 if placing.form == "float32" else 2
    return item * math.prod(out.shape[1:]), item


def seems_absent(column: Column, lengths: NDArray[np.int64], most: int = LOOKS) -> bool:
    """Return whether some rows of a column in mapped memory seem not to be in physical memory; False where nothing can
    tell.

    To ask for what is there costs more than to read it. So some pages are looked at, ``most`` of them, evenly spread.
    Where one in twenty is not there, 32 are wrong once in five times (0.95 to the power of 32).
    """
    if _library is None:
        return False
    return bool(_library.act_seems_absent(ctypes.byref(_described(column, 0)), len(lengths), _address(lengths), most))


def permutation(count: int, seed: int) -> NDArray[np.int64]:
    """Return the numbers below ``count`` in random order, a function of ``seed`` (64 bits), three times as fast as
    NumPy's generators do."""
    if _library is None:
        return numpy_loops.permutation(count, seed)
    out = np.zeros(count, np.int64)
    _library.act_permute(_address(out), count, seed)
    return out


_KINDS = {"float32": 0, "float16": 1, "bfloat16": 2}


def moments(
    rows: NDArray[Any],
    kind: str,
    pivot: NDArray[np.float32],
    sums: NDArray[np.float64],
    squares: NDArray[np.float64],
    most: NDArray[np.float32],
    norms: NDArray[np.float64],
) -> bool:
    """Add ``[n, width]`` rows to their statistics; return False where only NumPy can, and nothing was added.

    Args:
        kind: what the rows hold: float32, float16, or bfloat16 as its bits.
        pivot: ``[width]`` near the mean, so that squares of what is beside it have enough digits.
        sums, squares: ``[width]`` of what is beside the pivot.
        most: ``[width]`` the largest values.
        norms: ``[1]`` the sum of the rows' Euclidean norms.
    """
    if _library is None or kind not in _KINDS or not (rows.flags.c_contiguous and rows.flags.aligned):
        return False
    scratch = np.empty((4, rows.shape[1]), np.float32)
    arrays: list[NDArray[Any]] = [pivot, sums, squares, most, norms, scratch]
    done = _library.act_moments(_address(rows), _KINDS[kind], *rows.shape, *map(_address, arrays))
    return bool(done == 0)


def round_to_float16(rows: NDArray[Any], out: NDArray[Any]) -> bool | None:
    """Round float32 to float16 as NumPy does, ten times as fast; return whether all of it is finite.

    None, and nothing is written, where only NumPy can: other dtypes, strides, processors.
    """
    if _library is None or rows.dtype != np.float32 or out.dtype != np.float16 or rows.shape != out.shape:
        return None
    if not (rows.flags.c_contiguous and rows.flags.aligned and out.flags.carray and out.size):
        return None
    finite: int = _library.act_halves(_address(rows), _address(out), out.size)
    return None if finite < 0 else bool(finite)


CODES = ("int8", "float8_e4m3")  #: kinds of codes of one byte
SCALE_BYTES = 4


def widen(stored: NDArray[np.uint8], code: str, out: NDArray[Any], form: str, threads: int | None = None) -> int:
    """Make numbers of rows of codes; return how many rows have one that is an infinity or a NaN.

    Args:
        stored: ``[n, hidden + 4]``, C-contiguous: codes of one byte, one of ``CODES``, then the row's scale as float32.
        out: ``[n, hidden]``, C-contiguous, in one of ``FORMS``.
        threads: that share the work, ``THREADS`` if not given.
    """
    if not _fit_to_convert(stored, out, "float32" if form == "float32" else "float16"):
        raise TypeError(f"{stored.dtype} {stored.shape} is not widened into {out.dtype} {out.shape}")
    if _library is None:
        return numpy_loops.widen(stored, code, out, form)
    call = _Conversion(*out.shape, CODES.index(code), FORMS.index(form), _address(stored), _address(out))
    bad: int = _library.act_widen(ctypes.byref(call), threads or THREADS)
    return bad


def narrow(rows: NDArray[np.float32], out: NDArray[np.uint8], code: str, threads: int | None = None) -> int:
    """Make rows of codes of rows of float32; return how many have a number that is none, or too large to come back.
    Of these nothing is made. Shapes are those of ``widen``."""
    if not _fit_to_convert(out, rows, "float32"):
        raise TypeError(f"{rows.dtype} {rows.shape} is not narrowed into {out.dtype} {out.shape}")
    if _library is None:
        return numpy_loops.narrow(rows, out, code)
    call = _Conversion(*rows.shape, CODES.index(code), 0, _address(out), _address(rows))
    bad: int = _library.act_narrow(ctypes.byref(call), threads or THREADS)
    return bad


def _fit_to_convert(stored: NDArray[Any], numbers: NDArray[Any], size: str) -> bool:
    same = stored.dtype == np.uint8 and numbers.dtype.itemsize == np.dtype(size).itemsize and numbers.ndim == 2
    same = same and stored.shape == (len(numbers), numbers.shape[1] + SCALE_BYTES)
    return bool(same and stored.flags.c_contiguous and numbers.flags.c_contiguous and numbers.flags.aligned)


# --- frames of zstd ---------------------------------------------------------------------------------------------------

_ZSTD = (  # what ``zstd_functions`` of loops.c has, in its order
    *("createDCtx", "freeDCtx", "decompressDCtx", "getFrameContentSize", "findFrameCompressedSize"),
    *("isError", "createCCtx", "freeCCtx", "compress2", "CCtx_setParameter"),
    "compressBound",
)
_zstd_is_compiled: bool | None = None  # None: nobody has looked


def zstd_is_compiled() -> bool:
    """Return whether the compiled loops make and read frames of zstd: with libzstd as the zstandard package exports it.
    ``MissingExtraError`` where that package is not there."""
    global _zstd_is_compiled
    if _zstd_is_compiled is None:
        numpy_loops.zstandard()  # says what to install
        _zstd_is_compiled = _library is not None and _give_zstd(_library)
    return _zstd_is_compiled


def _give_zstd(library: Any) -> bool:
    found = find_spec("zstandard._cffi")  # of its two extensions the one that exports libzstd's functions
    try:
        exported = ctypes.CDLL(found.origin if found is not None and found.origin else "")
        functions = [getattr(exported, f"ZSTD_{name}") for name in _ZSTD]
    except (OSError, AttributeError):
        return False
    library.act_set_zstd((_P * len(functions))(*(ctypes.cast(function, _P) for function in functions)))
    return True


def frames_of(rows: NDArray[Any], begins: NDArray[np.int64], item: int) -> list[NDArray[np.uint8]]:
    """Return the frames of zstd of each entry, one after another, views of one array.

    Args:
        rows: C-contiguous.
        begins: ``[n + 1]`` where each entry begins in it, in bytes, and the end; each has one byte or more.
        item: bytes of a number: a frame gets all first ones of an entry, the next all second ones, ...
    """
    data = rows.reshape(-1).view(np.uint8)
    if not zstd_is_compiled():
        return numpy_loops.frames_of(data, begins, item)
    nbytes = int(np.diff(begins).max(initial=0))
    room = nbytes + nbytes // 128 + 512 * item  # more than the bound of libzstd
    out, sizes = np.empty((len(begins) - 1, room), np.uint8), np.zeros(len(begins) - 1, np.int64)
    call = _Framing(len(sizes), _address(data), _address(begins), item, room, _address(out), _address(sizes), 0)
    assert _library is not None
    if not _library.act_frame(ctypes.byref(call), THREADS):
        raise MemoryError("zstd could not compress: there is no memory left")
    return [out[i, :size] for i, size in enumerate(sizes.tolist())]

"""One batched read: where the entries of a batch of keys lie, and their rows, verified while they come in."""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.backend import VALUES, EntryLocations, Expected, Placing, Snapshot
from actcache.entries.writer import Rows, Writer
from actcache.errors import CorruptEntryError, FormatError, SegmentGoneError
from actcache.format.checksum import CHAINED, ORDER
from actcache.format.keys import Keys, key_array, key_list
from actcache.format.ragged import offsets_of, placed, row_indices

_LOOKUPS = 8  # that are remembered: a few batches ahead of each of several readers
_MOST_KEYS = 1 << 16  # of a batch; more than that is a whole corpus, which is looked up once
_MOST_RUNS = 16  # of entries of one kind in a batch, each of which is another gather
_TRIES = 5  # each finds what compaction had published by then


class LookupCache:
    """Remembers where the entries of the last batches lie, as long as the snapshot is the same: a batch is asked for
    ahead, for its checksums, and then read. Thread-safe."""

    def __init__(self) -> None:
        self._lookups: deque[tuple[bytes, weakref.ref[Snapshot], EntryLocations]] = deque(maxlen=_LOOKUPS)

    def locate(self, snapshot: Snapshot, keys: NDArray[np.uint8]) -> EntryLocations:
        """Return where the entries of ``[n, 32]`` keys lie."""
        if len(keys) > _MOST_KEYS:
            return snapshot.locate(keys)
        digest = xxhash.xxh3_128_digest(keys.data)
        for of_keys, of_snapshot, located in tuple(self._lookups):
            if of_keys == digest and of_snapshot() is snapshot:
                return located
        located = snapshot.locate(keys)
        self._lookups.append((digest, weakref.ref(snapshot), located))
        return located


P = ParamSpec("P")
T = TypeVar("T")


def retry_on_stale_snapshot(read: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Have a read of a space begin again with a new snapshot where a segment of its snapshot is gone."""

    @functools.wraps(read)
    def attempt(space: Any, /, *args: P.args, **options: P.kwargs) -> T:
        for _ in range(_TRIES - 1):
            try:
                return read(space, *args, **options)
            except SegmentGoneError:
                space.refresh()
        return read(space, *args, **options)

    return attempt


def read_intact(read: Callable[[NDArray[np.uint8]], T], keys: Keys) -> tuple[T, NDArray[np.uint8], list[bytes]]:
    """Read entries by a space's ``get`` or ``read_packed``, without those that fail their checksums; return what that
    returns, the keys of which, ``[n, 32]``, and the keys of what is corrupt."""
    names, corrupt = key_array(keys), list[bytes]()
    while True:
        try:
            return read(names), names, corrupt
        except CorruptEntryError as error:
            corrupt += error.keys
            bad = set(error.keys)
            names = names[[key not in bad for key in key_list(names)]]


class Request:
    """The entries of ``[n, 32]`` keys in a snapshot and in the writer's unpublished blocks, which come first.

    ``lengths``: tokens of each entry, ``[n]`` int64, 0 where it is absent. ``located``: where published copies lie.
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        writer: Writer | None,
        space_seed: int,
        keys: NDArray[np.uint8],
        lookups: LookupCache | None = None,
    ) -> None:
        self._keys = keys
        self._seed = space_seed
        # The writer first, then the snapshot: a block that is published in between is found twice, not missed.
        self._pending: dict[int, Rows] = {}
        if writer is not None and len(writer):
            self._pending = writer.find(key_list(keys))
        self._snapshot = snapshot()
        self.located = lookups.locate(self._snapshot, keys) if lookups is not None else self._snapshot.locate(keys)
        self.lengths = self.located.tokens.copy()
        for i, rows in self._pending.items():
            self.lengths[i] = len(rows[VALUES])

    @property
    def checksums(self) -> NDArray[np.uint64]:
        """Each entry's checksum, ``[n]``, 0 where it is absent or not published yet."""
        checksums = self.located.checksums.copy()
        checksums[list(self._pending)] = 0
        return checksums

    def part(self, members: slice | NDArray[np.int64]) -> Request:
        """Return the request of some of the entries, by their positions."""
        part = copy.copy(self)
        part._keys, part.located, part.lengths = self._keys[members], self.located[members], self.lengths[members]
        if self._pending:
            numbers = np.arange(len(self._keys))[members].tolist()
            part._pending = {new: self._pending[i] for new, i in enumerate(numbers) if i in self._pending}
        return part

    def has(self, column: str) -> NDArray[np.bool_]:
        """Return which entries have a ragged array, ``[n]``."""
        all_have = self._snapshot.have(column)
        if all_have is None:
            has = self._snapshot.has(column, self.located)
        else:
            has = self.located.found if all_have else np.zeros(len(self._keys), bool)
        for i, rows in self._pending.items():
            has[i] = column in rows
        return has

    def read(self, out: Mapping[str, NDArray[np.generic]], width: int | None, *, verify: bool) -> list[int]:
        """Read rows into buffers; return the positions of entries that are corrupt, whose rows mean nothing.

        Entries that have the same of these arrays are read by one gather.

        Args:
            out: name of a ragged array -> buffer in the stored dtype, ``[rows, ...]``; kept where an entry has none.
            width: None for packed rows, else the rows that each entry takes up.
            verify: whether to compare checksums: that of ``values`` takes ``token_ids``, too, where any entry has them,
                that of the optional arrays all of these, and no ``values``.
        """
        out = {name: out[name] for name in ORDER if name in out}
        optional = [name for name in out if name != VALUES]
        kinds = self._kinds(optional)
        if kinds is None:
            return self._read_alike(out, width, verify)
        count, starts = len(self._keys), offsets_of(self.lengths, width)
        edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), count]
        if len(edges) > _MOST_RUNS + 1:
            return self._read_by_kind(kinds, out, width, starts, verify)
        corrupt: list[int] = []
        for first, last in itertools.pairwise(edges):
            alike = self if last - first == count else self.part(slice(first, last))
            lacking = _lacking(int(kinds[first]), optional)
            here = {n: buffer[starts[first] : starts[last]] for n, buffer in out.items() if n not in lacking}
            corrupt += [first + i for i in alike._read_alike(here, width, verify)]
        return corrupt

    def place(self, out: Mapping[str, NDArray[np.generic]], placing: Placing, *, verify: bool) -> list[int]:
        """Read packed rows as ``read`` does, those of ``values`` to where they belong (see ``Snapshot.place``)."""
        out = {name: out[name] for name in ORDER if name in out}
        if self._kinds([name for name in out if name != VALUES]) is None:
            try:
                expected = self._expected(out, verify)
                corrupt: list[int] = self._snapshot.place(self.located, out, placing, expected).tolist()
                return corrupt
            except SegmentGoneError:
                raise
            except FormatError:
                pass  # entry by entry
        return placed(out, {VALUES: placing}, self.lengths, lambda rows: self.read(rows, None, verify=verify))

    def _kinds(self, columns: list[str]) -> NDArray[np.int64] | None:
        """Return which of these arrays each entry has, ``[n]``: a bit each, all of them inverted where it is not
        published yet. Absent entries are read beside those that have all. None where all are alike and published."""
        if not self._pending and all(map(self._snapshot.have, columns)):
            return None
        kinds = np.zeros(len(self._keys), np.int64)
        for bit, name in enumerate(columns):
            kinds |= (self.has(name) | (self.lengths == 0)).astype(np.int64) << bit
        if self._pending:
            pending = list(self._pending)
            kinds[pending] = ~kinds[pending]
        return kinds

    def _read_by_kind(
        self,
        kinds: NDArray[np.int64],
        out: Mapping[str, NDArray[np.generic]],
        width: int | None,
        starts: NDArray[np.int64],
        verify: bool,
    ) -> list[int]:
        """Read entries of each kind together, then put them into their places: what has not been published yet stands
        all over a shuffled batch, and a gather for each entry between would cost ten times as much."""
        corrupt: list[int] = []
        optional = [name for name in out if name != VALUES]
        for kind in np.unique(kinds):
            members = np.flatnonzero(kinds == kind)
            alike, lacking = self.part(members), _lacking(int(kind), optional)
            rows = row_indices(starts[members], alike.lengths, None)
            here = {n: np.empty((len(rows), *b.shape[1:]), b.dtype) for n, b in out.items() if n not in lacking}
            corrupt += members[alike._read_alike(here, None, verify)].tolist()
            for name, brought in here.items():
                out[name][rows] = brought
        if width is not None:
            pads = np.arange(width) >= self.lengths[:, None]
            for buffer in out.values():
                buffer[: pads.size].reshape(*pads.shape, *buffer.shape[1:])[pads] = 0
        return sorted(corrupt)

    def _read_alike(self, out: Rows, width: int | None, verify: bool) -> list[int]:
        """Read entries that all have the arrays of ``out``, and are all published, or none of them is."""
        if self._pending:
            return self._copy(out, width)
        try:
            return self._gather(out, width, verify)
        except SegmentGoneError:
            raise  # compaction took it: a new snapshot has these entries elsewhere
        except FormatError:
            # A segment is truncated. One by one, so that only its own entries are lost.
            if len(self._keys) == 1:
                return [0]
            starts = offsets_of(self.lengths, width).tolist()
            corrupt = []
            for i, (begin, end) in enumerate(itertools.pairwise(starts)):
                alone = {name: buffer[begin:end] for name, buffer in out.items()}
                if self.part(slice(i, i + 1))._read_alike(alone, width, verify):
                    corrupt.append(i)
            return corrupt

    def _copy(self, out: Rows, width: int | None) -> list[int]:
        position = 0
        for i, tokens in enumerate(self.lengths.tolist()):
            end = position + tokens
            following = end if width is None else position + width
            for name, buffer in out.items():
                buffer[position:end] = self._pending[i][name]
                buffer[end:following] = 0
            position = following
        return []

    def _gather(self, out: Rows, width: int | None, verify: bool) -> list[int]:
        corrupt: list[int] = self._snapshot.gather(self.located, out, width, self._expected(out, verify)).tolist()
        return corrupt

    def _expected(self, out: Mapping[str, Any], verify: bool) -> Expected | None:
        if not verify:
            return None
        extra = self._snapshot.extra_checksums(self.located) if not out.keys() <= set(CHAINED) else None
        return Expected(self._seed, self._keys, self.located.checksums, extra)


def _lacking(kind: int, columns: list[str]) -> list[str]:
    """Return the arrays that entries of a kind do not have (see ``Request._kinds``)."""
    kind = max(kind, ~kind)
    return [name for bit, name in enumerate(columns) if not kind >> bit & 1]

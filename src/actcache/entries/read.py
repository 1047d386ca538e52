"""One batched read: where a batch of keys lies, and its rows, verified while they come in."""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.backend import EXTRAS, TOKEN_IDS, VALUES, EntryLocations, Snapshot
from actcache.entries.writer import Writer
from actcache.errors import FormatError, SegmentGoneError
from actcache.format import checksum
from actcache.format.keys import key_list
from actcache.format.ragged import offsets_of, row_indices

# Look-ups that serve several times: a reader asks for a batch ahead, and for its checksums, and then reads it.

_KEPT = 8  # a few batches ahead of each of several readers
_MOST_KEYS = 1 << 16  # of a batch; more than that is a whole corpus, which is looked up once


class LookupCache:
    """Remembers where the entries of the last batches lie, as long as the snapshot is the same. Thread-safe."""

    def __init__(self) -> None:
        self._kept: deque[tuple[bytes, weakref.ref[Snapshot], EntryLocations]] = deque(maxlen=_KEPT)

    def locate(self, snapshot: Snapshot, keys: NDArray[np.uint8]) -> EntryLocations:
        """Return where the entries of ``[n, 32]`` keys lie."""
        if len(keys) > _MOST_KEYS:
            return snapshot.locate(keys)
        name = xxhash.xxh3_128_digest(keys.data)
        for kept, of, located in tuple(self._kept):
            if kept == name and of() is snapshot:
                return located
        located = snapshot.locate(keys)
        self._kept.append((name, weakref.ref(snapshot), located))
        return located


Rows = dict[str, NDArray[np.generic]]

_MOST_CUTS = 16  # between entries of different kinds in a batch, each of which is another gather
_LOOKS = 5  # each finds what compaction had published by then


class _Refreshed(Protocol):
    def refresh(self) -> None: ...


S = TypeVar("S", bound=_Refreshed)
P = ParamSpec("P")
T = TypeVar("T")


def retry_on_stale_snapshot(read: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Have a read of a space begin again with a new snapshot where a segment of its snapshot is gone."""

    @functools.wraps(read)
    def attempt(space: S, /, *args: P.args, **options: P.kwargs) -> T:
        for _ in range(_LOOKS - 1):
            try:
                return read(space, *args, **options)
            except SegmentGoneError:
                space.refresh()
        return read(space, *args, **options)

    return attempt


class Request:
    """The entries of ``[n, 32]`` keys in a snapshot and in the writer's unpublished blocks, which come first.

    Attributes:
        lengths: ``[n]`` int64 tokens of each entry, 0 where it is absent.
        located: where the published copies lie.
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        writer: Writer | None,
        space_seed: int,
        keys: NDArray[np.uint8],
        ahead: LookupCache | None = None,
    ) -> None:
        self._keys = keys
        self._seed = space_seed
        # The writer first, then the snapshot: a block that is published in between is found twice, not missed.
        self._pending: dict[int, Rows] = {}
        if writer is not None and len(writer):
            found = ((i, writer.rows(key)) for i, key in enumerate(key_list(keys)))
            self._pending = {i: rows for i, rows in found if rows is not None}
        self._snapshot = snapshot()
        self.located = self._snapshot.locate(keys) if ahead is None else ahead.locate(self._snapshot, keys)
        self.lengths = self.located.tokens.copy()
        for i, rows in self._pending.items():
            self.lengths[i] = len(rows[VALUES])

    @property
    def checksums(self) -> NDArray[np.uint64]:
        """Each entry's checksum, ``[n]``, 0 where it is absent or not published yet."""
        checksums = self.located.checksums.copy()
        checksums[list(self._pending)] = 0
        return checksums

    def has(self, column: str) -> NDArray[np.bool_]:
        """Return which entries have a ragged array, ``[n]``."""
        has = self._snapshot.has(column, self.located)
        for i, rows in self._pending.items():
            has[i] = column in rows
        return has

    def read(self, out: Mapping[str, NDArray[np.generic]], width: int | None, *, verify: bool) -> list[int]:
        """Read rows into buffers; return the positions of entries that are corrupt, whose rows mean nothing.

        Args:
            out: name of a ragged array -> buffer in the stored dtype, ``[rows, ...]``. With ``values``, ``token_ids``
                has to be there too (what an entry has no token ids for is left as it is).
            width: None for packed rows, else the rows that each entry takes up.
        """
        count = len(self._keys)
        starts = offsets_of(self.lengths if width is None else np.full(count, width, np.int64))
        kinds = np.ones(count, np.int8)  # 1: with token ids, or absent; 0: without; 2: not published yet
        kinds[~self.has(TOKEN_IDS) & (self.lengths > 0)] = 0
        kinds[list(self._pending)] = 2
        corrupt: list[int] = []
        cuts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), count] if count else []
        if len(cuts) > _MOST_CUTS:
            return self._read_by_kind(kinds, out, width, starts, verify)
        for first, last in itertools.pairwise(cuts):
            here = {name: buffer[starts[first] : starts[last]] for name, buffer in out.items()}
            if kinds[first] == 2:
                self._copy(first, last, here, width)
                continue
            if kinds[first] == 0:
                here.pop(TOKEN_IDS, None)
            corrupt += self._gather(first, last, here, width, verify)
        return corrupt

    def _read_by_kind(
        self,
        kinds: NDArray[np.int8],
        out: Mapping[str, NDArray[np.generic]],
        width: int | None,
        starts: NDArray[np.int64],
        verify: bool,
    ) -> list[int]:
        """Read entries of each kind together, then put them into their places: what has not been published yet stands
        all over a shuffled batch, and a gather for each entry between would cost ten times as much."""
        corrupt: list[int] = []
        for kind in np.unique(kinds):
            which = np.flatnonzero(kinds == kind)
            part = copy.copy(self)
            part._keys, part.located, part.lengths = self._keys[which], self.located[which], self.lengths[which]
            part._pending = {new: self._pending[i] for new, i in enumerate(which.tolist()) if i in self._pending}
            rows = row_indices(starts[which], part.lengths, None)
            names = [name for name in out if kind != 0 or name != TOKEN_IDS]
            here = {name: np.empty((len(rows), *out[name].shape[1:]), out[name].dtype) for name in names}
            corrupt += which[part.read(here, None, verify=verify)].tolist()
            for name, brought in here.items():
                out[name][rows] = brought
        if width is not None:
            pads = np.arange(width) >= self.lengths[:, None]
            for buffer in out.values():
                buffer[: pads.size].reshape(*pads.shape, *buffer.shape[1:])[pads] = 0
        return sorted(corrupt)

    def _copy(self, first: int, last: int, out: Rows, width: int | None) -> None:
        position = 0
        for i in range(first, last):
            end = position + int(self.lengths[i])
            following = end if width is None else position + width
            for name, buffer in out.items():
                if name in self._pending[i]:
                    buffer[position:end] = self._pending[i][name]
                    buffer[end:following] = 0
            position = following

    def _gather(self, first: int, last: int, out: Rows, width: int | None, verify: bool) -> list[int]:
        """Gather the entries first..last-1, which the snapshot has; return which are corrupt."""
        located = self.located[first:last]
        starts = offsets_of(located.tokens if width is None else np.full(last - first, width, np.int64))
        try:
            corrupt = self._gather_checked(first, located, out, width, starts, verify)
        except SegmentGoneError:
            raise  # compaction took it: a new snapshot has these entries elsewhere
        except FormatError:
            # A segment is truncated. One by one, so that only its own entries are lost.
            if last - first == 1:
                return [first]
            corrupt = []
            for i in range(last - first):
                alone = {name: buffer[starts[i] : starts[i + 1]] for name, buffer in out.items()}
                corrupt += self._gather(first + i, first + i + 1, alone, width, verify)
        return sorted(corrupt)

    def _gather_checked(
        self, first: int, located: EntryLocations, out: Rows, width: int | None, starts: NDArray[np.int64], verify: bool
    ) -> list[int]:
        # The small arrays in one go, then the rows, each chunk of which is checked by the thread that brought it.
        small = {name: buffer for name, buffer in out.items() if name != VALUES}
        large = {name: buffer for name, buffer in out.items() if name == VALUES}
        begins, lengths = starts[:-1], located.tokens
        if small:
            self._snapshot.gather(located, small, width, lambda begin, end: None)
        if not verify:
            if large:
                self._snapshot.gather(located, large, width, lambda begin, end: None)
            return []
        if large:
            keys = self._keys[first : first + len(lengths)]
            seeds = checksum.entry_seeds(self._seed, keys, located.tokens, has_token_ids=bool(small)).tolist()
            expected = located.checksums.tolist()
        else:
            seeds, expected = located.checksums.tolist(), self._snapshot.extra_checksums(located).tolist()
        digests = checksum.chain(seeds, [small[name] for name in sorted(small)], begins, lengths)
        chained = checksum.chainer(list(large.values()), begins, lengths)
        corrupt: list[int] = []

        def check(begin: int, end: int) -> None:
            found = chained(begin, digests[begin:end])
            if found != expected[begin:end]:
                for i, digest in enumerate(found, begin):
                    if digest != expected[i] and lengths[i]:
                        corrupt.append(first + i)

        if large:
            self._snapshot.gather(located, large, width, check)
        else:
            check(0, len(lengths))
        return corrupt

    def read_extras(self, i: int) -> tuple[Rows, bool]:
        """Return the optional arrays of entry ``i``, and whether they are intact."""
        if i in self._pending:
            return {name: rows for name, rows in self._pending[i].items() if name in EXTRAS}, True
        located = self.located[i : i + 1]
        names: Sequence[str] = [name for name in sorted(EXTRAS) if self._snapshot.has(name, located)[0]]
        out: Rows = {n: np.empty((int(self.lengths[i]), *EXTRAS[n][1]), EXTRAS[n][0]) for n in names}
        return out, not names or not self._gather(i, i + 1, out, None, True)

"""A mix of rows in memory: read stretch by stretch, each row put where chance wants it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.backend import TOKEN_IDS
from actcache.errors import MissingEntryError, ShapeError
from actcache.format import codec
from actcache.format.keys import key_list
from actcache.format.moments import row_norms
from actcache.format.ragged import offsets_of, runs
from actcache.io.buffers import BufferPool
from actcache.reader.exclusion import Exclusion
from actcache.reader.fetch import OwnSource
from actcache.reader.mixing import Mixes
from actcache.reader.stats import ReaderStats

_PORTION_BYTES = 16 << 20  # read at once
_MOST_SILENT = 16  # portions that are read without an announcement, at most
_AHEAD = 2  # portions whose rows the operating system is asked for before they are read


@dataclass(frozen=True)
class MixedRows:
    """The rows of a mix that are not left out, in random order, ``[count]`` each."""

    values: NDArray[np.generic]  # [count, width], of several sites [count, sites, width], in stored form
    #: What stands beside them, of what was asked for: ``documents`` (positions in the reader's order of documents),
    #: ``positions`` in their documents, ``token_ids``, and columns of the caller's own.
    beside: dict[str, NDArray[Any]]
    memory: NDArray[np.generic]  # that ``values`` are in, as the pool gave it
    head: int  # rows of it before them, which are free

    def __len__(self) -> int:
        return len(self.values)

    def behind(self, rows: NDArray[np.generic], count: int) -> NDArray[np.generic] | None:
        """Return ``rows`` and the first ``count`` of these behind them as one array, where there is room for it: once
        a mix, at most."""
        if len(rows) > self.head:
            return None
        self.memory[self.head - len(rows) : self.head] = rows
        return self.memory[self.head - len(rows) : self.head + count]


@dataclass(frozen=True)
class RowDocuments:
    """What rows are read of: documents in the order in which they lie, at one site or several."""

    sources: Sequence[OwnSource]
    stacked: bool  # whether rows have an axis of sites
    keys: NDArray[np.uint8]  # [n, 32]
    lengths: NDArray[np.int64]  # [n]
    has_ids: bool
    own: tuple[str, ...] = ()  # columns of the caller's own that are read along, of the first site
    mean_norms: NDArray[np.float64] | None = None  # [sites], where rows are chosen by their norms

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return codec.get(self.sources[0].recipe.dtype).stored

    @property
    def row_shape(self) -> tuple[int, ...]:
        recipe = self.sources[0].recipe
        width = codec.get(recipe.dtype).width(recipe.hidden_size)
        return (len(self.sources), width) if self.stacked else (width,)

    @property
    def row_bytes(self) -> int:
        """The bytes of a row, of all sites together."""
        return sum(source.recipe.row_bytes for source in self.sources)

    def norms(self, stored: NDArray[np.generic]) -> NDArray[Any] | None:
        """Return the norms of rows beside the mean ones, ``[n]``, the largest of all sites; None where nobody asks."""
        if self.mean_norms is None:
            return None
        norms = row_norms(stored, self.sources[0].recipe.dtype) / np.where(self.mean_norms > 0, self.mean_norms, 1)
        return norms.reshape(len(stored), -1).max(axis=1) if self.stacked else norms

    def portions(self, members: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Cut documents into portions that are read at once."""
        for run in runs(self.lengths[members] * self.row_bytes, _PORTION_BYTES):
            yield members[run]

    def read_own(self, members: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return the columns of the caller's own of some documents, packed."""
        found = self.sources[0].read_columns(self.keys[members])
        if (found.lengths != self.lengths[members]).any():
            changed = self.keys[members][found.lengths != self.lengths[members]][0].tobytes().hex()
            raise ShapeError(f"document {changed} was replaced by one without these columns: ask for rows anew")
        return {name: found.arrays[name] for name in self.own}

    def read(
        self, site: int, members: NDArray[np.int64], out: NDArray[np.generic], ids: NDArray[np.int32] | None
    ) -> None:
        """Read the rows of some documents at one site, packed.

        Raises:
            MissingEntryError, ShapeError: a document was deleted, or replaced by one of another length.
            CorruptEntryError, StoreError, DataError: see ``Space.read_into``.
        """
        source, keys = self.sources[site], self.keys[members]
        self._read(source, members, lambda: source.read_into(keys, out, token_ids=ids))

    def scatter(
        self,
        site: int,
        members: NDArray[np.int64],
        out: NDArray[np.generic],
        targets: NDArray[np.int64],
        ids: NDArray[np.int32] | None,
    ) -> None:
        """Read the rows of some documents at one site, row j to row ``targets[j]``; their token ids packed. Raises as
        ``read``."""
        source, keys = self.sources[site], self.keys[members]
        self._read(source, members, lambda: source.scatter_into(keys, out, targets, token_ids=ids))

    def _read(self, source: OwnSource, members: NDArray[np.int64], read: Callable[[], Any]) -> None:
        keys, lengths = self.keys[members], self.lengths[members]
        try:
            found = read().lengths
        except ShapeError:
            found = source.lengths(keys)
            if (found == lengths).all():
                raise
        if not found.all():
            gone = key_list(keys[found == 0])
            raise MissingEntryError(
                f"{len(gone)} documents were deleted since these rows were asked for, the first is {gone[0].hex()}: "
                "fill them again, or ask for rows anew",
                gone,
            )
        if (found != lengths).any():
            changed = keys[found != lengths][0].tobytes().hex()
            raise ShapeError(f"document {changed} was replaced by one of another length: ask for rows anew")


class Mixer:
    """Reads mixes and mixes their rows, one mix at a time. Not thread-safe.

    Args:
        wanted: what is to stand beside the rows.
        head: rows for which there is to be room before those of a mix.
    """

    def __init__(
        self,
        documents: RowDocuments,
        exclusion: Exclusion,
        wanted: Container[str],
        buffers: BufferPool,
        head: int,
        stats: ReaderStats,
    ) -> None:
        self._documents, self._exclusion, self._wanted = documents, exclusion, wanted
        self._buffers, self._head, self._stats = buffers, head, stats
        # Portions that are read without an announcement, and those that are left of them.
        self._silent, self._left = 0, 0

    def mix(self, mixes: Mixes, number: int) -> MixedRows:
        """Read and mix the rows of a mix; raises as ``RowDocuments.scatter``."""
        documents, exclusion, stats, head = self._documents, self._exclusion, self._stats, self._head
        start = time.perf_counter()
        members = mixes.documents(number)
        total, sites = int(documents.lengths[members].sum()), len(documents.sources)
        places = mixes.places(number, total)
        memory = self._buffers.take((head + total, *documents.row_shape), documents.dtype)
        try:
            values = memory[head:]
            of_sites = [values[:, site] for site in range(sites)] if documents.stacked else [values]
            ids = np.empty(total, np.int32) if exclusion.needs_ids or TOKEN_IDS in self._wanted else None
            own: list[dict[str, NDArray[Any]]] = []
            portions = list(documents.portions(members))
            bounds = offsets_of(np.array([int(documents.lengths[portion].sum()) for portion in portions], np.int64))
            asked = 1  # the first is read at once
            for i, (begin, end) in enumerate(itertools.pairwise(bounds.tolist())):
                for portion in portions[asked : i + 1 + _AHEAD]:
                    self._announce(portion)
                asked = max(asked, i + 1 + _AHEAD)
                for site, rows in enumerate(of_sites):
                    packed = None if site or ids is None else ids[begin:end]
                    documents.scatter(site, portions[i], rows, places[begin:end], packed)
                if documents.own:
                    own.append(documents.read_own(portions[i]))
        except BaseException:
            self._buffers.give_back(memory, None)
            raise
        read: dict[str, NDArray[Any]] = {} if ids is None else {TOKEN_IDS: ids}
        read |= {name: np.concatenate([one[name] for one in own]) for name in documents.own}
        beside = {name: np.empty_like(array) for name, array in read.items()}
        for name, array in read.items():
            beside[name][places] = array
        beside |= _whereabouts(documents, members, places, exclusion, self._wanted)
        mixed = _without(exclusion, documents, MixedRows(values, beside, memory, head))
        stats.read_seconds += time.perf_counter() - start
        stats.documents += len(members)
        stats.tokens += total
        stats.nbytes += values.nbytes
        return mixed

    def _announce(self, members: NDArray[np.int64]) -> None:
        """Ask for rows of a portion that is read soon. As long as all is in memory, fewer and fewer are announced."""
        if self._left:
            self._left -= 1
            return
        keys = self._documents.keys[members]
        told = [source.read_ahead(keys) for source in self._documents.sources]
        self._silent = 0 if any(told) else min(2 * self._silent + 1, _MOST_SILENT)
        self._left = self._silent


def _whereabouts(
    documents: RowDocuments,
    members: NDArray[np.int64],
    places: NDArray[np.int64],
    exclusion: Exclusion,
    wanted: Container[str],
) -> dict[str, NDArray[np.int64]]:
    """Return of which documents mixed rows are, and their positions there, where somebody asks."""
    lengths, found = documents.lengths[members], dict[str, NDArray[np.int64]]()
    if exclusion or "documents" in wanted:
        found["documents"] = np.empty_like(places)
        found["documents"][places] = np.repeat(members, lengths)
    if exclusion or "positions" in wanted:
        found["positions"] = np.empty_like(places)
        found["positions"][places] = np.arange(len(places)) - np.repeat(offsets_of(lengths)[:-1], lengths)
    return found


def _without(exclusion: Exclusion, documents: RowDocuments, mixed: MixedRows) -> MixedRows:
    """Return mixed rows without those that are left out."""
    if not exclusion:
        return mixed
    beside, values = mixed.beside, mixed.values
    kept = exclusion.kept(
        documents.lengths[beside["documents"]],
        beside["positions"],
        beside.get(TOKEN_IDS),
        documents.norms(values),
        None if exclusion.mask is None else beside[exclusion.mask],
    )
    count = int(kept.sum())
    # Rows from behind fill the holes: few are moved, and their order is as random as before.
    holes = np.flatnonzero(~kept[:count])
    behind = count + np.flatnonzero(kept[count:])
    for array in (values, *beside.values()):
        array[holes] = array[behind]
    some = {name: array[:count] for name, array in beside.items()}
    return MixedRows(values[:count], some, mixed.memory, mixed.head)

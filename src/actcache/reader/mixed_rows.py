"""A mix of rows in memory: read stretch by stretch, each row put where chance wants it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import MissingEntryError, ShapeError
from actcache.format import codec
from actcache.format.keys import key_list
from actcache.format.moments import row_norms
from actcache.format.ragged import offsets_of, runs
from actcache.io import loops
from actcache.io.buffers import BufferPool
from actcache.reader.exclusion import Exclusion
from actcache.reader.fetch import OwnSource
from actcache.reader.mixing import Mixes
from actcache.reader.stats import ReaderStats

_PORTION_BYTES = 4 << 20  # read at once, then mixed while they are in the processor's cache
_MOST_SILENT = 16  # portions that are read without an announcement, at most
_AHEAD = 2  # portions whose rows the operating system is asked for before they are read


@dataclass(frozen=True)
class MixedRows:
    """The rows of a mix that are not left out, in random order, ``[count]`` each."""

    values: NDArray[np.generic]  # [count, width], of several sites [count, sites, width], in stored form
    documents: NDArray[np.int64]  # positions in the reader's order of documents
    positions: NDArray[np.int64]  # in their documents
    token_ids: NDArray[np.int32] | None
    own: dict[str, NDArray[Any]]  # columns of the caller's own
    memory: NDArray[np.generic]  # that ``values`` are in, as the pool gave it

    def __len__(self) -> int:
        return len(self.values)


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
        keys, lengths = self.keys[members], self.lengths[members]
        try:
            found = self.sources[site].read_into(keys, out, token_ids=ids).lengths
        except ShapeError:
            found = self.sources[site].lengths(keys)
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


def mix(
    documents: RowDocuments, mixes: Mixes, number: int, exclusion: Exclusion, buffers: BufferPool, stats: ReaderStats
) -> MixedRows:
    """Read and mix the rows of a mix; raises as ``RowDocuments.read``."""
    start = time.perf_counter()
    members = mixes.documents(number)
    lengths = documents.lengths[members]
    total, sites = int(lengths.sum()), len(documents.sources)
    places = mixes.places(number, total)
    hidden = documents.row_shape[-1]
    memory = buffers.take((total, *documents.row_shape), documents.dtype)
    try:
        flat = memory.reshape(total * sites, hidden)
        read_ids = np.empty(total, np.int32) if documents.has_ids else None
        portions = list(documents.portions(members))
        bounds = offsets_of(np.array([int(documents.lengths[portion].sum()) for portion in portions], np.int64))
        own: list[dict[str, NDArray[Any]]] = []
        staging = np.empty((int(np.diff(bounds).max()), hidden), documents.dtype)
        asked, silent, next_asked = 0, 0, 0
        for i, (begin, end) in enumerate(itertools.pairwise(bounds.tolist())):
            while asked < min(i + 1 + _AHEAD, len(portions)):
                # As long as all is in memory, fewer and fewer portions are announced.
                if asked >= next_asked:
                    silent = 0 if _announce(documents, portions[asked]) else min(silent + 1, _MOST_SILENT)
                    next_asked = asked + 1 + silent
                asked += 1
            for site in range(sites):
                rows = staging[: end - begin]
                documents.read(site, portions[i], rows, None if read_ids is None else read_ids[begin:end])
                where = places[begin:end] if sites == 1 else places[begin:end] * sites + site
                loops.scatter(rows, where, flat)
            if documents.own:
                own.append(documents.read_own(portions[i]))
    except BaseException:
        buffers.give_back(memory, None)
        raise
    joined = {name: np.concatenate([one[name] for one in own]) for name in documents.own}
    mixed = _beside(documents, members, places, read_ids, joined, memory, exclusion)
    stats.read_seconds += time.perf_counter() - start
    stats.documents += len(members)
    stats.tokens += total
    stats.nbytes += memory.nbytes
    return mixed


def _announce(documents: RowDocuments, members: NDArray[np.int64]) -> bool:
    """Ask for what is read soon; return whether there seemed to be anything to ask for."""
    return bool(sum(source.read_ahead(documents.keys[members]) for source in documents.sources))


def _beside(
    documents: RowDocuments,
    members: NDArray[np.int64],
    places: NDArray[np.int64],
    read_ids: NDArray[np.int32] | None,
    read_own: dict[str, NDArray[Any]],
    memory: NDArray[np.generic],
    exclusion: Exclusion,
) -> MixedRows:
    """Put what stands beside the rows into their order, and leave out what is excluded."""
    lengths = documents.lengths[members]
    where, positions = np.empty_like(places), np.empty_like(places)
    where[places] = np.repeat(members, lengths)
    positions[places] = np.arange(len(places)) - np.repeat(offsets_of(lengths)[:-1], lengths)
    ids = None
    if read_ids is not None:
        ids = np.empty_like(read_ids)
        ids[places] = read_ids
    own = {name: np.empty_like(array) for name, array in read_own.items()}
    for name, array in read_own.items():
        own[name][places] = array
    if not exclusion:
        return MixedRows(memory, where, positions, ids, own, memory)
    mask = None if exclusion.mask is None else own[exclusion.mask]
    kept = exclusion.kept(documents.lengths[where], positions, ids, documents.norms(memory), mask)
    count = int(kept.sum())
    # Rows from behind fill the holes: few are moved, and their order is as random as before.
    holes = np.flatnonzero(~kept[:count])
    behind = count + np.flatnonzero(kept[count:])
    for array in (memory, where, positions, *(() if ids is None else (ids,)), *own.values()):
        array[holes] = array[behind]
    own = {name: array[:count] for name, array in own.items()}
    ids = None if ids is None else ids[:count]
    return MixedRows(memory[:count], where[:count], positions[:count], ids, own, memory)

"""Checksums that bind an entry's rows to its key and its space.

Over rows alone, two entries that swapped their keys would pass. An entry's checksum is a chain of XXH3-64 one-shot
digests, each the seed of the next: token ids (where there are any), then rows. The first seed mixes the space's
fingerprint, stored dtype and hidden size with the whole key, the number of tokens and whether there are token ids.
docs/format.md gives the chain in a form that needs no actcache, and a test implements it from there.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.format.ragged import EXTRAS, OWN, TOKEN_IDS, VALUES, offsets_of
from actcache.io import loops
from actcache.io.loops import Column, Digests

_HAS_TOKEN_IDS = 0x5851F42D4C957F2D

#: The ragged arrays in the order of their chains: the others have a checksum of their own.
CHAINED = (TOKEN_IDS, VALUES)
ORDER = (*CHAINED, *sorted((*EXTRAS, OWN)))


def space_seed(fingerprint: str, dtype: str, hidden_size: int) -> int:
    """Return the seed that binds entries to their space."""
    return int(xxhash.xxh3_64_intdigest(f"{fingerprint} {dtype} {hidden_size}".encode()))


def chain_seed(space: int, names: Container[str]) -> int:
    """Return what the keys are mixed into, of a space's ``space_seed``, where these ragged arrays are read."""
    return space ^ (_HAS_TOKEN_IDS if TOKEN_IDS in names else 0)


@dataclass(frozen=True)
class Expected:
    """What the digests of a batch's entries have to be; every backend's ``gather`` is given one. Thread-safe."""

    space: int  # ``space_seed``
    keys: NDArray[np.uint8]  # [n, 32]
    checksums: NDArray[np.uint64]  # [n]
    extra_checksums: NDArray[np.uint64] | None = None  # [n], where optional arrays are read

    def __getitem__(self, which: slice | NDArray[np.int64]) -> Expected:
        """Return what is expected of some of the entries."""
        more = None if self.extra_checksums is None else self.extra_checksums[which]
        return Expected(self.space, np.ascontiguousarray(self.keys[which]), self.checksums[which], more)

    def digests(self, names: Sequence[str]) -> Digests:
        """Return the digests to make where these ragged arrays are read, named in their ``ORDER``."""
        chained = sum(name in CHAINED for name in names)
        seed = chain_seed(self.space, names)
        more = None if chained == len(names) else self.extra_checksums
        return Digests(chained, seed, self.keys, expected=self.checksums, expected_more=more)

    def wrong(
        self, out: Mapping[str, NDArray[np.generic]], lengths: NDArray[np.int64], width: int | None
    ) -> NDArray[np.int64]:
        """Return the positions of entries that are not what they should be, once all rows of a batch are in place.

        For backends that do not read by ``loops.gather``, which compares while rows are in the processor's cache.
        """
        lengths, starts = np.ascontiguousarray(lengths, np.int64), offsets_of(lengths, width)
        columns = [in_place(buffer, starts[:-1]) for buffer in out.values()]
        return loops.gather(columns, lengths, starts, self.digests(list(out)))


def in_place(rows: NDArray[np.generic], begins: NDArray[np.int64]) -> Column:
    """Return a column whose rows are digested where they are: C-contiguous ones, entry i from row ``begins[i]`` on."""
    return Column(rows.strides[0], memory=rows, begins=begins * rows.strides[0])


def entry_checksums(
    space: int,
    keys: NDArray[np.uint8],
    begins: NDArray[np.int64],
    lengths: NDArray[np.int64],
    columns: Mapping[str, NDArray[np.generic]],
) -> tuple[NDArray[np.uint64], NDArray[np.uint64] | None]:
    """Return the checksums of entries, ``[n]``, and those of their optional arrays; None where there are none.

    Args:
        keys: ``[n, 32]``.
        begins, lengths: ``[n]``, which rows of the columns are each entry's.
        columns: the ragged arrays by name, C-contiguous, in stored form.
    """
    names = [name for name in ORDER if name in columns]
    chained = sum(name in CHAINED for name in names)
    seed = space ^ (_HAS_TOKEN_IDS if TOKEN_IDS in names else 0)
    sums = np.zeros(len(keys), np.uint64)
    more = np.zeros(len(keys), np.uint64) if chained < len(names) else None
    digests = Digests(chained, seed, np.ascontiguousarray(keys), sums=sums, more=more)
    sources = [in_place(np.ascontiguousarray(columns[name]), begins) for name in names]
    loops.gather(sources, np.ascontiguousarray(lengths, np.int64), offsets_of(lengths), digests)
    return sums, more

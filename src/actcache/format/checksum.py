"""Checksums that bind an entry's rows to its key and its space.

Over rows alone, two entries that swapped their keys would pass. An entry's checksum is a chain of XXH3-64 one-shot
digests, each the seed of the next: token ids (where there are any), then rows. The first seed mixes the space's
fingerprint, stored dtype and hidden size with the whole key, the number of tokens and whether there are token ids.
docs/format.md gives the chain in a form that needs no actcache, and a test implements it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.format.ragged import EXTRAS, TOKEN_IDS, VALUES

_digest = xxhash.xxh3_64_intdigest

# Odd 64-bit constants (the primes of XXH64), one for each word that is mixed in.
_PRIMES = np.array(
    [0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5], np.uint64
)
_HAS_TOKEN_IDS = 0x5851F42D4C957F2D


def space_seed(fingerprint: str, dtype: str, hidden_size: int) -> int:
    """Return the seed that binds entries to their space."""
    return int(_digest(f"{fingerprint} {dtype} {hidden_size}".encode()))


def entry_seeds(
    space: int, keys: NDArray[np.uint8], lengths: NDArray[np.int64], *, has_token_ids: bool
) -> NDArray[np.uint64]:
    """Return the first seed of each entry's chain, ``[n]``, from ``[n, 32]`` keys and ``[n]`` lengths."""
    words = np.ascontiguousarray(keys).view("<u8").astype(np.uint64, copy=False)
    mixed: NDArray[np.uint64] = np.bitwise_xor.reduce(words * _PRIMES[:4], axis=1)
    mixed ^= lengths.astype(np.uint64) * _PRIMES[4]
    mixed ^= np.uint64(space ^ (_HAS_TOKEN_IDS if has_token_ids else 0))
    return mixed


def entry_checksums(
    space: int,
    keys: NDArray[np.uint8],
    begins: NDArray[np.int64],
    lengths: NDArray[np.int64],
    columns: Mapping[str, NDArray[np.generic]],
) -> tuple[NDArray[np.uint64], NDArray[np.uint64] | None]:
    """Return the checksums of entries, ``[n]``, and those of their optional arrays; None where there are none.

    Args:
        space: see ``space_seed``.
        keys: ``[n, 32]``.
        begins, lengths: ``[n]``, which rows of the columns are each entry's.
        columns: the ragged arrays by name, C-contiguous, in stored form.
    """
    seeds = entry_seeds(space, keys, lengths, has_token_ids=TOKEN_IDS in columns)
    sums = chain(seeds.tolist(), [columns[name] for name in (TOKEN_IDS, VALUES) if name in columns], begins, lengths)
    extras = [columns[name] for name in sorted(EXTRAS) if name in columns]
    more = np.array(chain(sums, extras, begins, lengths), np.uint64) if extras else None
    return np.array(sums, np.uint64), more


def chain(
    seeds: Sequence[int],
    columns: Sequence[NDArray[np.generic]],
    begins: NDArray[np.int64],
    lengths: NDArray[np.int64],
) -> list[int]:
    """Return each entry's digest over its rows of ``columns``, in their order.

    Args:
        seeds: the first seed of each entry.
        columns: C-contiguous arrays that share their first axis.
        begins, lengths: which rows of them are the entry's.

    The digests free the GIL, so threads can share a batch.
    """
    return chainer(columns, begins, lengths)(0, seeds)


def chainer(
    columns: Sequence[NDArray[np.generic]], begins: NDArray[np.int64], lengths: NDArray[np.int64]
) -> Callable[[int, Sequence[int]], list[int]]:
    """Return ``chain`` for runs of neighbouring entries: a function of the first one and the seeds of the run."""
    places = [
        (
            column.reshape(-1).view(np.uint8).data,
            (begins * column.strides[0]).tolist(),
            ((begins + lengths) * column.strides[0]).tolist(),
        )
        for column in columns
    ]

    def run(first: int, seeds: Sequence[int]) -> list[int]:
        digests, part = list(seeds), slice(first, first + len(seeds))
        for data, starts, ends in places:
            # One comprehension a column: for short documents the loop around the digest is what costs.
            digests = [_digest(data[i:j], seed) for i, j, seed in zip(starts[part], ends[part], digests, strict=True)]
        return digests

    return run

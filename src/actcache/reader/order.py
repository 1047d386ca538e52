"""The order of an epoch: pure functions of (seed, epoch, lengths), planned for all ranks and then dealt out.

An epoch is a sequence of documents, cut into batches. A round is one batch for each rank. Rounds are cut one after the
other, each by what is left alone, so that an epoch can be taken up again at any round, by another number of ranks too.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from actcache.format.arguments import truth, whole

_POOL_BATCHES = 64  # documents of like length are looked for among so many batches' worth: random, and little padding


@dataclass(frozen=True)
class Order:
    """How documents follow each other; ``UsageError`` where a number or truth value is none."""

    batch_size: int  # documents of a batch at most
    max_tokens: int | None = None  # of a batch as it is padded, at most (a longer document is alone); None: no limit
    shuffle: bool = False  # whether the order is random
    bucket: bool = False  # whether documents of like length share batches
    seed: int = 0
    drop_last: bool = False  # whether a last round that is not full is left out
    # Whether documents of different lengths share no batch. Not printed where it is not so, for the digest's sake.
    equal_lengths: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        # As Python's own: the digest of an order is made from how it prints.
        for name in ("shuffle", "bucket", "drop_last", "equal_lengths"):
            object.__setattr__(self, name, truth(name, getattr(self, name)))
        for name, least in (("batch_size", 1), ("seed", 0), ("max_tokens", 1)):
            if name != "max_tokens" or self.max_tokens is not None:
                object.__setattr__(self, name, whole(name, getattr(self, name), least))

    def digest(self, keys: NDArray[np.uint8], lengths: NDArray[np.int64]) -> str:
        """Return what identifies the order that documents of these keys and lengths come in, in all epochs."""
        digest = hashlib.blake2b(repr(self).encode(), digest_size=16, person=b"actcache/reader")
        digest.update(np.ascontiguousarray(keys).data)
        if self.equal_lengths:
            digest.update(b"equal lengths")
        if self.bucket or self.max_tokens or self.equal_lengths:
            digest.update(np.ascontiguousarray(lengths).data)
        return digest.hexdigest()

    def of_epoch(self, lengths: NDArray[np.int64], epoch: int) -> EpochOrder:
        """Return the order of an epoch over documents of these lengths in tokens."""
        count = len(lengths)
        rng = np.random.default_rng([self.seed, epoch])
        sequence = rng.permutation(count) if self.shuffle else np.arange(count)
        if self.equal_lengths:
            return self._by_length(sequence, lengths, rng)
        if not self.bucket:
            return EpochOrder(sequence, self._cut(lengths[sequence]), self)
        # Sorted inside of pools (without shuffling, as a whole); then the batches of all pools change places.
        pool = _POOL_BATCHES * self.batch_size if self.shuffle else max(count, 1)
        parts = (sequence[start : start + pool] for start in range(0, count, pool))
        pools = [part[np.argsort(lengths[part], kind="stable")] for part in parts]
        batches = [part[begin:end] for part in pools for begin, end in itertools.pairwise(self._cut(lengths[part]))]
        if self.shuffle and batches:
            full = [batch for batch in batches if self.max_tokens or len(batch) == self.batch_size]
            rest = [batch for batch in batches if not (self.max_tokens or len(batch) == self.batch_size)]
            batches = [full[i] for i in rng.permutation(len(full))] + rest
        sequence = np.concatenate([np.empty(0, np.int64), *batches])
        return EpochOrder(sequence, np.cumsum([0, *map(len, batches)]), self)

    def _by_length(
        self, sequence: NDArray[np.int64], lengths: NDArray[np.int64], rng: np.random.Generator
    ) -> EpochOrder:
        """Return batches of documents of one length each; those that are not full come last."""
        order = sequence[np.argsort(lengths[sequence], kind="stable")]
        ends = np.flatnonzero(np.diff(lengths[order])) + 1
        batches = [
            group[begin:end]
            for group in np.split(order, ends)
            for begin, end in itertools.pairwise(self._cut(lengths[group]))
        ]
        full = [batch for batch in batches if self.max_tokens or len(batch) == self.batch_size]
        rest = [batch for batch in batches if not (self.max_tokens or len(batch) == self.batch_size)]
        if self.shuffle:
            full = [full[i] for i in rng.permutation(len(full))]
        batches = full + rest
        sequence = np.concatenate([np.empty(0, np.int64), *batches])
        return EpochOrder(sequence, np.cumsum([0, *map(len, batches)]), self)

    def _cut(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where batches begin and end in a sequence of documents of these lengths, ``[batches + 1]``."""
        count = len(lengths)
        if self.max_tokens is None:
            return np.unique(np.r_[np.arange(0, count, self.batch_size), count])
        cuts, begin, longest = [0], 0, 0
        for i, length in enumerate(lengths.tolist()):
            longest = max(longest, length)
            if i > begin and (longest * (i + 1 - begin) > self.max_tokens or i - begin == self.batch_size):
                cuts.append(i)
                begin, longest = i, length
        return np.array([*cuts, count] if count else [0], np.int64)


@dataclass(frozen=True)
class EpochOrder:
    """An epoch's documents in their order, ``sequence`` [n], and where its batches begin and end, ``cuts``."""

    sequence: NDArray[np.int64]
    cuts: NDArray[np.int64]
    order: Order

    def rounds(self, ranks: int, start: int = 0) -> Iterator[list[tuple[int, int]]]:
        """Yield each round: one ``(begin, end)`` of ``sequence`` for each rank, none of them empty.

        Every document from ``start`` on comes once; the last round is split smaller. Where fewer documents than ranks
        would be left for it, the round before leaves it some; and where even then there are not enough, one round takes
        a document more in some batches. ``ValueError``: fewer documents are left than there are ranks.
        """
        end = len(self.sequence)
        if start < end < start + ranks and not self.order.drop_last:
            raise ValueError(f"{end - start} documents are left for {ranks} ranks")
        while start < end:
            bounds = [start, *self.cuts[np.searchsorted(self.cuts, start, "right") :][:ranks].tolist()]
            batches = list(itertools.pairwise(bounds))
            left = end - bounds[-1]
            if self.order.drop_last:
                full = self.order.batch_size
                if len(batches) < ranks or (not self.order.max_tokens and any(j - i < full for i, j in batches)):
                    return
            elif len(batches) < ranks or 0 < left < ranks:
                # Near the end: either all that is left, or all but one document a rank.
                take = end - start if left == 0 or end - start < 2 * ranks else end - start - ranks
                batches = self._spread(start, start + take, ranks)
            yield batches
            start = batches[-1][1]

    def _spread(self, start: int, end: int, ranks: int) -> list[tuple[int, int]]:
        """Cut a part of the sequence into one batch a rank, inside of the planned batches where these suffice."""
        inner = self.cuts[(self.cuts > start) & (self.cuts < end)].tolist()
        batches = list(itertools.pairwise([start, *inner, end]))
        while len(batches) < ranks:  # halve the one with most documents
            largest = max(range(len(batches)), key=lambda i: batches[i][1] - batches[i][0])
            begin, stop = batches[largest]
            middle = (begin + stop + 1) // 2
            batches[largest : largest + 1] = [(begin, middle), (middle, stop)]
        while len(batches) > ranks:  # join the two neighbours that are smallest together
            sizes = [batches[i + 1][1] - batches[i][0] for i in range(len(batches) - 1)]
            smallest = sizes.index(min(sizes))
            batches[smallest : smallest + 2] = [(batches[smallest][0], batches[smallest + 1][1])]
        return batches

"""The vocabulary that a corpus uses: how often each token occurs, and which are kept though they do not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from actcache.errors import UsageError


@dataclass(frozen=True)
class Vocabulary:
    """Token counts of a corpus. Immutable.

    Args:
        counts: ``[n]`` int64: how often each token id occurs; ids of ``n`` and more do not.
        always: ids to keep though they do not occur (special tokens, canaries).
        documents: how many documents were counted.
        tokenizer: names tokens in errors; None where it is not at hand.
    """

    counts: NDArray[np.int64]
    always: NDArray[np.int64]
    documents: int = 0
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, ids: Iterable[int] | NDArray[np.integer]) -> Vocabulary:
        """Return the vocabulary of given token ids, each counted as often as it stands there.

        Raises:
            UsageError: they are no token ids.
        """
        return cls(count_ids(np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))), np.empty(0, np.int64))

    @property
    def ids(self) -> NDArray[np.int64]:
        """``[kept]``: ids that occur or are always kept, ascending."""
        return np.union1d(np.flatnonzero(self.counts), self.always)

    @property
    def tokens(self) -> int:
        """Tokens that were counted, each occurrence."""
        return int(self.counts.sum())

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, token_id: object) -> bool:
        return isinstance(token_id, int | np.integer) and bool(np.isin(token_id, self.ids))

    def __or__(self, other: Vocabulary) -> Vocabulary:
        """Return the vocabulary of two corpora of one tokenizer together."""
        counts = np.zeros(max(len(self.counts), len(other.counts)), np.int64)
        for one in (self, other):
            counts[: len(one.counts)] += one.counts
        always = np.union1d(self.always, other.always)
        return Vocabulary(counts, always, self.documents + other.documents, self.tokenizer or other.tokenizer)

    def __repr__(self) -> str:
        return f"<Vocabulary: {len(self)} ids kept, {self.tokens} tokens of {self.documents} documents>"


def count_ids(ids: NDArray[Any]) -> NDArray[np.int64]:
    """Return how often each id stands in an array.

    Raises:
        UsageError: they are no token ids.
    """
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0):
        raise UsageError("token ids are integers from 0 on")
    return np.bincount(ids.ravel().astype(np.int64)).astype(np.int64)

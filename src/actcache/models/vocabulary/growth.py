"""How the vocabulary that a corpus uses grows with the corpus: what pruning will save of one that is not at hand.

Heaps' law: of n tokens there are K n^beta different ones. A tokenizer has no more than its size, S, so what grows so is
here -S log(1 - v/S) of v different ones, which is v itself while v is small, and leads to S and no further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedTokenizerBase

from actcache.errors import UsageError
from actcache.format.arguments import whole
from actcache.format.keys import Document
from actcache.models.tokenizing import DocumentEncoder


@dataclass(frozen=True)
class Growth:
    """A fitted law of growth. Immutable.

    Args:
        scale, exponent: K and beta.
        size: of the vocabulary; None for Heaps' law as it is, without an end.
    """

    scale: float
    exponent: float
    size: int | None = None

    @classmethod
    def fit(cls, tokens: ArrayLike, used: ArrayLike, size: int | None = None) -> Growth:
        """Return the law that is nearest to what was counted, by least squares of logarithms.

        Args:
            tokens: ``[n]`` of samples of a corpus, two different numbers at least.
            used: ``[n]`` different tokens of each sample; fewer than ``size``.

        Raises:
            UsageError: the numbers are no such counts.
        """
        n, v = np.asarray(tokens, np.float64), np.asarray(used, np.float64)
        if n.shape != v.shape or n.ndim != 1 or len(np.unique(n)) < 2 or not (n > 0).all() or not (v > 0).all():
            raise UsageError(
                "growth is fitted to two or more different numbers of tokens, and as many of different ones"
            )
        if (v > n).any() or (size is not None and (v >= size).any()):
            raise UsageError(f"of n tokens n are different at most, and fewer than the vocabulary's {size}")
        grown = v if size is None else -size * np.log1p(-v / size)
        exponent, scale = np.polyfit(np.log(n), np.log(grown), 1)
        return cls(float(np.exp(scale)), float(exponent), size)

    def used(self, tokens: ArrayLike) -> NDArray[np.float64]:
        """Return how many different tokens to expect of so many; float64 of the same shape."""
        n = np.asarray(tokens, np.float64)
        grown = self.scale * n**self.exponent
        return grown if self.size is None else -self.size * np.expm1(-grown / self.size)


def grown_vocabulary(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, points: int = 12, *, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return tokens and different tokens, ``[points]`` int64 each, of ever larger parts of a corpus in random order.

    Parts grow by the same factor each; the last one is the corpus. Special tokens are not counted.

    Raises:
        UsageError: there are fewer than two points, or fewer documents than that.
        DocumentError: a document makes no tokens; it names its position.
    """
    points, seed = whole("points", points, 2), whole("seed", seed, 0)
    if len(documents) < points:
        raise UsageError(f"{len(documents)} documents are too few for {points} parts of them")
    order = np.random.default_rng(seed).permutation(len(documents))
    encoder = DocumentEncoder(tokenizer, special_tokens=False)
    encoded = encoder.encode([documents[i] for i in order], order.tolist())
    ids = np.concatenate([window.token_ids for windows in encoded for window in windows])
    lengths = np.array([sum(window.length for window in windows) for windows in encoded], np.int64)
    ends = np.cumsum(lengths)
    counts = np.unique(np.geomspace(max(1, len(documents) // 2 ** (points - 1)), len(documents), points).round())
    tokens = ends[counts.astype(np.int64) - 1]
    first = np.zeros(len(ids), bool)
    first[np.unique(ids, return_index=True)[1]] = True  # where each token stands for the first time
    return tokens, np.cumsum(first)[tokens - 1].astype(np.int64)

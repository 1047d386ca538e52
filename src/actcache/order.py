"""The order of an epoch: a pure function of (seed, epoch, number of documents)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def batches(
    count: int, batch_size: int, *, shuffle: bool, seed: int, epoch: int, drop_last: bool
) -> list[NDArray[np.int64]]:
    """Return the positions of each batch's documents, each of ``range(count)`` once (``drop_last``: at most once)."""
    order = np.random.default_rng([seed, epoch]).permutation(count) if shuffle else np.arange(count)
    end = count - count % batch_size if drop_last else count
    return [order[start : start + batch_size] for start in range(0, end, batch_size)]

"""litdata: chunks of 64 MB made by ``optimize``, read by its ``StreamingDataLoader`` with its own shuffle.

The rows of a document are one flat array, for which it has an encoding without a header.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from litdata import StreamingDataLoader, StreamingDataset, optimize

from actcache.admin.benchmark.corpus import Documents
from bench.peers.loading import Loader, Wanted

PACKAGES = ("litdata",)


class _Document:
    """What ``optimize`` calls for each input, in a process of its own."""

    def __init__(self, documents: list[np.ndarray]) -> None:
        self._documents = documents

    def __call__(self, position: int) -> np.ndarray:
        return self._documents[position].reshape(-1)


def write(documents: Documents, folder: Path) -> None:
    optimize(
        _Document(documents.split()),
        inputs=list(range(len(documents.lengths))),
        output_dir=str(folder),
        chunk_bytes="64MB",
        num_workers=1,
        start_method="fork",
        verbose=False,
    )


def ways(folder: Path, count: int, wanted: Wanted, workers: int) -> dict[str, Callable[[], Loader]]:
    return {"streaming": partial(_open, folder, wanted, workers)}


def _open(folder: Path, wanted: Wanted, workers: int) -> Loader:
    dataset = StreamingDataset(str(folder), shuffle=True, drop_last=False)
    keep = {"persistent_workers": True} if workers and wanted.persistent else {}
    options = {"batch_size": wanted.batch, "num_workers": workers, "collate_fn": wanted.collate, **keep}
    loaders = [StreamingDataLoader(dataset, **options)]
    return Loader(lambda number: loaders[0], loaders.clear)

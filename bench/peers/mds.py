"""mosaicml-streaming: MDS shards, with the rows of a document as ``bytes``, the cheapest of its encodings.

``streaming`` is its ``StreamingDataset`` with its own shuffle, over shards that lie here already; ``local`` is its
``LocalDataset``, whose documents the ``DataLoader`` shuffles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from streaming import LocalDataset, MDSWriter, StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from torch.utils.data import DataLoader

from actcache.admin.benchmark.corpus import Documents
from bench.peers.loading import Delivered, Loader, Wanted, torch_loader

PACKAGES = ("mosaicml-streaming",)


def write(documents: Documents, folder: Path) -> None:
    with MDSWriter(out=str(folder), columns={"rows": "bytes"}) as writer:
        for rows in documents.split():
            writer.write({"rows": rows.tobytes()})


def ways(folder: Path, count: int, wanted: Wanted, workers: int) -> dict[str, Callable[[], Loader]]:
    return {
        "streaming": partial(_open_streaming, folder, wanted, workers),
        "local": partial(_open_local, folder, wanted, workers),
    }


def _open_streaming(folder: Path, wanted: Wanted, workers: int) -> Loader:
    clean_stale_shared_memory()
    datasets = [StreamingDataset(local=str(folder), shuffle=True, batch_size=wanted.batch)]
    keep = {"persistent_workers": True} if workers and wanted.persistent else {}
    collate = partial(_collate, wanted)
    loaders = [DataLoader(datasets[0], batch_size=wanted.batch, num_workers=workers, collate_fn=collate, **keep)]

    def close() -> None:
        loaders.clear()
        datasets.clear()

    return Loader(lambda number: loaders[0], close)


def _open_local(folder: Path, wanted: Wanted, workers: int) -> Loader:
    dataset = LocalDataset(str(folder))
    return torch_loader(dataset, wanted, workers, batched=False, collate=partial(_collate, wanted))


def _collate(wanted: Wanted, documents: list[dict[str, Any]]) -> Delivered:
    return wanted.collate([np.frombuffer(document["rows"], np.float16) for document in documents])

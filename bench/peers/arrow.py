"""Hugging Face datasets: an Arrow table on disk, mapped, with one list of float16 a document.

``torch`` is what its page "Use with PyTorch" shows: ``with_format("torch")`` in a ``DataLoader``. ``numpy`` and
``arrow`` ask for a whole batch at once, ``dataset[[...]]``; of an Arrow batch the rows are one array already.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from actcache.admin.benchmark.corpus import Documents
from bench.peers.loading import Delivered, Loader, Wanted, torch_loader

PACKAGES = ("datasets", "pyarrow")
_CHUNK = 1000  # documents, which is what its writer makes


def write(documents: Documents, folder: Path) -> None:
    datasets.disable_progress_bars()
    hidden, split = documents.shape.hidden, documents.split()
    chunks = []
    for start in range(0, len(split), _CHUNK):
        some = split[start : start + _CHUNK]
        offsets = np.concatenate([[0], np.cumsum([len(rows) * hidden for rows in some])]).astype(np.int32)
        chunks.append(pa.ListArray.from_arrays(offsets, np.concatenate(some).reshape(-1)))
    datasets.Dataset(pa.table({"rows": pa.chunked_array(chunks)})).save_to_disk(str(folder))


def ways(folder: Path, count: int, wanted: Wanted, workers: int) -> dict[str, Callable[[], Loader]]:
    return {how: partial(_open, folder, wanted, workers, how) for how in ("torch", "numpy", "arrow")}


def _open(folder: Path, wanted: Wanted, workers: int, how: str) -> Loader:
    options = {"dtype": torch.float16} if how == "torch" else {}
    dataset = datasets.load_from_disk(str(folder)).with_format(how, **options)
    collate = {"torch": _of_documents, "numpy": _of_arrays, "arrow": _of_table}[how]
    return torch_loader(dataset, wanted, workers, batched=how != "torch", collate=partial(collate, wanted))


def _of_documents(wanted: Wanted, documents: list[dict[str, Any]]) -> Delivered:
    return wanted.collate([document["rows"].numpy() for document in documents])


def _of_arrays(wanted: Wanted, batch: dict[str, Any]) -> Delivered:
    return wanted.collate(batch["rows"])


def _of_table(wanted: Wanted, batch: pa.Table) -> Delivered:
    rows = batch["rows"].combine_chunks()
    lengths = np.diff(rows.offsets.to_numpy()).astype(np.int64) // wanted.hidden
    return wanted.joined(rows.flatten().to_numpy(), lengths)

"""torch's ``DataLoader`` over one ``.npy`` file a document."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from actcache.admin.benchmark.corpus import Documents
from bench.peers.loading import Loader, Wanted, torch_loader

PACKAGES = ("torch",)


class Files(Dataset[np.ndarray]):
    def __init__(self, folder: Path, count: int) -> None:
        self._paths = [str(path) for path in sorted(folder.glob("*/*.npy"))]
        if len(self._paths) != count:
            raise RuntimeError(f"{len(self._paths)} files, and {count} documents")

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, position: int) -> np.ndarray:
        return np.load(self._paths[position])


def write(documents: Documents, folder: Path) -> None:
    for i, rows in enumerate(documents.split()):
        path = folder / f"{i // 1000:04}" / f"{i:08}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, rows)


def ways(folder: Path, count: int, wanted: Wanted, workers: int) -> dict[str, Callable[[], Loader]]:
    return {"a file a document": partial(_open, folder, count, wanted, workers)}


def _open(folder: Path, count: int, wanted: Wanted, workers: int) -> Loader:
    return torch_loader(Files(folder, count), wanted, workers, batched=False, collate=wanted.collate)

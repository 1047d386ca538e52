"""LMDB as it is: one value a document.

``document`` is what most data sets over LMDB do: ``__getitem__`` reads one document, a ``DataLoader`` makes batches.

The others have a read transaction a batch, look at values where they are mapped, and copy them once, into the batch:
``get`` asks for document after document, ``getmulti`` for a batch in one call; with ``readahead=False`` the kernel is
told that reads are random.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from torch.utils.data import Dataset

from actcache.admin.benchmark.corpus import Documents
from bench.peers.loading import Delivered, Loader, Wanted, torch_loader

PACKAGES = ("lmdb",)
_WAYS = ("document", "get", "getmulti", "get readahead=False")


class Values(Dataset[Any]):
    """Delivers whole batches; each process opens the environment for itself."""

    def __init__(self, folder: Path, count: int, wanted: Wanted, how: str) -> None:
        self._folder, self._wanted, self._how, self._count = folder, wanted, how, count
        self._environment: Any = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, positions: list[int]) -> Delivered:
        if self._environment is None:
            self._open()
        keys = [_key(position) for position in positions]
        with self._environment.begin(buffers=True) as transaction:
            if "getmulti" in self._how:
                with transaction.cursor() as cursor:
                    values = [value for _, value in cursor.getmulti(keys)]
            else:
                values = [transaction.get(key) for key in keys]
            arrays = [np.frombuffer(value, np.float16) for value in values]
            batch = self._wanted.collate(arrays)
            del arrays, values  # views of the map, which have to be gone before the transaction is
        return batch

    def _open(self) -> None:
        readahead = "readahead=False" not in self._how
        self._environment = lmdb.open(str(self._folder), readonly=True, lock=False, readahead=readahead)

    def close(self) -> None:
        if self._environment is not None:
            self._environment.close()
            self._environment = None


class Singly(Values):
    """Delivers document after document."""

    def __getitem__(self, position: int) -> np.ndarray:  # type: ignore[override]
        if self._environment is None:
            self._open()
        with self._environment.begin() as transaction:
            return np.frombuffer(transaction.get(_key(position)), np.float16)


def _key(position: int) -> bytes:
    return position.to_bytes(4, "big")


def write(documents: Documents, folder: Path) -> None:
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2 * documents.nbytes + (64 << 20)) as environment:
        for start in range(0, len(documents.lengths), 1000):
            with environment.begin(write=True) as transaction:
                for i, rows in enumerate(documents.split()[start : start + 1000], start):
                    transaction.put(_key(i), rows.tobytes(), append=True)


def ways(folder: Path, count: int, wanted: Wanted, workers: int) -> dict[str, Callable[[], Loader]]:
    return {how: partial(_open, folder, count, wanted, workers, how) for how in _WAYS}


def _open(folder: Path, count: int, wanted: Wanted, workers: int, how: str) -> Loader:
    # A process cannot open a file twice, nor a fork's child what its parent has open: each has a copy.
    named = folder / f"{how}-{workers}"
    if not named.exists():
        named.mkdir()
        shutil.copy(folder / "data.mdb", named)
    if how == "document":
        values: Values = Singly(named, count, wanted, how)
        loader = torch_loader(values, wanted, workers, batched=False, collate=wanted.collate)
    else:
        values = Values(named, count, wanted, how)
        loader = torch_loader(values, wanted, workers, batched=True, collate=None)

    def close() -> None:
        loader.close()
        values.close()

    return Loader(loader.epoch, close)

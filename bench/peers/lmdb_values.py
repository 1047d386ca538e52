"""LMDB as it is: one value a document, a read transaction a batch.

``get`` asks for document after document, ``getmulti`` for a batch in one call; with ``readahead=False`` the kernel
is told that reads are random. Values are looked at where they are mapped, and copied once, into the batch.
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

from bench.corpus import Documents
from bench.peers.loading import Delivered, Loader, Wanted, torch_loader

PACKAGES = ("lmdb",)


class Values(Dataset[Any]):
    """Delivers whole batches; each process opens the environment for itself."""

    def __init__(self, folder: Path, count: int, wanted: Wanted, how: str) -> None:
        self._folder, self._wanted, self._how, self._count = folder, wanted, how, count
        self._environment: Any = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, positions: list[int]) -> Delivered:
        if self._environment is None:
            readahead = "readahead=False" not in self._how
            self._environment = lmdb.open(str(self._folder), readonly=True, lock=False, readahead=readahead)
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

    def close(self) -> None:
        if self._environment is not None:
            self._environment.close()
            self._environment = None


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
    return {
        how: partial(_open, folder, count, wanted, workers, how) for how in ("get", "getmulti", "get readahead=False")
    }


def _open(folder: Path, count: int, wanted: Wanted, workers: int, how: str) -> Loader:
    # A process cannot open a file twice, nor a fork's child what its parent has open: each has a copy.
    named = folder / f"{how}-{workers}"
    if not named.exists():
        named.mkdir()
        shutil.copy(folder / "data.mdb", named)
    values = Values(named, count, wanted, how)
    loader = torch_loader(values, wanted, workers, batched=True, collate=None)

    def close() -> None:
        loader.close()
        values.close()

    return Loader(loader.epoch, close)

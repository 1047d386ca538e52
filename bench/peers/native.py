"""The reference: documents copied from a mapping by the compiled loop alone, a thread a core, nothing checked.

It is no loader: it knows where each document lies, reads nothing ahead, and fills the same few buffers over and over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from actcache.admin.benchmark.corpus import Documents
from actcache.format.ragged import offsets_of
from actcache.io import loops
from actcache.io.loops import Column
from actcache.io.workers import available_cpus
from bench.peers.loading import Delivered, Loader, Wanted

PACKAGES = ("actcache",)
_BUFFERS = 5  # as many as a reader has


def write(documents: Documents, folder: Path) -> None:
    folder.mkdir(parents=True)
    documents.rows.tofile(folder / "rows")
    np.save(folder / "lengths.npy", documents.lengths)


def ways(folder: Path, count: int, wanted: Wanted, workers: int) -> dict[str, Callable[[], Loader]]:
    return {"gather": partial(_open, folder, wanted)}


def _open(folder: Path, wanted: Wanted) -> Loader:
    if loops.missing:
        raise RuntimeError(loops.missing)
    lengths = np.load(folder / "lengths.npy")
    starts, row_bytes = offsets_of(lengths), wanted.hidden * 2
    rows = np.memmap(folder / "rows", np.float16, "c").reshape(-1, wanted.hidden)
    shape = (wanted.batch * int(lengths.max()), wanted.hidden)
    buffers = [torch.zeros(shape, dtype=torch.float16) for _ in range(_BUFFERS)]

    def epoch(number: int) -> Iterator[Delivered]:
        order = np.random.default_rng(number).permutation(len(lengths))
        for first in range(0, len(order), wanted.batch):
            which = order[first : first + wanted.batch]
            some = lengths[which]
            longest = int(some.max())
            offsets = offsets_of(some, longest if wanted.padded else None)
            buffers.append(buffers.pop(0))
            column = Column(row_bytes, buffers[0].numpy(), rows, starts[which] * row_bytes)
            if len(loops.gather([column], some, offsets, threads=available_cpus())):
                raise RuntimeError("the native gather did not bring all documents")
            filled = buffers[0][: int(offsets[-1])]
            yield filled.view(len(which), longest, -1) if wanted.padded else filled, torch.from_numpy(some)

    return Loader(epoch, buffers.clear)

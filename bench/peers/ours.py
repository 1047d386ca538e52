"""The iterated reader: torch tensors, checksums on; it delivers token ids besides, which the others do not have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import actcache
from actcache.admin.benchmark.corpus import Documents
from bench.peers.loading import Delivered, Loader, Wanted

PACKAGES = ("actcache",)


def write(documents: Documents, folder: Path) -> None:
    """Make a store in a folder that is named after its backend."""
    with actcache.open(_url(folder)) as store, store.space(documents.recipe) as space:
        documents.put(space)


def ways(folder: Path, count: int, wanted: Wanted, workers: int) -> dict[str, Callable[[], Loader]]:
    return {"reader": partial(_open, folder, wanted)}


def _open(folder: Path, wanted: Wanted) -> Loader:
    store = actcache.open(_url(folder), mode="r")
    space = store.space(store.recipes()[0])
    layout = "padded" if wanted.padded else "packed"
    reader = space.reader(space.key_array(), batch_size=wanted.batch, shuffle=True, layout=layout, device="cpu")

    def epoch(number: int) -> Iterator[Delivered]:
        reader.set_epoch(number)
        return ((batch.activations, batch.lengths) for batch in reader)

    return Loader(epoch, store.close)


def _url(folder: Path) -> str:
    return f"{folder.name}:{folder}"

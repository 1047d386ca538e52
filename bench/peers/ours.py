"""The iterated reader: torch tensors, checksums on; it delivers token ids besides, which the others do not have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import actcache
from bench.corpus import Documents
from bench.peers.loading import Delivered, Loader, Wanted

PACKAGES = ("actcache",)


def write(documents: Documents, folder: Path, backend: str) -> None:
    with actcache.open(f"{backend}:{folder}") as store, store.space(documents.recipe) as space:
        documents.put(space)


def way(documents: Documents, folder: Path, backend: str, wanted: Wanted) -> Callable[[], Loader]:
    return partial(_open, documents.keys, documents.recipe, f"{backend}:{folder}", wanted)


def _open(keys: actcache.key.Keys, recipe: actcache.Recipe, url: str, wanted: Wanted) -> Loader:
    store = actcache.open(url, mode="r")
    layout = "padded" if wanted.padded else "packed"
    reader = store.space(recipe).reader(keys, batch_size=wanted.batch, shuffle=True, layout=layout, device="cpu")

    def epoch(number: int) -> Iterator[Delivered]:
        reader.set_epoch(number)
        return ((batch.activations, batch.lengths) for batch in reader)

    return Loader(epoch, store.close)

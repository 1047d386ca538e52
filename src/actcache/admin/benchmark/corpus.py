"""The documents of a benchmark: as a store of every backend, and as one flat file.

Storage does not look at the numbers, so they are pseudo-random; lengths are uniform in the shape's range.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.admin.inspection import StepProgress
from actcache.format.keys import document_key
from actcache.format.ragged import offsets_of
from actcache.format.recipe import Recipe
from actcache.store.space import Space
from actcache.store.store import open_store


@dataclass(frozen=True)
class Shape:
    name: str
    shortest: int
    longest: int
    hidden: int
    batch: int  # documents

    @property
    def row_bytes(self) -> int:
        return self.hidden * 2

    def lengths(self, nbytes: int, seed: int = 0) -> NDArray[np.int64]:
        """Return the lengths of documents that fill ``nbytes`` as float16."""
        mean = (self.shortest + self.longest) / 2
        count = max(self.batch, int(nbytes / (mean * self.row_bytes)))
        return np.random.default_rng(seed).integers(self.shortest, self.longest + 1, count)

    def rows(self, lengths: NDArray[np.int64], seed: int = 1) -> NDArray[np.float16]:
        """Return all documents' rows, ``[sum(lengths), hidden]`` float16, finite."""
        rng = np.random.default_rng(seed)
        block = rng.standard_normal((1 << 14, self.hidden), np.float32).astype(np.float16)
        rows = np.empty((int(lengths.sum()), self.hidden), np.float16)
        for start in range(0, len(rows), len(block)):
            part = rows[start : start + len(block)]
            part[:] = np.roll(block, start // len(block), axis=1)[: len(part)]
        return rows


SHAPES = {shape.name: shape for shape in (Shape("paper", 60, 512, 768, 128), Shape("short", 8, 48, 384, 1024))}


class Documents:
    """Keys, rows and token ids of documents of one shape."""

    def __init__(self, shape: Shape, nbytes: int) -> None:
        self.shape = shape
        self.lengths = shape.lengths(nbytes)
        self.keys = np.stack([np.frombuffer(document_key(f"document {i}"), np.uint8) for i in range(len(self.lengths))])
        self.recipe = Recipe(model=f"bench-{shape.name}", layer=1, hidden_size=shape.hidden)
        self.rows = shape.rows(self.lengths)
        self.nbytes = self.rows.nbytes
        self._documents = np.split(self.rows, np.cumsum(self.lengths)[:-1])
        self._begins = offsets_of(self.lengths)
        self._ids = np.arange(len(self.rows)) - np.repeat(self._begins[:-1], self.lengths)

    def split(self) -> list[NDArray[Any]]:
        """Return each document's rows."""
        return self._documents

    def put(self, space: Space) -> None:
        for start in range(0, len(self.keys), self.shape.batch):
            part = slice(start, start + self.shape.batch)
            offsets = offsets_of(self.lengths[part])
            rows = slice(int(self._begins[start]), int(self._begins[start] + offsets[-1]))
            space.put_packed(self.keys[part], self.rows[rows], offsets, self._ids[rows])


class StoredCorpus:
    """Stores of the same documents, made here, by name; ``flat`` gets the rows, and one of zeros behind them.

    ``progress`` is told how many of the files and stores are written.
    """

    def __init__(
        self,
        documents: Documents,
        urls: Mapping[str, str],
        options: Mapping[str, Any],
        flat: Path | None = None,
        progress: StepProgress = lambda done, total: None,
    ) -> None:
        self.shape, self.lengths, self.keys = documents.shape, documents.lengths, documents.keys
        self.nbytes = documents.nbytes
        self.urls = dict(urls)
        self._options = options
        self._recipe = documents.recipe
        if flat is not None:
            with flat.open("wb") as file:
                documents.rows.tofile(file)
                file.write(bytes(documents.shape.row_bytes))
                file.flush()
                os.fsync(file.fileno())
        for number, url in enumerate(self.urls.values(), 1):
            progress(number, 1 + len(self.urls))
            with open_store(url, **options) as store, store.space(self._recipe) as space:
                documents.put(space)

    def open(self, name: str) -> Space:
        return open_store(self.urls[name], mode="r", **self._options).space(self._recipe)

    def buffer(self) -> NDArray[Any]:
        """Return memory for the rows of a batch, mapped already."""
        return np.full((self.shape.batch * self.shape.longest, self.shape.hidden), 0, np.float16)

    def turns(self, count: int, batches: int) -> list[list[NDArray[Any]]]:
        """Return the documents of each round's batches, by position: a turn has each once where there are enough."""
        rng = np.random.default_rng(7)
        size = self.shape.batch

        def turn() -> list[NDArray[Any]]:
            if batches * size <= len(self.lengths):
                return list(rng.choice(len(self.lengths), (batches, size), replace=False))
            return [rng.permutation(len(self.lengths))[:size] for _ in range(batches)]

        return [turn() for _ in range(count)]

    def payload(self, turns: list[list[NDArray[Any]]]) -> NDArray[Any]:
        """Return the bytes of rows in each turn."""
        return np.array([sum(self.lengths[which].sum() for which in turn) for turn in turns]) * self.shape.row_bytes

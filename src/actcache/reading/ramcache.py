"""Entries that stay in memory: the first that are read, up to a number of bytes.

An epoch reads every entry once, in an order that has nothing to do with the last one's: keeping those that came first
is then as good as any choice, and least-recently-used the worst one, which drops each entry just before its turn.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache import codec
from actcache.key import Keys, key_array, key_list
from actcache.ragged import offsets_of, row_indices
from actcache.reading.fetch import Source
from actcache.recipe import Recipe


class RamCache:
    """Wraps a source: reads of entries that are held do not reach it. Thread-safe.

    What is held is what was read and verified once; an entry that is overwritten later is not read again.

    Args:
        source: a space.
        nbytes: of activations, at most; memory is used as entries come in.
    """

    def __init__(self, source: Source, nbytes: int) -> None:
        self._source = source
        self._nbytes = nbytes
        self._lock = threading.Lock()
        self._empty()

    def _empty(self) -> None:
        recipe = self._source.recipe
        stored = codec.get(recipe.dtype).stored
        most = max(0, self._nbytes // (stored.itemsize * recipe.hidden_size))
        # Memory that was never touched costs nothing. Row 0 stands for padding.
        self._rows: NDArray[Any] = np.zeros((most + 1, recipe.hidden_size), stored)
        self._ids = np.zeros(most + 1, np.int32)
        self._end = 1
        self._places: dict[bytes, int] = {}  # key -> position in the lists
        self._starts: list[int] = []
        self._lengths: list[int] = []

    @property
    def recipe(self) -> Recipe:
        return self._source.recipe

    @property
    def held(self) -> int:
        """Bytes of activations that are in memory."""
        return (self._end - 1) * self._rows.itemsize * self.recipe.hidden_size

    def has(self, column: str, keys: Keys) -> NDArray[np.bool_]:
        return self._source.has(column, keys)

    def lengths(self, keys: Keys) -> NDArray[np.int64]:
        lengths = self._source.lengths(keys)
        with self._lock:
            for i, place in enumerate(self._find(key_list(key_array(keys)))):
                if place >= 0:
                    lengths[i] = self._lengths[place]
        return lengths

    def read_ahead(self, keys: Keys) -> None:
        wanted = key_array(keys)
        with self._lock:
            absent = np.array(self._find(key_list(wanted)), np.int64) < 0
        if absent.any():
            self._source.read_ahead(wanted[absent])

    def read_into(self, keys: Keys, out: Any, *, token_ids: Any = None) -> Any:
        """See ``Space.read_into``; ``out`` is a NumPy array."""
        wanted = key_array(keys)
        names = key_list(wanted)
        with self._lock:
            places = np.array(self._find(names), np.int64)
        missing = np.flatnonzero(places < 0)
        if len(missing) == len(names):
            report = self._source.read_into(wanted, out, token_ids=token_ids)
            self._keep_batch(names, report.lengths, out, token_ids)
            return report
        return self._mixed(wanted, places, missing, out, token_ids)

    def _find(self, names: list[bytes]) -> list[int]:
        get = self._places.get
        return [get(name, -1) for name in names]

    def _mixed(
        self, wanted: NDArray[np.uint8], places: NDArray[np.int64], missing: NDArray[np.int64], out: Any, ids: Any
    ) -> Any:
        """Read a batch some of which is held."""
        held = np.flatnonzero(places >= 0)
        starts, lengths = np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.int64)
        with self._lock:
            starts[held] = np.array(self._starts, np.int64)[places[held]]
            lengths[held] = np.array(self._lengths, np.int64)[places[held]]
        fresh = fresh_ids = None
        if len(missing):
            absent = self._source.lengths(wanted[missing])
            fresh = np.empty((int(absent.sum()), out.shape[-1]), out.dtype)
            fresh_ids = None if ids is None else np.empty(len(fresh), np.int32)
            report = self._source.read_into(wanted[missing], fresh, token_ids=fresh_ids)
            lengths[missing] = report.lengths
            self._keep(key_list(wanted[missing]), report.lengths, fresh, fresh_ids)
        width = out.shape[1] if out.ndim == 3 else None
        rows = out.reshape(-1, out.shape[-1])
        flat_ids = None if ids is None else ids.reshape(-1)
        if not len(missing):
            source = row_indices(starts, lengths, width)
            np.take(self._rows, source, axis=0, out=rows[: len(source)], mode="clip")
            if flat_ids is not None:
                np.take(self._ids, source, out=flat_ids[: len(source)], mode="clip")
            return Lengths(lengths)
        # Where each entry's rows go; then both kinds are put there.
        firsts = offsets_of(lengths)[:-1] if width is None else np.arange(len(wanted), dtype=np.int64) * width
        if width is not None:
            rows[: len(wanted) * width] = 0
            if flat_ids is not None:
                flat_ids[: len(wanted) * width] = 0
        for which, values, value_ids, begins in (
            (held, self._rows, self._ids, starts[held]),
            (missing, fresh, fresh_ids, offsets_of(lengths[missing])[:-1]),
        ):
            assert values is not None
            to, come_from = (row_indices(b, lengths[which], None) for b in (firsts[which], begins))
            rows[to] = values[come_from]
            if flat_ids is not None and value_ids is not None:
                flat_ids[to] = value_ids[come_from]
        return Lengths(lengths)

    def _keep_batch(self, names: list[bytes], lengths: NDArray[np.int64], out: Any, ids: Any) -> None:
        """Keep the entries of a whole batch, padded or packed."""
        width = out.shape[1] if out.ndim == 3 else None
        firsts = offsets_of(lengths)[:-1] if width is None else np.arange(len(names), dtype=np.int64) * width
        with self._lock:
            room = np.cumsum(lengths) <= len(self._rows) - self._end
        if room.any():
            count = int(room.sum())
            source = row_indices(firsts[:count], lengths[:count], None)
            some = out.reshape(-1, out.shape[-1])[source]
            self._keep(names[:count], lengths[:count], some, None if ids is None else ids.reshape(-1)[source])

    def _keep(self, names: list[bytes], lengths: NDArray[np.int64], rows: NDArray[Any], ids: Any) -> None:
        """Keep packed entries, as many as there is room for."""
        with self._lock:
            begin = 0
            for name, length in zip(names, lengths.tolist(), strict=True):
                end = begin + length
                if length and name not in self._places and self._end + length <= len(self._rows):
                    self._rows[self._end : self._end + length] = rows[begin:end]
                    if ids is not None:
                        self._ids[self._end : self._end + length] = ids[begin:end]
                    self._starts.append(self._end)
                    self._lengths.append(length)
                    self._end += length
                    self._places[name] = len(self._starts) - 1  # last: whoever finds it finds all of it
                begin = end

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self._source, "nbytes": self._nbytes}  # each process has memory of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["source"], state["nbytes"])  # type: ignore[misc]


class Lengths:
    """What ``Space.read_into`` reports."""

    def __init__(self, lengths: NDArray[np.int64]) -> None:
        self.lengths = lengths

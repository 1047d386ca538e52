"""Entries that stay in memory: the first that are read, up to a number of bytes.

An epoch reads every entry once, in an order that has nothing to do with the last one's: keeping those that came first
is then as good as any choice, and least-recently-used the worst one, which drops each entry just before its turn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.backend import TOKEN_IDS
from actcache.entries.entry import ReadReport
from actcache.format import codec
from actcache.format.keys import Keys, key_array, key_list
from actcache.format.ragged import offsets_of, row_indices
from actcache.io.workers import ProcessLock
from actcache.reader.caches.batches import Part, Wrapper, flat, join
from actcache.reader.fetch import Source
from actcache.reader.stats import ReaderStats

_NOT_HELD = (0, 0, False)


class RamCache(Wrapper):
    """Wraps a source: reads of entries that are held do not reach it. Thread-safe.

    What is held is what was read and verified once; an entry that is overwritten later is not read again. It holds
    ``nbytes`` of activations at most, in memory that is used as entries come in, and counts hits in ``stats``.
    """

    def __init__(self, source: Source, nbytes: int, stats: ReaderStats | None = None) -> None:
        self._source, self._nbytes, self._stats = source, nbytes, stats or ReaderStats()
        self._lock = ProcessLock()
        recipe = source.recipe
        kind = codec.get(recipe.dtype)
        most = max(0, nbytes // recipe.row_bytes)
        # Memory that was never touched costs nothing. Row 0 stands for padding.
        self._rows: NDArray[Any] = np.zeros((most + 1, kind.width(recipe.hidden_size)), kind.stored)
        self._ids = np.zeros(most + 1, np.int32)
        self._end = 1
        # Key -> first row, rows, whether the token ids are held, too. In one value: an interrupt leaves all or nothing.
        self._places: dict[bytes, tuple[int, int, bool]] = {}

    @property
    def held(self) -> int:
        """Bytes of activations that are in memory."""
        return (self._end - 1) * self.recipe.row_bytes

    def has(self, column: str, keys: Keys) -> NDArray[np.bool_]:
        has = self._source.has(column, keys)
        if column == TOKEN_IDS:  # what is held may be gone, or another, in the source
            held, with_ids = (self._find(key_list(key_array(keys)), with_ids=w)[1] > 0 for w in (False, True))
            has = np.where(held, with_ids, has)
        return has

    def lengths(self, keys: Keys) -> NDArray[np.int64]:
        held = self._find(key_list(key_array(keys)))[1]
        return np.where(held > 0, held, self._source.lengths(keys))

    def read_ahead(self, keys: Keys) -> bool:
        wanted = key_array(keys)
        absent = self._find(key_list(wanted))[1] == 0
        return bool(absent.any()) and self._source.read_ahead(wanted[absent])

    def read_into(self, keys: Keys, out: Any, *, token_ids: Any = None) -> Any:
        """See ``Space.read_into``; ``out`` is a NumPy array."""
        wanted = key_array(keys)
        names = key_list(wanted)
        starts, lengths = self._find(names, with_ids=token_ids is not None)
        missing = np.flatnonzero(lengths == 0)
        if len(missing) == len(names):
            report = self._source.read_into(wanted, out, token_ids=token_ids)
            self._keep_batch(names, report.lengths, out, token_ids)
            return report
        report = self._mixed(wanted, starts, lengths, missing, out, token_ids)
        with self._lock:
            self._stats.ram_documents += len(names) - len(missing)
        return report

    def _find(self, names: list[bytes], *, with_ids: bool = False) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return each entry's first row and rows, 0 where it is not held (``with_ids``: with its token ids)."""
        get = self._places.get
        places = (get(name, _NOT_HELD) for name in names)
        found = [(start, length) if has_ids or not with_ids else (0, 0) for start, length, has_ids in places]
        starts, lengths = np.array(found, np.int64).reshape(-1, 2).T
        return starts, lengths

    def _mixed(
        self,
        wanted: NDArray[np.uint8],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        missing: NDArray[np.int64],
        out: Any,
        ids: Any,
    ) -> Any:
        """Read a batch some of which is held."""
        held = np.flatnonzero(lengths)
        if len(missing):
            absent = self._source.lengths(wanted[missing])
            fresh = np.empty((int(absent.sum()), out.shape[-1]), out.dtype)
            fresh_ids = None if ids is None else np.empty(len(fresh), np.int32)
            report = self._source.read_into(wanted[missing], fresh, token_ids=fresh_ids)
            lengths[missing] = report.lengths
            self._keep(key_list(wanted[missing]), report.lengths, fresh, fresh_ids)
            part = Part(missing, fresh, fresh_ids, offsets_of(report.lengths)[:-1])
            join([Part(held, self._rows, self._ids, starts[held]), part], lengths, out, ids)
            return ReadReport(lengths)
        rows, flat_ids, width = flat(out, ids)
        source = row_indices(starts, lengths, width)
        np.take(self._rows, source, axis=0, out=rows[: len(source)], mode="clip")
        if flat_ids is not None:
            np.take(self._ids, source, out=flat_ids[: len(source)], mode="clip")
        return ReadReport(lengths)

    def _keep_batch(self, names: list[bytes], lengths: NDArray[np.int64], out: Any, ids: Any) -> None:
        """Keep the entries of a whole batch, padded or packed."""
        rows, flat_ids, width = flat(out, ids)
        firsts = offsets_of(lengths, width)
        with self._lock:
            room = np.cumsum(lengths) <= len(self._rows) - self._end
        if room.any():
            count = int(room.sum())
            source = row_indices(firsts[:count], lengths[:count], None)
            self._keep(names[:count], lengths[:count], rows[source], None if flat_ids is None else flat_ids[source])

    def _keep(self, names: list[bytes], lengths: NDArray[np.int64], rows: NDArray[Any], ids: Any) -> None:
        """Keep packed entries, as many as there is room for."""
        # In a batch with others that have no token ids, an entry comes without its own.
        partial = self._source.has(TOKEN_IDS, names) if ids is None else np.zeros(len(names), bool)
        whole = {name for name, is_partial in zip(names, partial.tolist(), strict=True) if not is_partial}
        with self._lock:
            begin = 0
            for name, length in zip(names, lengths.tolist(), strict=True):
                end = begin + length
                start = self._end
                if name in whole and name not in self._places and length and start + length <= len(self._rows):
                    self._rows[start : start + length] = rows[begin:end]
                    if ids is not None:
                        self._ids[start : start + length] = ids[begin:end]
                    self._end += length
                    self._places[name] = start, length, ids is not None  # last: whoever finds it finds all of it
                begin = end

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self._source, "nbytes": self._nbytes}  # each process has memory of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["source"], state["nbytes"])  # type: ignore[misc]

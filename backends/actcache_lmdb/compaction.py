"""Compaction: the live entries of a generation, copied into the next one in the order of their numbers.

Nearly all of it is copied while others write: an entry never changes. Under the write lock, what was added or replaced
meanwhile is made up for, and the new generation gets its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lmdb
import numpy as np
from numpy.typing import NDArray

from actcache.backend import BytesDone, FormatError
from actcache_lmdb.environment import Environment, page_of
from actcache_lmdb.generations import Build
from actcache_lmdb.lookup import latest, scan
from actcache_lmdb.record import HEADER, Shapes, checks, joined
from actcache_lmdb.writing import count, put_heads, read_state, write_state

if TYPE_CHECKING:
    Txn = lmdb.Transaction[memoryview]

_NEWEST = 2**64 - 1
_STEP_BYTES = 64 << 20  # copied in one transaction
_GONE = memoryview(b"")


class Filling:
    """Fills a build from an environment. Not thread-safe."""

    def __init__(self, environment: Environment, build: Build, shapes: Shapes) -> None:
        self._environment = environment
        self._build = build
        self._shapes = shapes

    def copy(self, progress: BytesDone = lambda done, total: None) -> None:
        """Copy what is live, in short transactions; what goes meanwhile is passed over."""
        with self._environment.reading() as txn:
            records = self._live(txn)
        done, total = 0, self._nbytes(records)
        for step in self._steps(records):
            with self._environment.reading() as txn:
                self._copy(txn, step, needed=False)
            done += self._nbytes(step)
            progress(done, total)
        self._build.env.sync(True)

    def finish(self, txn: Txn) -> None:
        """Make up for what changed since; ``txn`` holds the write lock.

        Raises:
            FormatError: the value of a live entry is not there.
        """
        databases, env = self._build.databases, self._build.env
        with env.begin(buffers=True) as copied:
            done = joined(scan(copied, databases["heads"]))
        records = self._live(txn)
        stale = done[~np.isin(done["head"]["id"], records["head"]["id"])]
        with env.begin(write=True, buffers=True) as target:
            for record in stale:
                target.delete(record["key"].tobytes(), db=databases["heads"])
                target.delete(int(record["head"]["id"]).to_bytes(8, "big"), db=databases["entries"])
        for step in self._steps(records[~np.isin(records["head"]["id"], done["head"]["id"])]):
            self._copy(txn, step, needed=True)
        state = read_state(txn, self._environment.dbs, self._environment.data)
        tokens, nbytes = count(records, self._shapes)
        with env.begin(write=True, buffers=True) as target:
            created = read_state(target, databases, self._environment.folder).created
            totals = {"entries": len(records), "tokens": tokens, "nbytes": nbytes}
            # Older snapshots keep to the old generation, so nothing of theirs is needed here.
            write_state(target, databases, state.changed(created=created, horizon=state.sequence, **totals))

    def _live(self, txn: Txn) -> NDArray[np.void]:
        """Return the records of all live entries in the order of their numbers."""
        records = joined(latest(step, _NEWEST) for step in scan(txn, self._environment.dbs["heads"]))
        records = records[records["head"]["id"] > 0]
        return records[np.argsort(records["head"]["id"], kind="stable")]

    def _nbytes(self, records: NDArray[np.void]) -> int:
        return count(records, self._shapes)[1]

    def _steps(self, records: NDArray[np.void]) -> list[NDArray[np.void]]:
        row_bytes = max(self._shapes.row_bytes.values())
        nbytes = records["head"]["tokens"].astype(np.int64) * row_bytes + self._environment.page_size
        cuts = np.flatnonzero(np.diff(np.cumsum(nbytes) // _STEP_BYTES, prepend=0))
        return [step for step in np.split(records, cuts) if len(step)]

    def _copy(self, txn: Txn, records: NDArray[np.void], *, needed: bool) -> None:
        source, databases = self._environment.dbs["entries"], self._build.databases
        pages = []
        with self._build.env.begin(write=True, buffers=True) as target:
            for entry in records["head"]["id"].tolist():
                name = entry.to_bytes(8, "big")
                value = txn.get(name, db=source)
                if value is None or len(value) < HEADER.itemsize:
                    if needed:
                        raise FormatError(
                            f"{self._environment.data}: entry {entry} is missing; delete it, then compact"
                        )
                    pages.append(0)
                    continue
                target.put(name, value, db=databases["entries"])
                pages.append(page_of(target.get(name, db=databases["entries"]) or _GONE))
            there = np.array(pages) > 0
            copied = records[there]
            copied["head"]["page"] = np.array(pages)[there]
            copied["head"]["check"] = checks(copied)
            put_heads(target, databases, copied)

"""Compaction: the live entries of a generation, copied into the next one in the order of their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from actcache.backend import FormatError
from actcache_lmdb.environment import Environment, page_of
from actcache_lmdb.generations import Generations
from actcache_lmdb.lookup import latest, scan
from actcache_lmdb.record import HEADER, RECORD, Shapes, checks
from actcache_lmdb.writing import count, put_heads, read_state, write_state

_NEWEST = 2**64 - 1
_STEP_BYTES = 128 << 20  # of one transaction in the new generation


def copy(txn: lmdb.Transaction[memoryview], environment: Environment, generations: Generations, shapes: Shapes) -> bool:
    """Publish the next generation with what is live in ``txn``, which holds the write lock of the newest one.

    Returns:
        False where it was there already.

    Raises:
        FormatError: an entry's value is not there; nothing was published.
        OutOfSpaceError: likewise.
    """
    dbs, number = environment.dbs, generations.newest()
    records = np.concatenate([np.zeros(0, RECORD), *(_live(step) for step in scan(txn, dbs["heads"]))])
    records = records[np.argsort(records["head"]["id"], kind="stable")]
    state = read_state(txn, dbs, environment.data)

    def fill(env: lmdb.Environment, databases: Mapping[str, Any]) -> None:
        nbytes = records["head"]["tokens"].astype(np.int64) * max(shapes.row_bytes.values()) + environment.page_size
        steps = np.flatnonzero(np.diff(np.cumsum(nbytes) // _STEP_BYTES, prepend=-1))
        for step in np.split(records, steps[1:]):
            with env.begin(write=True, buffers=True) as target:
                pages = []
                for entry in step["head"]["id"].tolist():
                    name = entry.to_bytes(8, "big")
                    value = txn.get(name, db=dbs["entries"])
                    if value is None or len(value) < HEADER.itemsize:
                        raise FormatError(f"{environment.data}: entry {entry} is missing; delete it, then compact")
                    target.put(name, value, append=True, db=databases["entries"])
                    pages.append(page_of(target.get(name, db=databases["entries"]) or memoryview(b"")))
                step["head"]["page"] = pages
                step["head"]["check"] = checks(step)
                put_heads(target, databases, step)
        with env.begin(write=True, buffers=True) as target:
            created = read_state(target, databases, generations.path(number + 1)).created
            tokens, total = count(records, shapes)
            write_state(
                target,
                databases,
                # Older snapshots keep to the old generation.
                state.changed(
                    created=created, horizon=state.sequence, entries=len(records), tokens=tokens, nbytes=total
                ),
            )

    size = environment.check_size()
    return generations.publish(number + 1, fill, map_size=2 * size + (64 << 20))


def _live(records: NDArray[np.void]) -> NDArray[np.void]:
    newest = latest(records, _NEWEST)
    live: NDArray[np.void] = newest[newest["head"]["id"] > 0]
    return live

"""From keys to heads: one native call for a batch of keys, and one pass over all of them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from actcache_lmdb.record import HEAD, KEY_BYTES, RECORD, checks, sequences

logger = logging.getLogger(__name__)

_SCAN = 50_000  # records of one step of a scan


def records_of(txn: lmdb.Transaction[memoryview], heads: Any, keys: list[bytes]) -> NDArray[np.void]:
    """Return all heads of these keys, in the order of the keys and newest first, damaged ones among them."""
    with txn.cursor(heads) as cursor:
        found = cursor.getmulti(keys, dupdata=True, dupfixed_bytes=HEAD.itemsize, keyfixed=True)
    if len(found) % RECORD.itemsize:
        raise lmdb.CorruptedError("heads of another size than this format has")
    return np.frombuffer(found, RECORD)


def latest(records: NDArray[np.void], sequence: int) -> NDArray[np.void]:
    """Return of each run of records with one key the newest that is not younger than ``sequence``, deletions too.

    A damaged record makes its whole key absent: it could be the newest.
    """
    good = checks(records) == records["head"]["check"]
    if not good.all():
        bad = {key.tobytes() for key in records["key"][~good]}
        logger.warning("%d damaged heads: their entries count as absent", int((~good).sum()))
        good = np.array([key.tobytes() not in bad for key in records["key"]], bool)
        records = records[good]
    visible = sequences(records) <= np.uint64(sequence)
    if not visible.all():
        records = records[visible]
    first = np.ones(len(records), bool)
    words = np.ascontiguousarray(records["key"]).view("<u8")
    first[1:] = (words[1:] != words[:-1]).any(axis=1)
    return records if first.all() else records[first]


def find(txn: lmdb.Transaction[memoryview], heads: Any, keys: NDArray[np.uint8], sequence: int) -> NDArray[np.void]:
    """Return the head that each of ``[n, 32]`` keys has at ``sequence``, ``[n]``; zeros where it has none."""
    keys = np.ascontiguousarray(keys)
    prefix = keys[:, :8].copy().view(">u8").reshape(-1).astype(np.uint64)
    order = np.argsort(prefix, kind="stable")
    data = keys[order].tobytes()
    names = [data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES)]
    found = latest(records_of(txn, heads, names), sequence)
    result = np.zeros(len(keys), HEAD)
    if len(found) == len(keys) and found["key"].tobytes() == data:  # each key once, and all are there
        result[order] = found["head"]
        return result
    heads_by_key = {key.tobytes(): head for key, head in zip(found["key"], found["head"], strict=True)}
    for place, name in zip(order.tolist(), names, strict=True):
        if name in heads_by_key:
            result[place] = heads_by_key[name]
    return result


def scan(txn: lmdb.Transaction[memoryview], heads: Any) -> Iterator[NDArray[np.void]]:
    """Yield all records in the order of their keys, a step at a time; no key is cut in two."""
    with txn.cursor(heads) as cursor:
        pairs = itertools.chain.from_iterable(cursor.iternext())
        rest = b""
        while True:
            data = rest + b"".join(itertools.islice(pairs, 2 * _SCAN))
            if len(data) % RECORD.itemsize:
                raise lmdb.CorruptedError("heads of another size than this format has")
            records = np.frombuffer(data, RECORD)
            if len(data) == len(rest):
                if len(records):
                    yield records
                return
            same = (records["key"] == records["key"][-1]).all(axis=1)
            whole = len(records) - int(same.sum())
            rest = data[whole * RECORD.itemsize :]
            if whole:
                yield records[:whole]

"""From keys to heads: one native call for a batch of keys, one pass over all of them, and an index in memory."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from actcache.format.keys import KEY_BYTES, split_keys
from actcache.io.loops import Lookup, LookupTable
from actcache_lmdb.record import HEAD, RECORD, checks, sequences

logger = logging.getLogger(__name__)

NEWEST = 2**64 - 1  # a sequence number behind all others
_SCAN = 50_000  # records of one step of a scan
_FIELDS = ("id", "page", "checksum", "tokens", "columns")
_KEPT = ("<u8", "<u8", "<u8", "<u4", "u1")
_MOST_PAGES = 1 << 40  # what says more is damaged


def records_of(txn: lmdb.Transaction[memoryview], heads: Any, keys: list[bytes]) -> NDArray[np.void]:
    """Return all heads of these keys, in the order of the keys and newest first, damaged ones among them."""
    with txn.cursor(heads) as cursor:
        return _parsed(cursor.getmulti(keys, dupdata=True, dupfixed_bytes=HEAD.itemsize, keyfixed=True))


def _parsed(data: Any) -> NDArray[np.void]:
    if len(data) % RECORD.itemsize:
        raise lmdb.CorruptedError("heads of another size than this format has")
    return np.frombuffer(data, RECORD)


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


def live(records: NDArray[np.void], sequence: int = NEWEST) -> NDArray[np.void]:
    """Return ``latest`` without deletions."""
    newest = latest(records, sequence)
    return newest[newest["head"]["id"] > 0]


def find(txn: lmdb.Transaction[memoryview], heads: Any, keys: NDArray[np.uint8], sequence: int) -> NDArray[np.void]:
    """Return the head that each of ``[n, 32]`` keys has at ``sequence``, ``[n]``; zeros where it has none."""
    keys = np.ascontiguousarray(keys)
    order = np.argsort(split_keys(keys)[0], kind="stable")
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
            records = _parsed(data)
            if len(data) == len(rest):
                if len(records):
                    yield records
                return
            same = (records["key"] == records["key"][-1]).all(axis=1)
            whole = len(records) - int(same.sum())
            rest = data[whole * RECORD.itemsize :]
            if whole:
                yield records[:whole]


class HeadIndex:
    """Live heads by key, 61 bytes each, for whoever looks up more keys than it would take to read them all. Immutable.

    ``steps`` are records of live heads, each key once, in the order of their bytes.
    """

    def __init__(self, steps: Iterable[NDArray[np.void]]) -> None:
        parts: list[tuple[NDArray[Any], ...]] = [_columns(np.zeros(0, RECORD))]
        parts += map(_columns, steps)
        self._prefix, self._rest, *kept = map(np.concatenate, zip(*parts, strict=True))
        self._kept = dict(zip(_FIELDS, kept, strict=True))
        # Among equal prefixes a look-up would have to try each; nearly never is there any.
        self.usable = bool((self._prefix[1:] != self._prefix[:-1]).all())

    @property
    def columns(self) -> NDArray[np.uint8]:
        """Which arrays each entry has, as bits."""
        return self._kept["columns"]

    def lookup(self) -> Lookup:
        """Return what the compiled loops look up keys in: an entry's row is its first page."""
        kept, first = self._kept, np.zeros(1, np.int64)
        table = LookupTable(
            *(self._prefix, self._rest, None, None, kept["tokens"], kept["page"].view(np.int64), kept["checksum"]),
            *(None, first, first),
        )
        return Lookup([table], np.array([_MOST_PAGES]), first)

    def find(self, keys: NDArray[np.uint8]) -> NDArray[np.void]:
        """Return the head of each of ``[n, 32]`` keys; zeros where it has none. ``age`` and ``extra`` are always 0."""
        heads = np.zeros(len(keys), HEAD)
        if not len(self._prefix):
            return heads
        wanted, rests = split_keys(keys)
        order = np.argsort(wanted)  # neighbours in the query are neighbours in the index
        place = np.empty(len(keys), np.int64)
        place[order] = np.minimum(np.searchsorted(self._prefix, wanted[order]), len(self._prefix) - 1)
        same = (self._prefix[place] == wanted) & (self._rest[place] == rests).all(axis=1)
        for name, kept in self._kept.items():
            heads[name] = np.where(same, kept[place], 0)
        return heads


def _columns(records: NDArray[np.void]) -> tuple[NDArray[Any], ...]:
    """Return what is kept of records, an array each: prefixes and rests of keys, then the fields."""
    prefix, rest = split_keys(np.ascontiguousarray(records["key"]))
    fields = (records["head"][name].astype(dtype) for name, dtype in zip(_FIELDS, _KEPT, strict=True))
    return prefix, np.ascontiguousarray(rest), *fields

"""What happens inside of write transactions: new entries, deletions, the removal of what was superseded long ago."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from actcache.backend import Block
from actcache.errors import ShapeError
from actcache.format.keys import KEY_BYTES, key_order
from actcache.format.ragged import Pieces, pieces
from actcache_lmdb import record
from actcache_lmdb.environment import page_of
from actcache_lmdb.lookup import NEWEST, live, records_of, scan

_MOST_REMOVED = 4096  # versions that one transaction removes
_LARGEST = 0xFFFF0000  # bytes of a value
_PADDING = bytes(1 << 16)
_ZEROS = bytes(8)
GONE = memoryview(b"")  # stands for a value that is not there

if TYPE_CHECKING:
    Txn = lmdb.Transaction[memoryview]
Databases = Mapping[str, Any]


class BlockRecords:
    """A block as records, made once; a transaction that has to be tried again starts from them.

    Raises ``ShapeError`` where an entry is larger than LMDB's largest value (4 GiB).
    """

    def __init__(self, block: Block, shapes: record.Shapes, page_size: int) -> None:
        self._order = [name for name in record.COLUMNS if name in block.columns]
        self.columns = record.bits(block.columns)
        self.tokens = np.diff(block.offsets)
        data = {name: b"".join(pieces(column)) for name, column in block.columns.items() if isinstance(column, Pieces)}
        self._data = {
            name: memoryview(data[name]) if name in data else next(pieces(block.columns[name])) for name in self._order
        }
        self._offsets = {name: (block.offsets * shapes.row_bytes[name]).tolist() for name in self._order}
        self._page_size = page_size
        self.nbytes = sum(len(part) for part in self._data.values())
        ends = shapes.places(self.tokens, self.columns)["end"]
        if len(ends) and int(ends.max()) > _LARGEST:
            raise ShapeError(f"an entry of {int(ends.max())} bytes is too large for lmdb, which takes 4 GiB: cut it up")
        self.records = np.zeros(len(block), record.RECORD)
        self.records["key"] = block.keys
        heads = self.records["head"]
        heads["tokens"], heads["columns"], heads["checksum"] = self.tokens, self.columns, block.checksums
        heads["extra"] = 0 if block.extra_checksums is None else block.extra_checksums

    def number(self, sequence: int, first_id: int) -> None:
        """Give the entries their numbers."""
        self.records["head"]["age"] = NEWEST - sequence
        self.records["head"]["id"] = np.arange(first_id, first_id + len(self.records))
        headers = np.zeros(len(self.records), record.HEADER)
        headers["magic"], headers["version"], headers["sequence"] = record.ENTRY_MAGIC, record.FORMAT_VERSION, sequence
        headers["key"] = self.records["key"]
        for name in ("id", "tokens", "columns", "checksum", "extra"):
            headers[name] = self.records["head"][name]
        self._headers = headers.tobytes()

    def values(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the number and the value of every entry."""
        least = self._page_size // 2  # a shorter one would lie inside of a page of the B-tree, and move with it
        for i, number in enumerate(self.records["head"]["id"].tolist()):
            parts: list[Any] = [self._headers[i * record.HEADER.itemsize : (i + 1) * record.HEADER.itemsize]]
            size = record.HEADER.itemsize
            for name in self._order:
                if size & 7:
                    parts.append(_ZEROS[: -size & 7])
                    size += -size & 7
                begin, end = self._offsets[name][i], self._offsets[name][i + 1]
                parts.append(self._data[name][begin:end])
                size += end - begin
            if size < least:
                parts.append(_PADDING[: least - size])
            yield number.to_bytes(8, "big"), b"".join(parts)


class Writing:
    """What changes inside of one write transaction; errors name it ``where``. Not thread-safe."""

    def __init__(self, txn: Txn, databases: Databases, shapes: record.Shapes, where: object) -> None:
        self._txn, self._databases, self._shapes, self._where = txn, databases, shapes, where

    def state(self) -> record.State:
        return record.State.unpack(self._txn.get(record.State.KEY, db=self._databases["state"]), self._where)

    def put_state(self, state: record.State) -> None:
        self._txn.put(record.State.KEY, state.pack(), db=self._databases["state"])

    def put_heads(self, records: NDArray[np.void]) -> None:
        data = records[key_order(records["key"])].tobytes()
        size = record.RECORD.itemsize
        items = [(data[i : i + KEY_BYTES], data[i + KEY_BYTES : i + size]) for i in range(0, len(data), size)]
        with self._txn.cursor(self._databases["heads"]) as cursor:
            cursor.putmulti(items)

    def append(self, block: BlockRecords) -> None:
        """Add a block's entries, each the newest of its key."""
        state = self.state()
        block.number(state.sequence + 1, state.next_id)
        state, _ = self._supersede(state, block.records["key"])
        entries = self._databases["entries"]
        pages = []
        for number, value in block.values():
            self._txn.put(number, value, append=True, db=entries)
            pages.append(page_of(self._txn.get(number, db=entries) or GONE))
        records = block.records
        records["head"]["page"] = pages
        records["head"]["check"] = record.checks(records)
        self.put_heads(records)
        added = state.added(len(records), int(block.tokens.sum()), block.nbytes)
        self.put_state(added.changed(sequence=state.sequence + 1, next_id=state.next_id + len(records)))

    def delete(self, keys: NDArray[np.uint8]) -> int:
        """Make these keys absent; return how many were there."""
        state = self.state()
        changed, there = self._supersede(state, keys, tombstones=True)
        if changed != state:
            self.put_state(changed.changed(sequence=state.sequence + 1))
        return there

    def _supersede(
        self, state: record.State, keys: NDArray[np.uint8], *, tombstones: bool = False
    ) -> tuple[record.State, int]:
        """Retire the live entries of these keys by the next sequence number, damaged heads at once; count the live."""
        txn, heads = self._txn, self._databases["heads"]
        data = sorted({key.tobytes() for key in np.ascontiguousarray(keys)})
        records = records_of(txn, heads, data)
        broken = records[record.checks(records) != records["head"]["check"]]
        for key in {one["key"].tobytes() for one in broken}:
            # Its versions cannot be told apart any more: they all go, and with them what older snapshots saw.
            txn.delete(key, db=heads)
        if len(broken):
            state = self._recount(state).changed(horizon=state.sequence + 1)
            records = records_of(txn, heads, data)
        gone = live(records)
        sequence = state.sequence + 1
        retired = [gone]
        if tombstones:
            dead = np.zeros(len(gone), record.RECORD)
            dead["key"], dead["head"]["age"] = gone["key"], NEWEST - sequence
            dead["head"]["check"] = record.checks(dead)
            self.put_heads(dead)
            retired.append(dead)
        now = int(time.time() * 1e6)
        for number, one in enumerate(record.joined(retired)):
            name = sequence.to_bytes(8, "big") + number.to_bytes(4, "big")
            value = record.RETIRED.pack(now, one["key"].tobytes(), one["head"].tobytes())
            txn.put(name, value, db=self._databases["retired"])
        tokens, nbytes = self._shapes.count(gone)
        return state.added(-len(gone), -tokens, -nbytes), len(gone)

    def _recount(self, state: record.State) -> record.State:
        counted = state.changed(entries=0, tokens=0, nbytes=0)
        for records in map(live, scan(self._txn, self._databases["heads"])):
            counted = counted.added(len(records), *self._shapes.count(records))
        return counted

    def remove_retired(self, grace: float) -> int:
        """Remove versions that were superseded more than ``grace`` seconds ago, some of them; return how many."""
        txn, databases = self._txn, self._databases
        until = int((time.time() - grace) * 1e6)
        removed, horizon = [], 0
        with txn.cursor(databases["retired"]) as cursor:
            for raw, value in itertools.islice(cursor.iternext(), _MOST_REMOVED):
                when, key, head = record.RETIRED.unpack(value)
                if when > until:
                    break
                removed.append((bytes(raw), key, head))
                horizon = int.from_bytes(raw[:8], "big")
        for name, key, head in removed:
            txn.delete(name, db=databases["retired"])
            txn.delete(key, head, db=databases["heads"])
            entry = int(np.frombuffer(head, record.HEAD)["id"][0])
            if entry:
                txn.delete(entry.to_bytes(8, "big"), db=databases["entries"])
        if removed:
            state = self.state()
            self.put_state(state.changed(horizon=max(horizon, state.horizon)))
        return len(removed)

"""What happens inside of write transactions: new entries, deletions, the removal of what was superseded long ago."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from actcache.backend import Block
from actcache.errors import ShapeError
from actcache.format import frames
from actcache.format.keys import KEY_BYTES, key_order
from actcache.format.ragged import PAYLOAD, VALUES, Pieces, pieces, runs
from actcache.io import loops
from actcache_lmdb import record
from actcache_lmdb.environment import pages_of
from actcache_lmdb.lookup import NEWEST, live, records_of, scan

_MOST_REMOVED = 4096  # versions that one transaction removes
_LARGEST = 0xFFFF0000  # bytes of a value
_ASSEMBLED_BYTES = 2 << 20  # of values that are put at once, from the processor's cache

if TYPE_CHECKING:
    Txn = lmdb.Transaction[memoryview]
Databases = Mapping[str, Any]


class BlockRecords:
    """A block as records, made once; a transaction that has to be tried again starts from them.

    Raises ``ShapeError`` where an entry is larger than LMDB's largest value (4 GiB).
    """

    def __init__(self, block: Block, shapes: record.Shapes, page_size: int) -> None:
        self._shapes = shapes
        self.columns = record.bits(block.columns)
        self.tokens = np.diff(block.offsets)
        self._order = shapes.order(self.columns)
        self._offsets, self._row_bytes = block.offsets, shapes.row_bytes
        self._payload = np.zeros(len(block), np.int64)
        if shapes.compressed:
            block = frames.compressed(block)
            assert block.payload_offsets is not None
            self._payload_offsets, self._payload = block.payload_offsets, np.diff(block.payload_offsets)
            block = replace(block, columns={VALUES: block.columns[PAYLOAD], **block.columns})
        data = {name: b"".join(pieces(column)) for name, column in block.columns.items() if isinstance(column, Pieces)}
        self._data = {
            name: memoryview(data[name]) if name in data else next(pieces(block.columns[name])) for name in self._order
        }
        self.nbytes = shapes.nbytes(int(self.tokens.sum()), self.columns)
        if shapes.compressed:
            self.nbytes += int(self._payload.sum()) - int(self.tokens.sum()) * self._row_bytes[VALUES]
        self._places = shapes.places(self.tokens, self.columns)
        self._places["end"] = self._places["end"] + self._payload
        if len(block) and int(self._places["end"].max()) > _LARGEST:
            most = int(self._places["end"].max())
            raise ShapeError(f"an entry of {most} bytes is too large for lmdb, which takes 4 GiB: cut it up")
        # A value shorter than half a page would lie inside of a page of the B-tree, and move with it.
        self._sizes = np.maximum(self._places["end"] - record.PAGE_HEADER, page_size // 2)
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
        headers["payload"] = self._payload
        for name in ("id", "tokens", "columns", "checksum", "extra"):
            headers[name] = self.records["head"][name]
        self._headers = headers
        self._numbers = self.records["head"]["id"].astype(">u8").tobytes()

    def values(self) -> Iterator[list[tuple[bytes, memoryview]]]:
        """Yield numbers and values of all entries, some at a time; they are good until the next ones are asked for."""
        memory = np.empty(0, np.uint8)
        for part in runs(self._sizes, _ASSEMBLED_BYTES):
            sizes = self._sizes[part]
            ends = np.cumsum(sizes)
            if len(memory) < ends[-1]:
                memory = np.empty(int(ends[-1]), np.uint8)
            self._assemble(part, ends - sizes, memory)
            data = memory.data
            keys = self._numbers[8 * part.start : 8 * part.stop]
            yield [
                (keys[8 * i : 8 * i + 8], data[end - size : end])
                for i, (size, end) in enumerate(zip(sizes.tolist(), ends.tolist(), strict=True))
            ]

    def _assemble(self, part: slice, begins: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Bring headers and rows of some entries to where their values begin."""
        count = part.stop - part.start
        before = begins + record.HEADER_BYTES
        headers = np.arange(part.start, part.stop, dtype=np.int64) * record.HEADER_BYTES
        _copy(self._headers.view(np.uint8), headers, np.full(count, record.HEADER_BYTES), out, begins, before)
        for number, name in enumerate(self._order, 1):
            row_bytes = self._row_bytes[name]
            if number < len(self._order):
                after = begins + self._places[self._order[number]][part] - record.PAGE_HEADER
            else:
                after = begins + self._sizes[part]
            data = np.frombuffer(self._data[name], np.uint8)
            first, nbytes = self._offsets[:-1][part] * row_bytes, self.tokens[part] * row_bytes
            if name == VALUES and self._shapes.compressed:
                first, nbytes = self._payload_offsets[:-1][part], self._payload[part]
            _copy(data, first, nbytes, out, before, after)
            before = after


def _copy(
    data: NDArray[np.uint8],
    begins: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    out: NDArray[np.uint8],
    first: NDArray[np.int64],
    last: NDArray[np.int64],
) -> None:
    """Copy stretches of bytes to places that may be longer; their rest becomes zeros."""
    column = loops.Column(1, out=out, memory=data, begins=begins)
    if len(loops.gather([column], nbytes, np.stack([first, last]))):
        raise ShapeError("a block's offsets do not fit its arrays")


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
        records = block.records
        with self._txn.cursor(entries) as cursor:
            for some in block.values():
                cursor.putmulti(some, append=True)
            if len(records):
                cursor.set_key(state.next_id.to_bytes(8, "big"))
                records["head"]["page"] = pages_of(cursor.iternext(keys=False, values=True))
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
        tokens, nbytes = self.count(gone)
        return state.added(-len(gone), -tokens, -nbytes), len(gone)

    def _recount(self, state: record.State) -> record.State:
        counted = state.changed(entries=0, tokens=0, nbytes=0)
        for records in map(live, scan(self._txn, self._databases["heads"])):
            counted = counted.added(len(records), *self.count(records))
        return counted

    def count(self, records: NDArray[np.void]) -> tuple[int, int]:
        """Return the tokens of these records, whose entries are here, and the bytes of their arrays there."""
        tokens, nbytes = self._shapes.count(records)
        if not self._shapes.compressed:
            return tokens, nbytes
        return tokens, nbytes - tokens * self._shapes.row_bytes[VALUES] + sum(map(self._payload, records["head"]["id"]))

    def _payload(self, entry: np.uint64) -> int:
        """Return the bytes of an entry's frames; of a damaged one, no more than it could have."""
        value = self._txn.get(int(entry).to_bytes(8, "big"), db=self._databases["entries"])
        if value is None or len(value) < record.HEADER.itemsize:
            return 0
        return min(len(value), int(np.frombuffer(value, record.HEADER, 1)["payload"][0]))

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

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
from actcache.format.ragged import pieces
from actcache_lmdb.environment import page_of
from actcache_lmdb.lookup import NEWEST, latest, records_of, scan
from actcache_lmdb.record import (
    COLUMNS,
    ENTRY_MAGIC,
    FORMAT_VERSION,
    HEAD,
    HEADER,
    RECORD,
    RETIRED,
    Shapes,
    State,
    bits,
    checks,
    joined,
)

_MOST_REMOVED = 4096  # versions that one transaction removes
_LARGEST = 0xFFFF0000  # bytes of a value
_PADDING = bytes(1 << 16)
_ZEROS = bytes(8)
_GONE = memoryview(b"")

if TYPE_CHECKING:
    Txn = lmdb.Transaction[memoryview]
Databases = Mapping[str, Any]


def read_state(txn: Txn, databases: Databases, where: object) -> State:
    return State.unpack(txn.get(State.KEY, db=databases["state"]), where)


def write_state(txn: Txn, databases: Databases, state: State) -> None:
    txn.put(State.KEY, state.pack(), db=databases["state"])


class Blocks:
    """A block as records, made once; a transaction that has to be tried again starts from them.

    Raises:
        ShapeError: an entry is larger than LMDB's largest value (4 GiB).
    """

    def __init__(self, block: Block, shapes: Shapes, page_size: int) -> None:
        self._order = [name for name in COLUMNS if name in block.columns]
        self.columns = bits(block.columns)
        self.tokens = np.diff(block.offsets)
        data = {name: b"".join(pieces(column)) for name, column in block.columns.items() if _lazy(column)}
        self._data = {
            name: memoryview(data[name]) if name in data else next(pieces(block.columns[name])) for name in self._order
        }
        self._offsets = {name: (block.offsets * shapes.row_bytes[name]).tolist() for name in self._order}
        self.places = shapes.places(self.tokens, self.columns)
        self._page_size = page_size
        self.nbytes = sum(len(part) for part in self._data.values())
        ends = self.places["end"]
        if len(ends) and int(ends.max()) > _LARGEST:
            raise ShapeError(f"an entry of {int(ends.max())} bytes is too large for lmdb, which takes 4 GiB: cut it up")
        self.records = np.zeros(len(block), RECORD)
        self.records["key"] = block.keys
        heads = self.records["head"]
        heads["tokens"], heads["columns"], heads["checksum"] = self.tokens, self.columns, block.checksums
        heads["extra"] = 0 if block.extra_checksums is None else block.extra_checksums

    def number(self, sequence: int, first_id: int) -> None:
        """Give the entries their numbers."""
        self.records["head"]["age"] = NEWEST - sequence
        self.records["head"]["id"] = np.arange(first_id, first_id + len(self.records))
        headers = np.zeros(len(self.records), HEADER)
        headers["magic"], headers["version"], headers["sequence"] = ENTRY_MAGIC, FORMAT_VERSION, sequence
        headers["key"] = self.records["key"]
        for name in ("id", "tokens", "columns", "checksum", "extra"):
            headers[name] = self.records["head"][name]
        self._headers = headers.tobytes()

    def values(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the number and the value of every entry."""
        least = self._page_size // 2  # a shorter one would lie inside of a page of the B-tree, and move with it
        for i, number in enumerate(self.records["head"]["id"].tolist()):
            parts: list[Any] = [self._headers[i * HEADER.itemsize : (i + 1) * HEADER.itemsize]]
            size = HEADER.itemsize
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


def _lazy(column: Any) -> bool:
    return not isinstance(column, np.ndarray)


def append(txn: Txn, databases: Databases, block: Blocks, shapes: Shapes, where: object) -> None:
    """Add a block's entries, each the newest of its key."""
    state = read_state(txn, databases, where)
    block.number(state.sequence + 1, state.next_id)
    state, _ = _supersede(txn, databases, state, block.records["key"], shapes)
    entries = databases["entries"]
    pages = []
    for number, value in block.values():
        txn.put(number, value, append=True, db=entries)
        pages.append(page_of(txn.get(number, db=entries) or _GONE))
    records = block.records
    records["head"]["page"] = pages
    records["head"]["check"] = checks(records)
    put_heads(txn, databases, records)
    write_state(
        txn,
        databases,
        state.changed(
            sequence=state.sequence + 1,
            next_id=state.next_id + len(records),
            entries=state.entries + len(records),
            tokens=state.tokens + int(block.tokens.sum()),
            nbytes=state.nbytes + block.nbytes,
        ),
    )


def delete(txn: Txn, databases: Databases, keys: NDArray[np.uint8], shapes: Shapes, where: object) -> int:
    """Make these keys absent; return how many were there."""
    state = read_state(txn, databases, where)
    changed, there = _supersede(txn, databases, state, keys, shapes, tombstones=True)
    if changed != state:
        write_state(txn, databases, changed.changed(sequence=state.sequence + 1))
    return there


def _supersede(
    txn: Txn,
    databases: Databases,
    state: State,
    keys: NDArray[np.uint8],
    shapes: Shapes,
    *,
    tombstones: bool = False,
) -> tuple[State, int]:
    """Retire the live entries of these keys by the next sequence number, damaged heads at once; count the live."""
    data = sorted({key.tobytes() for key in np.ascontiguousarray(keys)})
    records = records_of(txn, databases["heads"], data)
    broken = records[checks(records) != records["head"]["check"]]
    for key in {record["key"].tobytes() for record in broken}:
        # Its versions cannot be told apart any more: they all go, and with them what older snapshots saw.
        txn.delete(key, db=databases["heads"])
    if len(broken):
        state = _recount(txn, databases, shapes, state).changed(horizon=state.sequence + 1)
        records = records_of(txn, databases["heads"], data)
    newest = latest(records, NEWEST)
    live = newest[newest["head"]["id"] > 0]
    sequence = state.sequence + 1
    retired = [live]
    if tombstones:
        dead = np.zeros(len(live), RECORD)
        dead["key"], dead["head"]["age"] = live["key"], NEWEST - sequence
        dead["head"]["check"] = checks(dead)
        put_heads(txn, databases, dead)
        retired.append(dead)
    now = int(time.time() * 1e6)
    for number, record in enumerate(joined(retired)):
        name = sequence.to_bytes(8, "big") + number.to_bytes(4, "big")
        txn.put(name, RETIRED.pack(now, record["key"].tobytes(), record["head"].tobytes()), db=databases["retired"])
    tokens, nbytes = count(live, shapes)
    left = {"entries": state.entries - len(live), "tokens": state.tokens - tokens, "nbytes": state.nbytes - nbytes}
    return state.changed(**left), len(live)


def count(records: NDArray[np.void], shapes: Shapes) -> tuple[int, int]:
    """Return the tokens of these records, and the bytes of their arrays."""
    tokens, columns = records["head"]["tokens"].astype(np.int64), records["head"]["columns"]
    nbytes = sum(shapes.nbytes(int(tokens[columns == kind].sum()), kind) for kind in np.unique(columns).tolist())
    return int(tokens.sum()), nbytes


def _recount(txn: Txn, databases: Databases, shapes: Shapes, state: State) -> State:
    entries = tokens = nbytes = 0
    for records in scan(txn, databases["heads"]):
        newest = latest(records, NEWEST)
        live = newest[newest["head"]["id"] > 0]
        more_tokens, more_bytes = count(live, shapes)
        entries, tokens, nbytes = entries + len(live), tokens + more_tokens, nbytes + more_bytes
    return state.changed(entries=entries, tokens=tokens, nbytes=nbytes)


def put_heads(txn: Txn, databases: Databases, records: NDArray[np.void]) -> None:
    data = records[key_order(records["key"])].tobytes()
    size = RECORD.itemsize
    items = [(data[i : i + KEY_BYTES], data[i + KEY_BYTES : i + size]) for i in range(0, len(data), size)]
    with txn.cursor(databases["heads"]) as cursor:
        cursor.putmulti(items)


def remove_retired(txn: Txn, databases: Databases, where: object, grace: float) -> int:
    """Remove versions that were superseded more than ``grace`` seconds ago, some of them; return how many."""
    until = int((time.time() - grace) * 1e6)
    removed, horizon = [], 0
    with txn.cursor(databases["retired"]) as cursor:
        for raw, value in itertools.islice(cursor.iternext(), _MOST_REMOVED):
            when, key, head = RETIRED.unpack(value)
            if when > until:
                break
            removed.append((bytes(raw), key, head))
            horizon = int.from_bytes(raw[:8], "big")
    if not removed:
        return 0
    for name, key, head in removed:
        txn.delete(name, db=databases["retired"])
        txn.delete(key, head, db=databases["heads"])
        entry = int(np.frombuffer(head, HEAD)["id"][0])
        if entry:
            txn.delete(entry.to_bytes(8, "big"), db=databases["entries"])
    state = read_state(txn, databases, where)
    write_state(txn, databases, state.changed(horizon=max(horizon, state.horizon)))
    return len(removed)

"""Requests, bytes and seconds that a space of many segments costs, which ``bench.objects --segments`` prints.

``flushed``: what writers that flush a segment at a time leave when they are killed: as many index files as there can
be, made by the code that makes them; the rows of their segments are left away, which nothing here reads. ``no index``:
segments alone, as a killed writer of a release before left them; their objects are put there.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as Printed

import actcache
from actcache.backend import Block, SegmentFormat
from actcache.format.keys import split_keys
from actcache.format.ragged import offsets_of
from actcache.segments.index import Table
from actcache.segments.places.local_place import LocalSegment
from actcache.segments.places.objects import options as opt
from actcache.segments.places.objects.client import Body, Client, Data, Head, Listing, Upload
from actcache.segments.registry import load
from actcache.segments.segment import metadata

_PAGE = 1000  # names of one request for a listing
_MOST_PUT = 1000  # segments whose objects are put there
RECIPE = actcache.Recipe(model="bench", layer=1, hidden_size=4, dtype="float16")


class CountingClient(Client):
    """Wraps a client; counts its requests by kind, and the bytes of objects that went down and up."""

    requests: ClassVar[Counter[str]] = Counter()
    down = up = 0

    def __init__(self, wrapped: Client) -> None:
        self.where, self.multipart, self._wrapped = wrapped.where, wrapped.multipart, wrapped

    def _count(self, kind: str, *, down: int = 0, up: int = 0, pages: int = 1) -> None:
        CountingClient.requests[kind] += pages
        CountingClient.down += down
        CountingClient.up += up

    def get(self, key: str, offset: int, nbytes: int) -> Body:
        body = self._wrapped.get(key, offset, nbytes)
        self._count("GET", down=len(body.data))
        return body

    def head(self, key: str) -> Head:
        self._count("HEAD")
        return self._wrapped.head(key)

    def listing(self, prefix: str, *, recursive: bool) -> Listing:
        found = self._wrapped.listing(prefix, recursive=recursive)
        self._count("LIST", pages=max(1, -(-(len(found.files) + len(found.folders)) // _PAGE)))
        return found

    def put(self, key: str, data: Data, token: str, *, create: bool) -> None:
        self._count("PUT", up=len(data))
        self._wrapped.put(key, data, token, create=create)

    def begin(self, key: str, token: str) -> str:
        self._count("POST")
        return self._wrapped.begin(key, token)

    def part(self, key: str, upload: str, number: int, data: Data) -> str:
        self._count("PUT", up=len(data))
        return self._wrapped.part(key, upload, number, data)

    def complete(self, key: str, upload: str, etags: Sequence[str], token: str, *, create: bool) -> None:
        self._count("POST")
        self._wrapped.complete(key, upload, etags, token, create=create)

    def abort(self, key: str, upload: str) -> None:
        self._count("DELETE")
        self._wrapped.abort(key, upload)

    def uploads(self) -> list[Upload]:
        self._count("LIST")
        return self._wrapped.uploads()

    def copy(self, key: str, target: str) -> None:
        self._count("COPY")
        self._wrapped.copy(key, target)

    def remove(self, key: str) -> None:
        self._count("DELETE")
        self._wrapped.remove(key)

    def abandon(self) -> None:
        self._wrapped.abandon()

    def close(self) -> None:
        self._wrapped.close()


@contextmanager
def counted() -> Iterator[None]:
    """Count the requests of all stores that are opened meanwhile."""
    connect = opt.Target.connect
    opt.Target.connect = lambda self: CountingClient(connect(self))  # type: ignore[method-assign]
    try:
        yield
    finally:
        opt.Target.connect = connect  # type: ignore[method-assign]


class Costs:
    """Prints what each step costs."""

    def __init__(self, title: str) -> None:
        self._table = Printed(title=title)
        for column in ("segments", "state", "step", "requests", "of these", "MB down", "MB up", "seconds"):
            self._table.add_column(column, justify="left" if column in ("state", "step", "of these") else "right")

    @contextmanager
    def step(self, segments: int, state: str, name: str) -> Iterator[None]:
        CountingClient.requests, CountingClient.down, CountingClient.up = Counter(), 0, 0
        begin = time.perf_counter()
        yield
        seconds, requests = time.perf_counter() - begin, CountingClient.requests
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(requests.items()))
        sizes = (f"{nbytes / 1e6:.2f}" for nbytes in (CountingClient.down, CountingClient.up))
        self._table.add_row(f"{segments:,}", state, name, str(sum(requests.values())), kinds, *sizes, f"{seconds:.2f}")

    def show(self, console: Console) -> None:
        console.print(self._table)


def block(keys: NDArray[np.uint8]) -> Block:
    """Return entries of one token each; their checksums are none, which nothing here looks at."""
    rows = np.zeros((len(keys), RECIPE.hidden_size), np.float16)
    offsets = offsets_of(np.ones(len(keys), np.int64))
    return Block(keys, offsets, np.zeros(len(keys), np.uint64), {"values": rows})


def segment_name(number: int) -> str:
    return f"{number + 1:012x}-{uuid.UUID(int=number + 1).hex[-16:]}"


def segment_file(folder: str, number: int, keys: NDArray[np.uint8]) -> Path:
    """Write a segment's file."""
    path = Path(folder) / f"{number}.safetensors"
    format = load("safetensors")
    assert isinstance(format, SegmentFormat)
    format.write(path, block(keys), metadata(segment_name(number), RECIPE.fingerprint))
    return path


def put_segments(url: str, count: int, entries: int) -> None:
    """Put segments into the store's space, without telling anybody."""
    client = opt.target(url, {}).connect()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(16) as pool:
        waiting = []
        for number in range(count):
            path = segment_file(made, number, rng.integers(0, 256, (entries, 32), np.uint8))
            name = segment_name(number)
            key = f"spaces/{RECIPE.fingerprint}/segments/{name}.safetensors"
            waiting.append(pool.submit(client.put, key, path.read_bytes(), name, create=False))
            path.unlink()
        for future in waiting:
            future.result()
    client.close()


def put_index_files(space: Any, count: int, entries: int) -> None:
    """Publish as many index files of so many segments as there can be: each a quarter of the one before."""
    catalog = space._driver.catalog
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as made:
        path = segment_file(made, 0, np.zeros((entries, 32), np.uint8))
        template = catalog.open_segment(segment_name(0), LocalSegment(path))
    sizes = [4**level for level in range(20) if (4 ** (level + 1) - 1) // 3 <= count]
    sizes[-1] += count - sum(sizes)
    for some in reversed(sizes):
        done = sum(size for size in sizes if size > some)
        names = [segment_name(number) for number in range(done, done + some)]
        segments = tuple(replace(template, name=name, files=catalog._files_of(name)) for name in names)
        prefix, rest = split_keys(rng.integers(0, 256, (some * entries, 32), np.uint8))
        number = np.repeat(np.arange(some, dtype=np.uint32), entries)
        entry = np.tile(np.arange(entries, dtype=np.uint32), some)
        ones, row = np.ones(len(entry), np.uint32), entry.astype(np.int64)
        table = Table(segments, tuple(names), prefix, rest, number, number, entry, row, ones, prefix)
        catalog._index_also(Table.merged([table], frozenset(names)))


def measure(costs: Costs, url: str, segments: int, state: str) -> None:
    """Open the space to read, look some keys up, and look again."""
    rng = np.random.default_rng(segments)
    with costs.step(segments, state, "open to read"):
        store = actcache.open(url, "r")
        space = store.space(RECIPE)
    keys = [key.tobytes() for key in rng.integers(0, 256, (64, 32), np.uint8)]
    with costs.step(segments, state, "look 64 keys up"):
        space.contains(keys)
    with costs.step(segments, state, "refresh"):
        space.refresh()
    space.close()
    store.close()


def flush(costs: Costs, url: str, segments: int, state: str, entries: int) -> None:
    store = actcache.open(url)
    space = store.space(RECIPE)
    rows: Any = [np.ones((1, RECIPE.hidden_size), np.float16)] * entries
    for step in ("first flush", "second flush"):
        keys = [actcache.document_key(f"{uuid.uuid4()}") for _ in range(entries)]
        space.contains(keys)  # what is looked up first brings the index
        with costs.step(segments, state, step):
            space.put(keys, rows)
            space.flush()
    with costs.step(segments, state, "close the writer"):
        space.close()
    store.close()


def report(console: Console, bucket: str, counts: Sequence[int], entries: int) -> None:
    costs = Costs(f"a space of many segments, {entries:,} entries each")
    with counted():
        for count in counts:
            for state in ("flushed", "no index") if count <= _MOST_PUT else ("flushed",):
                url = f"s3://{bucket}/many-{count}-{uuid.uuid4().hex[:8]}"
                with actcache.open(url) as store, store.space(RECIPE) as space:
                    if state == "flushed":
                        put_index_files(space, count, entries)
                if state == "no index":
                    put_segments(url, count, entries)
                measure(costs, url, count, state)
                flush(costs, url, count, state, entries)
    costs.show(console)

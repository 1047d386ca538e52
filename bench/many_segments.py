"""Requests, bytes and seconds that a space of many segments costs, which ``bench.objects --segments`` prints.

The segments are put there directly, as their writers would have left them: a batch of entries of one token each. The
listed states are: ``no index``, as the segments of a writer of before, who was killed; ``flushed``, what writers that
flush a segment at a time leave when they are killed; ``indexed``, after a writer has closed the space.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as Printed

import actcache
from actcache.backend import Block
from actcache.format.ragged import offsets_of
from actcache.segments.places.objects import options as opt
from actcache.segments.places.objects.client import Body, Client, Data, Head, Listing, Upload
from actcache.segments.registry import load
from actcache.segments.segment import metadata

_PAGE = 1000  # names of one request for a listing
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


def put_segments(url: str, count: int, entries: int) -> None:
    """Put segments into the store's space, without telling anybody."""
    actcache.open(url).space(RECIPE).close()
    client, format = opt.target(url, {}).connect(), load("safetensors")
    folder = f"spaces/{RECIPE.fingerprint}/segments"
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(16) as pool:
        waiting = []
        for number in range(count):
            name, path = segment_name(number), Path(made) / f"{number}"
            written = block(rng.integers(0, 256, (entries, 32), np.uint8))
            format.write(path, written, metadata(name, RECIPE.fingerprint))  # type: ignore[union-attr]
            waiting.append(
                pool.submit(client.put, f"{folder}/{name}.safetensors", path.read_bytes(), name, create=False)
            )
            path.unlink()
        for future in waiting:
            future.result()
    client.close()


def measure(costs: Costs, url: str, segments: int, state: str, entries: int) -> None:
    """Open the space to read, look some keys up, look again, and flush one more segment to it."""
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
            url = f"s3://{bucket}/many-{count}-{uuid.uuid4().hex[:8]}"
            put_segments(url, count, entries)
            measure(costs, url, count, "no index", entries)
            flush(costs, url, count, "no index", entries)
            measure(costs, url, count, "indexed", entries)
            flush(costs, url, count, "indexed", entries)
    costs.show(console)

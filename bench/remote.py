"""Shuffled reads of an object store, beside what the bare client reaches against the same server.

The bare client asks for exactly the ranges that the store asks for, with as many requests in flight, and checks
nothing. A server on the same machine takes most of the processor, so requests, bytes and the client's own processor
time (user and system) stand beside the speed. There is no cold and no warm: the server has its own caches.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from actcache.admin.benchmark import rounds
from actcache.admin.benchmark.corpus import Documents, Shape, StoredCorpus
from bench.bare import Bare, Range, Requests
from bench.metered import Metered
from bench.server import Bucket


def compare(console: Console, bucket: Bucket, shape: Shape, nbytes: int, count: int, batches: int) -> None:
    """Print the figures of one shape."""
    prefix = f"{shape.name}/store"
    requests = Requests()
    bare = Bare(bucket, f"{prefix}/")
    try:
        corpus = StoredCorpus(Documents(shape, nbytes), {"s3": f"s3://{bucket.name}/{prefix}"}, bucket.options)
        _compare(console, bucket, corpus, requests, bare, count, batches)
    finally:
        requests.stop()
        bare.close()


def _compare(
    console: Console, bucket: Bucket, corpus: StoredCorpus, requests: Requests, bare: Bare, count: int, batches: int
) -> None:
    out, turns = corpus.buffer(), corpus.turns(count, batches)
    requests.count = 0
    space = corpus.open("s3")
    for which in np.array_split(np.arange(len(corpus.lengths)), 1 + len(corpus.lengths) // corpus.shape.batch):
        space.read_into(corpus.keys[which], out)
    opening = requests.count
    asked: list[list[list[Range]]] = []  # by turn and batch
    for turn in turns:
        asked.append([])
        for which in turn:
            requests.ranges.clear()
            space.read_into(corpus.keys[which], out)
            asked[-1].append(list(requests.ranges))
    each = np.array([sum(len(ranges) for ranges in turn) for turn in asked])
    fetched = sum(nbytes for turn in asked for ranges in turn for _, _, nbytes in ranges)
    memory = np.zeros(max(sum(r[2] for r in ranges) for turn in asked for ranges in turn), np.uint8)

    def store(turn: int) -> None:
        for which in turns[turn]:
            space.read_into(corpus.keys[which], out)

    def straight(turn: int, read: Callable[[list[Range], np.ndarray], None]) -> None:
        for ranges in asked[turn]:
            read(ranges, memory)

    contestants = {name: Metered(lambda turn, read=read: straight(turn, read)) for name, read in bare.reads().items()}
    contestants["s3"] = Metered(store)
    counted = requests.count
    seconds = rounds.take_turns(contestants, count)
    made = (requests.count - counted) / ((count + 1) * batches)
    space.close()
    payload = corpus.payload(turns)
    limit = min(bare.reads(), key=lambda name: float(np.median(seconds[name])))
    table = Table(title=f"{corpus.shape.name}, s3: {len(corpus.lengths)} documents, {corpus.nbytes / 2**20:.0f} MiB")
    table.caption = (
        f"{bucket.server}; batches of {corpus.shape.batch}, {batches} a turn, {fetched / payload.sum():.3f} bytes "
        f"fetched for a byte of rows; before, {opening} requests to open the space and read all of it once"
    )
    for column in ("", "GB/s", "ratio to the limit", "requests a batch", "client CPU ms/MB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, contestant in contestants.items():
        ours = name == "s3"
        table.add_row(
            f"the limit: {name}" if name == limit else name,
            rounds.Spread.of(payload / seconds[name] / 1e9).text(4),
            str(rounds.Spread.of(seconds[limit] / seconds[name])) if ours else "",
            f"{made if ours else each.sum() / (count * batches):.1f}",
            f"{contestant.per_megabyte(payload.sum()):.2f}",
        )
    console.print(table)

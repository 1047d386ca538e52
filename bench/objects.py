"""Range reads of an object store: what the clients reach, and what the store reaches over them.

    AWS_ENDPOINT_URL=... AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... python -m bench.objects --shape paper,short
    ... python -m bench.objects --segments 10,100,1000,10000

``bare`` contestants fetch one range an entry with a pool of threads and throw it away. ``store`` contestants read
the same entries of the same object through actcache: ranges joined, rows in the caller's buffer, checksums. They take
turns, batch by batch, all against the server that ``AWS_ENDPOINT_URL`` names, and the bare ones also against a plain
server of this file, which only sends files: there the client is what limits. Client CPU is this process's, user and
system.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import actcache
from actcache.admin.benchmark import rounds
from actcache.admin.benchmark.corpus import SHAPES, Shape
from actcache.segments.places.objects.client import Client
from actcache.segments.places.objects.options import target
from actcache.segments.places.objects.session import IN_FLIGHT, Session
from bench import many_segments

console = Console(width=130)
CLIENTS = ("obstore", "s3fs")


class Meter:
    """Runs a contestant's batches and adds up its bytes, processor seconds and requests."""

    def __init__(self, read: Callable[[int], int], requests: Callable[[], int]) -> None:
        self._read = read
        self._requests = requests
        self.nbytes = self.requests = 0
        self.cpu = 0.0

    def __call__(self, number: int) -> float:
        usage, requests = resource.getrusage(resource.RUSAGE_SELF), self._requests()
        self.nbytes += self._read(number)
        after = resource.getrusage(resource.RUSAGE_SELF)
        self.cpu += after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
        self.requests += self._requests() - requests
        return 0.0


def bare(client: Client, key: str, batches: list[np.ndarray], pool: ThreadPoolExecutor) -> Meter:
    """Fetch the ranges ``[begin, end)`` of each batch."""
    count = 0

    def read(number: int) -> int:
        nonlocal count
        ranges = batches[number].tolist()
        count += len(ranges)
        got = pool.map(lambda r: len(memoryview(client.get(key, r[0], r[1] - r[0]).data)), ranges)
        return sum(got)

    return Meter(read, lambda: count)


def stored(
    space: actcache.Space, keys: np.ndarray, lengths: np.ndarray, picks: list[np.ndarray], counter: dict
) -> Meter:
    """Read the same entries through the store."""
    rows = np.empty((max(int(lengths[pick].sum()) for pick in picks), space.recipe.hidden_size), np.float16)

    def read(number: int) -> int:
        pick = picks[number]
        tokens = int(lengths[pick].sum())
        space.read_into([keys[i].tobytes() for i in pick], rows[:tokens])
        return tokens * space.recipe.hidden_size * 2

    return Meter(read, lambda: counter["get"])


def counted() -> dict[str, int]:
    """Count the requests for ranges of all stores that are opened from now on."""
    counter = {"get": 0}
    original = Session.client

    def wrapped(self: Session) -> Client:
        made = original(self)
        if not hasattr(made, "counted"):
            made.counted = True  # type: ignore[attr-defined]
            get = made.get

            def get_counted(key: str, offset: int, nbytes: int) -> object:
                counter["get"] += 1
                return get(key, offset, nbytes)

            made.get = get_counted  # type: ignore[method-assign,assignment]
        return made

    Session.client = wrapped  # type: ignore[method-assign,assignment]
    return counter


def compare(shape: Shape, nbytes: int, count: int, size: int, bucket: str) -> None:
    lengths = shape.lengths(nbytes)
    rows = shape.rows(lengths)
    offsets = np.r_[0, np.cumsum(lengths)]
    keys = np.stack([np.frombuffer(actcache.document_key(f"{shape.name} {i}"), np.uint8) for i in range(len(lengths))])
    rng = np.random.default_rng(2)
    picks = [rng.choice(len(lengths), size, replace=False) for _ in range(count)]
    url = f"s3://{bucket}/{shape.name}-{uuid.uuid4().hex[:8]}"
    recipe = actcache.Recipe(model="bench", layer=1, hidden_size=shape.hidden, dtype="float16")
    with actcache.open(url) as store, store.space(recipe) as space:
        for first in range(0, len(lengths), 512):
            some = range(first, min(first + 512, len(lengths)))
            data = [rows[offsets[i] : offsets[i + 1]] for i in some]
            space.put([keys[i].tobytes() for i in some], data, [np.zeros(len(d), np.int32) for d in data])
    ranges = [np.stack([offsets[pick], offsets[pick + 1]], axis=1) * shape.row_bytes for pick in picks]
    looking = target(url, {"client": "s3fs"}).connect()
    (segment, base), *others = [
        (key, listed.size - rows.nbytes)  # the rows stand at the end
        for key, listed in looking.listing("", recursive=True).files.items()
        if "/segments/" in key
    ]
    looking.close()
    if others:
        raise SystemExit("--mib is more than one segment takes")

    meters: dict[str, Meter] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(IN_FLIGHT) as pool:
        flat = Path(folder) / "flat"
        flat.write_bytes(bytes(base) + rows.tobytes())
        with PlainServer(flat) as plain:
            places = {"server": url, "plain": f"s3://flat/x?endpoint_url={plain.endpoint}&anon=true"}
            clients = {(where, c): target(u, {"client": c}).connect() for where, u in places.items() for c in CLIENTS}
            for (where, name), client in clients.items():
                meters[f"{where}: bare {name}"] = bare(client, segment, [base + r for r in ranges], pool)
            stores = []
            counter = counted()
            for name in CLIENTS:
                stores.append(actcache.open(url, "r", client=name))
                space = stores[-1].space(recipe)
                meters[f"server: store, {name}"] = stored(space, keys, lengths, picks, counter)
            seconds = rounds.take_turns(meters, count)
            for closing in (*stores, *clients.values()):
                closing.close()
    report(shape, size, meters, seconds, count)


def report(shape: Shape, size: int, meters: dict[str, Meter], seconds: dict[str, np.ndarray], count: int) -> None:
    table = Table(title=f"{shape.name}: batches of {size} entries, {IN_FLIGHT} requests at a time, {count} rounds")
    for column in ("", "GB/s", "client CPU ms/MB", "requests/MB", "x bare s3fs", "x bare obstore"):
        table.add_column(column)
    for name, meter in meters.items():
        where = name.partition(":")[0]
        ratios = [rounds.Spread.of(seconds[f"{where}: bare {c}"] / seconds[name]) for c in reversed(CLIENTS)]
        megabytes = meter.nbytes / 1e6
        speed = meter.nbytes * count / (count + 1) / 1e9 / seconds[name].sum()  # one round warms up
        table.add_row(
            name,
            f"{speed:.3f}",
            f"{1e3 * meter.cpu / megabytes:.2f}",
            f"{meter.requests / megabytes:.2f}",
            *map(str, ratios),
        )
    console.print(table)


class PlainServer:
    """Answers every GET with the range of one file, in a process of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> PlainServer:
        command = [sys.executable, "-m", "bench.objects", "--serve", str(self._path)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.endpoint = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        return self

    def __exit__(self, *failure: object) -> None:
        self._process.terminate()
        self._process.wait()


def serve(path: Path) -> None:
    descriptor, size = os.open(path, os.O_RDONLY), path.stat().st_size
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)

    def answer(connection: socket.socket) -> None:
        waiting = b""
        while True:
            while b"\r\n\r\n" not in waiting:
                got = connection.recv(65536)
                if not got:
                    return
                waiting += got
            head, _, waiting = waiting.partition(b"\r\n\r\n")
            asked = re.search(rb"(?i)range: bytes=(\d+)-(\d+)", head)
            begin, end = (int(asked[1]), int(asked[2]) + 1) if asked else (0, size)
            lines = (
                "HTTP/1.1 206 Partial Content",
                f"Content-Length: {end - begin}",
                f"Content-Range: bytes {begin}-{end - 1}/{size}",
                'ETag: "x"',
                "Last-Modified: Sat, 21 Nov 2026 12:00:00 GMT",
            )
            connection.sendall("\r\n".join((*lines, "", "")).encode())
            while begin < end:
                begin += os.sendfile(connection.fileno(), descriptor, begin, end - begin)

    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="paper,short")
    parser.add_argument("--mib", type=int, default=128, help="of stored rows; one segment")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32, help="entries of a batch")
    parser.add_argument("--bucket", default="actcache-bench")
    parser.add_argument("--segments", help="instead: what spaces of so many segments cost, as 10,100,1000,10000")
    parser.add_argument("--entries", type=int, default=1000, help="of a segment, with --segments")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    if not os.environ.get("AWS_ENDPOINT_URL"):
        parser.error("AWS_ENDPOINT_URL names no server")
    made = target(f"s3://{options.bucket}/x", {"client": "s3fs"}).connect()
    made.fs.makedirs(options.bucket, exist_ok=True)  # type: ignore[attr-defined]
    made.close()
    if options.segments:
        many_segments.report(console, options.bucket, [int(n) for n in options.segments.split(",")], options.entries)
        return
    for name in options.shape.split(","):
        compare(SHAPES[name], options.mib << 20, options.rounds, options.batch, options.bucket)


if __name__ == "__main__":
    main()

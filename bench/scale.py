"""Many processes over one object store: what a simulation says, beside what is measured here and what arithmetic says.

    python -m bench.scale                      # moto's server; ACTCACHE_S3_ENDPOINT names another one
    python -m bench.scale --workers 2          # of a server that answers two requests at a time
    python -m bench.scale --paper              # no server: the arithmetic of `cachectl plan --nodes` is simulated

Processes of their own read single entries, shuffled, through a link that makes each request wait (``--latency``), and
put and flush segments. What a request costs the client's processor is measured, and what it costs the server is told by
the time of one process with one request in flight. All other cells (more processes, larger batches) are predicted from
that by a discrete-event simulation: processors and the server are queues, the link is a delay. ``--within`` says how
far the worst prediction may be off; more is a failure.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import simpy
from rich.console import Console
from rich.table import Table

import actcache
from actcache.admin import fleet
from bench.bare import Requests
from bench.metered import _cpu
from bench.server import bucket

console = Console(width=130)

HIDDEN, TOKENS = 384, 64  # 48 KiB an entry, further apart than what is read in one request
DOCUMENTS = 2000
ROUNDS = 2  # in turn, of which a cell's better one counts: what else runs on a machine only takes away


@dataclass(frozen=True)
class Costs:
    """What one unit of work takes, seconds. A unit is a request of an entry, or the flush of a segment."""

    client: float  # of a processor of the machine, in the client
    server: float  # of a worker of the server
    latency: float  # of waiting


@dataclass(frozen=True)
class Machine:
    """Where it runs. ``cores`` are shared by clients and server where ``shared``; else the server has its own."""

    cores: int
    workers: int  # of the server: how many requests it works on at a time
    shared: bool = True


def simulate(costs: Costs, machine: Machine, processes: int, batch: int, seconds: float) -> float:
    """Return the units a second of processes, each of which has ``batch`` under way and then waits for all of them."""
    env = simpy.Environment()
    cpu = simpy.Resource(env, machine.cores)
    server = simpy.Resource(env, machine.workers)
    done = 0

    def on(resource: simpy.Resource, duration: float) -> Generator[Any, Any, None]:
        with resource.request() as turn:
            yield turn
            yield env.timeout(duration)

    def unit() -> Generator[Any, Any, None]:
        nonlocal done
        yield from on(cpu, costs.client / 2)
        yield env.timeout(costs.latency)
        with server.request() as turn:
            yield turn
            if machine.shared:
                yield from on(cpu, costs.server)
            else:
                yield env.timeout(costs.server)
        yield from on(cpu, costs.client / 2)
        done += 1

    def process() -> Generator[Any, Any, None]:
        while True:
            yield env.all_of([env.process(unit()) for _ in range(min(batch, fleet.IN_FLIGHT))])

    for _ in range(processes):
        env.process(process())
    env.run(seconds)
    return done / seconds


# --- what is measured -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def far(endpoint: str, seconds: float) -> Iterator[str]:
    """A link to a server that hands each request on so much later; gives the endpoint of its near end."""
    target = urlsplit(endpoint)

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wait: float) -> None:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(4096)  # a link is as wide as it is long

        async def hand_on() -> None:
            while True:
                due, data = await under_way.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                if not data:
                    return
                writer.write(data)
                await writer.drain()

        handing = asyncio.ensure_future(hand_on())
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while data := await reader.read(1 << 18):
                await under_way.put((loop.time() + wait, data))
        with contextlib.suppress(ConnectionError, RuntimeError, asyncio.CancelledError):
            await under_way.put((loop.time() + wait, b""))
            await handing
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(target.hostname, target.port)
        await asyncio.gather(pipe(reader, up_writer, seconds), pipe(up_reader, writer, 0))

    loop = asyncio.new_event_loop()
    ready: list[int] = []
    begun = threading.Event()

    async def serve() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        ready.append(server.sockets[0].getsockname()[1])
        begun.set()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    begun.wait()
    yield f"http://127.0.0.1:{ready[0]}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)


def recipe() -> actcache.Recipe:
    return actcache.Recipe(model="scale", layer=1, hidden_size=HIDDEN, dtype="float16")


def keys(first: int, count: int) -> list[bytes]:
    return [actcache.document_key(f"document {first + number}") for number in range(count)]


def worker(given: dict[str, Any]) -> None:
    """Open, say "ready", wait for a line, work, and print what was done: the body of one of the processes."""
    requests = Requests()
    with actcache.open(given["url"], **given["options"]) as store, store.space(recipe()) as space:
        rng = np.random.default_rng(given["number"])
        rows = np.zeros((given["tokens"], HIDDEN), np.float16)
        known = keys(0, DOCUMENTS)
        if given["kind"] == "replay":
            space.get(known[:1])
        else:  # the first flush looks at what is there
            space.put(keys(10**9 * (given["number"] + 1) - 8, 8), [rows] * 8)
            space.flush()
        print("ready", flush=True)
        sys.stdin.readline()
        requests.count, done, cpu, begin = 0, 0, _cpu(), time.perf_counter()
        while time.perf_counter() - begin < given["seconds"]:
            if given["kind"] == "replay":
                space.get([known[n] for n in rng.choice(DOCUMENTS, given["batch"], replace=False)])
                done = requests.count
            else:
                space.put(keys(10**9 * (given["number"] + 1) + done * 8, 8), [rows] * 8)
                space.flush()
                done += 1
        spent = time.perf_counter() - begin
        each = {"cpu": (_cpu() - cpu) / done, "requests": requests.count / done}
        print(json.dumps({"done": done, "seconds": spent, **each}), flush=True)
        requests.stop()


def measure(
    kind: str, url: str, options: dict[str, Any], processes: int, seconds: float, **more: Any
) -> dict[str, float]:
    """Return how many units a second some processes did, and the client's processor seconds of one."""
    running = []
    for number in range(processes):
        given = {"kind": kind, "url": url, "options": options, "number": number, "seconds": seconds, **more}
        command = [sys.executable, "-m", "bench.scale", "--worker", json.dumps(given)]
        running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    pipes = [(process.stdin, process.stdout) for process in running]
    for _, told in pipes:
        assert told is not None
        assert told.readline() == "ready\n", "a worker failed"
    for go, _ in pipes:
        assert go is not None
        go.write("go\n")
        go.flush()
    answers = [json.loads(told.readline()) for _, told in pipes if told is not None]
    for process in running:
        process.communicate()
    rate = sum(answer["done"] / answer["seconds"] for answer in answers)
    console.print(f"  {kind}: {processes} processes, {more['batch']} in flight each: {rate:.1f} a second")
    return {"rate": rate, **{name: float(np.mean([one[name] for one in answers])) for name in ("cpu", "requests")}}


@dataclass(frozen=True)
class Cell:
    kind: str
    processes: int
    batch: int
    measured: float
    predicted: float
    calibration: bool = False

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def compare(
    machine: Machine,
    latency: float,
    seconds: float,
    processes: Sequence[int],
    batches: Sequence[int],
    kinds: Sequence[str],
) -> list[Cell]:
    """Measure all cells, and predict all but the first of each kind."""
    cells: list[Cell] = []
    with bucket() as made, far(made.endpoint, latency) as near:
        console.print(f"{made.server}, {latency * 1e3:.0f} ms away; {machine.cores} cores, {machine.workers} workers")
        options = {**made.options, "endpoint_url": near}
        url = f"s3://{made.name}/scale"
        rng = np.random.default_rng(0)
        with actcache.open(url, **options) as store, store.space(recipe()) as space:
            rows = [rng.standard_normal((TOKENS, HIDDEN)).astype(np.float16) for _ in range(50)]
            # Two entries of one batch should not lie side by side and come with one request.
            for first in range(0, DOCUMENTS, 50):
                space.put(keys(first, 50), rows)
        for kind in kinds:
            grid = [(p, b) for b in batches for p in processes] if kind == "replay" else [(p, 1) for p in processes]
            tokens = TOKENS if kind == "replay" else 40 * TOKENS
            rounds = [
                [measure(kind, url, options, p, seconds, batch=b, tokens=tokens) for p, b in grid]
                for _ in range(ROUNDS)
            ]
            found = [max(one, key=lambda done: done["rate"]) for one in zip(*rounds, strict=True)]
            costs = calibrated(found[0], latency)
            known = {grid[0]}
            if kind == "fill":  # of which the server waits for its disk, too: how long, the most processes tell
                known.add(grid[-1])
                costs = waiting_too(costs, machine, grid[-1][0], found[-1]["rate"])
            own, its, waiting = costs.client * 1e3, costs.server * 1e3, costs.latency * 1e3
            console.print(f"{kind}: {own:.2f} ms of client, {its:.2f} ms of server, {waiting:.0f} ms of waiting")
            for (count, batch), one in zip(grid, found, strict=True):
                predicted = simulate(costs, machine, count, batch, max(30.0, 200 / one["rate"]))
                cells.append(Cell(kind, count, batch, one["rate"], predicted, calibration=(count, batch) in known))
    return cells


def calibrated(found: dict[str, float], latency: float) -> Costs:
    """Return the costs that one process with one unit under way tells; the requests of a flush follow each other."""
    waiting = latency * found["requests"]
    return Costs(found["cpu"], max(1e-5, 1 / found["rate"] - found["cpu"] - waiting), waiting)


def waiting_too(costs: Costs, machine: Machine, processes: int, rate: float) -> Costs:
    """Return the costs with as much of the server's time as waiting as makes so many processes that fast."""
    least, most = 0.0, costs.server - 1e-5
    for _ in range(12):
        idle = (least + most) / 2
        moved = Costs(costs.client, costs.server - idle, costs.latency + idle)
        if simulate(moved, machine, processes, 1, max(30.0, 200 / rate)) < rate:
            least = idle
        else:
            most = idle
    return Costs(costs.client, costs.server - least, costs.latency + least)


def show(cells: Sequence[Cell]) -> None:
    table = Table(title="units a second: requests of a replay, flushes of a fill (8 documents of 1.9 MiB)")
    for column in ("", "processes", "in flight each", "measured", "simulated", "off by"):
        table.add_column(column, justify="left" if not column else "right")
    for one in cells:
        off = "calibrated" if one.calibration else f"{one.error:+.0%}"
        row = (one.kind, str(one.processes), str(one.batch), f"{one.measured:,.1f}", f"{one.predicted:,.1f}", off)
        table.add_row(*row)
    console.print(table)


# --- what arithmetic says ---------------------------------------------------------------------------------------------


def paper(seconds: float = 5.0) -> list[tuple[str, float, float]]:
    """Return what bounds a node of eight processes, its requests a second by arithmetic and by simulation."""
    shapes = {
        "requests in flight": fleet.Nodes(1),
        "the processors": fleet.Nodes(1, cores=4, request_cpu=1e-3),
        "far away": fleet.Nodes(1, request_seconds=0.2),
    }
    found = []
    for name, node in shapes.items():
        nbytes = 1e5
        costs = Costs(node.request_cpu + nbytes * node.byte_cpu, 0.0, node.request_seconds + nbytes / node.stream)
        arithmetic = min(fleet.request_rates(node, nbytes).values())
        machine = Machine(node.cores, 1 << 20, shared=False)
        found.append((name, arithmetic, simulate(costs, machine, node.devices, fleet.IN_FLIGHT, seconds)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--paper", action="store_true", help="no server: arithmetic beside simulation")
    parser.add_argument("--latency", type=float, default=0.2, help="seconds that each request waits")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each cell")
    parser.add_argument("--kinds", default="replay,fill")
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--batches", default="1,2,4")
    parser.add_argument("--workers", type=int, default=1, help="requests that the server works on at a time")
    parser.add_argument("--within", type=float, default=0.35, help="how far the worst prediction may be off")
    given = parser.parse_args()
    if given.worker:
        worker(json.loads(given.worker))
        return
    if given.paper:
        for name, arithmetic, simulated in paper():
            console.print(f"{name}: {arithmetic:,.0f} requests a second by arithmetic, {simulated:,.0f} simulated")
        return
    machine = Machine(len(os.sched_getaffinity(0)), given.workers)
    lists = [[int(one) for one in text.split(",")] for text in (given.processes, given.batches)]
    cells = compare(machine, given.latency, given.seconds, *lists, given.kinds.split(","))
    show(cells)
    worst = max((one for one in cells if not one.calibration), key=lambda one: abs(one.error))
    cell = f"{worst.kind}, {worst.processes} processes, batches of {worst.batch}"
    off = f"the worst prediction is off by {worst.error:+.0%}: {cell}"
    console.print(off)
    if abs(worst.error) > given.within:
        sys.exit(f"{off}; {given.within:.0%} was allowed")


if __name__ == "__main__":
    main()

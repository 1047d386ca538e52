"""Where the time of a batch goes, and whether what is shared is the limit: the interpreter's lock (GIL), other locks.

    python -m bench.stages --batch 1,32,1024 --threads 1,2 --callers 1,2

So many threads of Python (``--callers``) call ``read_into`` of one space at once, each with batches and a buffer of its
own, and so many threads share each call of the compiled loops (``--threads``); then the iterated reader, with its
thread. Warm, shuffled, padded, checksums on. Everything is counted, over whole turns, and divided by the batches:

- *us a batch*: from the first caller's start to the last one's end, divided by the batches of all callers. Where
  nothing shared is the limit, two callers on two free processors need half as much as one: 2 in *as fast as one*.
- *GIL*: how long the GIL is held, at most: the processor time of all threads of Python, less that inside of the
  compiled loops, which do not hold it. However many processors a machine has, a process reads no more than one batch in
  that time.
- *native*: processor time in the compiled loops, of callers and helpers; *waits*: how long a caller was inside of them
  and did not run: for its helpers to finish, for a lock, or for a processor.
- *sleeps*: how often a thread went to sleep, for a lock, for another's work or for the next batch (voluntary context
  switches); *helpers'*: that they found no more work. *preempted*: how often a thread that could run had to stop, which
  is other work on the machine.

It needs Linux. A sampling profiler tells the same of the GIL from outside: ``py-spy record --gil --pid ...``.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from actcache.admin.benchmark import rounds
from actcache.admin.benchmark.corpus import SHAPES, Documents, StoredCorpus
from actcache.admin.benchmark.rounds import Spread
from actcache.io import loops
from actcache.io.workers import available_cpus
from actcache.store.space import Space
from bench.metered import epoch_seconds
from bench.report import Cell, Report
from bench.threads import counts_of, sharing

_TURN = 64 << 20  # bytes of rows of a turn, at most
_MOST = 500  # batches of a turn

COLUMNS = ("GIL, us", "of the time", "native, us", "waits, us")
COUNTS = ("calls of the loops", "sleeps", "helpers' sleeps", "preempted")


@dataclass
class Spent:
    """What was spent while it was watched: seconds, and counts."""

    wall: float = 0.0
    python: float = 0.0  # of the processor, by all threads that are no helpers, the compiled loops included
    inside: float = 0.0  # of that, in the compiled loops
    helpers: float = 0.0  # of the processor, by the threads of the compiled loops
    waited: float = 0.0  # in the compiled loops, without the processor
    calls: int = 0  # of the compiled loops
    sleeps: int = 0  # of threads that are no helpers
    helpers_sleeps: int = 0
    preempted: int = 0

    def add(self, other: Spent) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def times(self, batches: int) -> list[Cell]:
        """Return what a batch took: ``COLUMNS``."""
        gil, us = max(0.0, self.python - self.inside), 1e6 / batches
        return [gil * us, gil / self.wall, (self.inside + self.helpers) * us, self.waited * us]

    def counts(self, batches: int) -> list[Cell]:
        """Return what a batch counted: ``COUNTS``."""
        return [count / batches for count in (self.calls, self.sleeps, self.helpers_sleeps, self.preempted)]


class Watch:
    """Watches what a process spends. Made when the helpers of the compiled loops are there, which stay for good."""

    def __init__(self) -> None:
        # Threads of Python come and go; helpers are those that take no signals.
        blocking = {task: int(_status(task, "SigBlk"), 16) for task in os.listdir("/proc/self/task")}
        self._helpers = [task for task, blocked in blocking.items() if blocked >> (signal.SIGTERM - 1) & 1]
        self._spent = dict.fromkeys(self._helpers, (0.0, 0))  # of the processor, and sleeps, when each was seen last

    @contextmanager
    def watching(self, spent: Spent) -> Iterator[None]:
        """Add what is spent inside to ``spent``; one at a time."""
        timed = _Timed(loops._library)
        before = self._now()
        with mock.patch.object(loops, "_library", timed):
            yield
        wall, processor, switches, preempted, helpers, sleeps = (
            after - given for after, given in zip(self._now(), before, strict=True)
        )
        inside, passed, calls = timed.total()
        counts = int(switches - sleeps), int(sleeps), int(preempted)
        spent.add(Spent(wall, processor - helpers, inside, helpers, max(0.0, passed - inside), calls, *counts))

    def _now(self) -> tuple[float, ...]:
        """Return the wall's seconds; the process's of the processor, sleeps, preemptions; the helpers' seconds and
        sleeps."""
        for task in self._helpers:
            # One that is no helper, but another library's thread, may have ended.
            with suppress(FileNotFoundError, ProcessLookupError):
                ran = Path(f"/proc/self/task/{task}/schedstat").read_text(encoding="ascii").split()[0]
                self._spent[task] = int(ran) / 1e9, int(_status(task, "voluntary_ctxt_switches"))
        seconds, sleeps = (sum(of) for of in zip((0.0, 0), *self._spent.values(), strict=True))
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return time.perf_counter(), time.process_time(), usage.ru_nvcsw, usage.ru_nivcsw, seconds, sleeps


def _status(task: str, field: str) -> str:
    """Return a field of what Linux tells of a thread; "0" where the thread has just ended."""
    try:
        text = Path(f"/proc/self/task/{task}/status").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "0"
    return text.partition(f"\n{field}:")[2].split()[0]


class _Timed:
    """The compiled library; notes what its functions take, of the wall's time and of the calling thread's."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._noted: list[tuple[float, float]] = []  # appended to by many threads, which is safe

    def total(self) -> tuple[float, float, int]:
        return sum(ran for ran, _ in self._noted), sum(passed for _, passed in self._noted), len(self._noted)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._library, name)

        def timed(*arguments: Any) -> Any:
            start, begun = time.perf_counter(), time.thread_time()
            result = function(*arguments)
            ran = time.thread_time() - begun
            self._noted.append((ran, time.perf_counter() - start))
            return result

        setattr(self, name, timed)
        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="short", help="short (8-48 tokens x 384), paper (60-512 x 768)")
    parser.add_argument("--backends", default="hdf5", help="hdf5, zarr, lmdb")
    parser.add_argument("--batch", default="1,32,1024", help="documents of a batch")
    parser.add_argument("--threads", help="that share a batch, as 1,2,4; those that there are processors for")
    parser.add_argument("--callers", default="1,2", help="threads that read at once")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the corpus")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dir", type=Path, help="where to put the corpus (removed afterwards)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    if loops.missing:
        raise SystemExit(f"there are no compiled loops to watch: {loops.missing}")
    report = Report()
    counts, too_many = counts_of(options.threads)
    if too_many:
        report.say(f"left out: {too_many} threads, for this machine has {available_cpus()} processors")
    folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=options.dir))
    try:
        urls = {name: f"{name}:{folder / name}" for name in options.backends.split(",")}
        corpus = StoredCorpus(Documents(SHAPES[options.shape], int(options.gib * 2**30)), urls, {})
        for name in urls:
            with corpus.open(name) as space:
                for size in map(int, options.batch.split(",")):
                    ways = _ways(corpus, space, size, [int(n) for n in options.callers.split(",")])
                    title = f"{options.shape}, {name}, warm, padded: batches of {size}"
                    times, counted = _rows(ways, counts, options.rounds)
                    report.table(title, ("", "us a batch", "as fast as one", *COLUMNS), times)
                    report.table(f"{title}; each batch", ("", *COUNTS), counted)
    finally:
        shutil.rmtree(folder)
    report.save(options.json)


@dataclass(frozen=True)
class Way:
    """One way to read: ``prepare(turn)`` returns what reads ``batches`` batches and returns the seconds of that."""

    name: str
    batches: int
    prepare: Callable[[int], Callable[[], float]]


def _ways(corpus: StoredCorpus, space: Space, size: int, callers: list[int]) -> list[Way]:
    bytes_of_batch = float(corpus.lengths.mean()) * corpus.shape.row_bytes * size
    each = int(min(_MOST, max(8, _TURN / bytes_of_batch)))
    outs = [np.full((size, corpus.shape.longest, corpus.shape.hidden), 0, np.float16) for _ in range(max(callers))]
    pool = ThreadPoolExecutor(max(callers), thread_name_prefix="bench-caller")
    started = threading.Barrier(max(callers))
    list(pool.map(lambda _: started.wait(60), outs))

    def read(batches: list[Any], out: Any, ready: threading.Barrier) -> tuple[float, float]:
        ready.wait(60)
        start = time.perf_counter()
        for keys in batches:
            space.read_into(keys, out)
        return start, time.perf_counter()

    def prepare(count: int, number: int) -> Callable[[], float]:
        rng = np.random.default_rng((size, number))
        all_of_them = [
            [corpus.keys[rng.choice(len(corpus.keys), size, replace=False)] for _ in range(each)] for _ in range(count)
        ]

        def together() -> float:
            times = list(pool.map(read, all_of_them, outs[:count], [threading.Barrier(count)] * count))
            return max(end for _, end in times) - min(start for start, _ in times)

        return together

    ways = [Way(f"read_into, callers: {count}", each * count, partial(prepare, count)) for count in callers]
    sample = np.random.default_rng(size).choice(len(corpus.keys), min(len(corpus.keys), 4 * each * size), replace=False)
    reader = space.reader(corpus.keys[sample], batch_size=size, shuffle=True, layout="padded")
    return [*ways, Way("reader", len(reader), lambda number: partial(epoch_seconds, reader, number))]


def _rows(ways: list[Way], counts: list[int], rounds_: int) -> tuple[list[list[Cell]], list[list[Cell]]]:
    """Take turns over the ways and numbers of threads; return the rows of the times and of the counts."""
    for threads in counts:
        with sharing(threads):
            for way in ways:
                way.prepare(0)()  # starts the helpers, and maps every page that is read again
    watched = Watched(Watch())
    turns = {f"{way.name}, threads: {n}": partial(watched.turn, n, way) for n in counts for way in ways}
    seconds = rounds.take_turns(turns, rounds_)
    times: list[list[Cell]] = []
    counted: list[list[Cell]] = []
    for threads in counts:
        first = seconds[f"{ways[0].name}, threads: {threads}"]
        for way in ways:
            name = f"{way.name}, threads: {threads}"
            spent, batches = watched.spent[threads, way.name]
            us, ratio = Spread.of(seconds[name] * 1e6), Spread.of(first / seconds[name])
            times.append([name, us, ratio, *spent.times(batches)])
            counted.append([name, *spent.counts(batches)])
    return times, counted


class Watched:
    """Adds up what the turns of each way spend.

    Attributes:
        spent: by the number of threads and the name of the way; and the batches that were read in it.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self.spent: dict[tuple[int, str], tuple[Spent, int]] = {}

    def turn(self, threads: int, way: Way, number: int) -> float:
        spent, batches = self.spent.get((threads, way.name), (Spent(), 0))
        run = way.prepare(number)
        with sharing(threads), self._watch.watching(spent):
            seconds = run()
        self.spent[threads, way.name] = spent, batches + way.batches
        return seconds / way.batches


if __name__ == "__main__":
    main()

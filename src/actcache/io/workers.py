"""A few threads that share the native calls of one batch, and a lock for what threads and forks share."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

_MOST = 8  # gathering is bound by memory bandwidth, which a few cores use up


def available_cpus() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ProcessLock:
    """A lock that is free after a fork, whoever held it before: that thread is not there any more."""

    def __init__(self) -> None:
        self._lock, self._pid = threading.Lock(), os.getpid()

    def __enter__(self) -> None:
        if self._pid != os.getpid():  # a fork has one thread
            self._lock, self._pid = threading.Lock(), os.getpid()
        self._lock.acquire()

    def __exit__(self, *failure: object) -> None:
        self._lock.release()


class Workers:
    """Runs the numbered jobs of a batch on the calling thread and some others. Thread-safe; usable after a fork."""

    def __init__(self, threads: int | None = None) -> None:
        self._helpers = min(threads or available_cpus(), _MOST) - 1
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._pid = -1

    def run(self, job: Callable[[int], None], count: int) -> None:
        """Call ``job(0)`` ... ``job(count - 1)``, a run of neighbours on each thread; return when all have ended.

        The first exception of a job is raised here, after the jobs that run have ended; jobs not yet begun are dropped.
        """
        threads = min(self._helpers + 1, count)
        failed = threading.Event()

        def work(thread: int) -> None:
            for number in range(count * thread // threads, count * (thread + 1) // threads):
                if failed.is_set():
                    return
                try:
                    job(number)
                except BaseException:
                    failed.set()
                    raise

        futures, mine = [], [0] if threads else []
        for thread in range(1, threads):
            try:
                futures.append(self._executor().submit(work, thread))
            except RuntimeError:  # closed by another thread just now, or the interpreter is ending
                mine.append(thread)
        try:
            for thread in mine:
                work(thread)
        finally:
            wait(futures)
        for future in futures:
            future.result()

    def run_chunks(self, steps: Sequence[Callable[[int, int], None]], chunks: Iterable[slice]) -> None:
        """Call all ``steps``, one after another, with the bounds of each chunk, as ``run`` calls its jobs."""
        bounds = [(chunk.start, chunk.stop) for chunk in chunks]

        def job(number: int) -> None:
            for step in steps:
                step(*bounds[number])

        self.run(job, len(bounds))

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._pid != os.getpid():  # threads do not survive a fork
                self._pool = ThreadPoolExecutor(self._helpers, thread_name_prefix="actcache-read")
                self._pid = os.getpid()
            return self._pool

    def close(self) -> None:
        """End the threads, after the jobs that run."""
        with self._lock:
            pool, self._pool = self._pool, None
            if pool is not None and self._pid == os.getpid():
                pool.shutdown()

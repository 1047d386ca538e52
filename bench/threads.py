"""How many threads share the compiled loops of a read: what ``--threads`` of a benchmark sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from actcache.io import loops
from actcache.io.workers import available_cpus


def counts_of(text: str | None) -> tuple[list[int], list[int]]:
    """Return the numbers of threads of ``--threads 1,2,4``, and those that this machine has no processors for.

    Not given: what the package does by itself.
    """
    if text is None:
        return [loops.THREADS], []
    wanted = [loops.threads_asked_for(part) for part in text.split(",")]
    return [n for n in wanted if n <= available_cpus()], [n for n in wanted if n > available_cpus()]


@contextmanager
def sharing(threads: int) -> Iterator[None]:
    """Have so many threads share each call of the compiled loops, in all spaces of the process."""
    given, loops.THREADS = loops.THREADS, threads
    try:
        yield
    finally:
        loops.THREADS = given

"""Waiting for threads and processes. No deadline says how fast something is, only that it does not hang."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

#: Seconds after which something hangs, on a machine that is busy with other things.
DEADLINE = 90.0


def until(there: Callable[[], Any], seconds: float = DEADLINE) -> None:
    """Wait until ``there()`` holds; fail where it never does."""
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


@contextlib.contextmanager
def no_hang(seconds: float = DEADLINE) -> Iterator[None]:
    """Fail where what is inside takes so long that it must have waited for nothing."""
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < seconds, "it hung"


def ours(prefix: str = "actcache") -> set[threading.Thread]:
    """The threads of the package that run now."""
    return {thread for thread in threading.enumerate() if thread.name.startswith(prefix)}


def ended(before: set[threading.Thread], prefix: str = "actcache") -> None:
    """Wait until no thread of the package runs but those from before, which are another test's."""

    def there() -> bool:
        gc.collect()
        return ours(prefix) <= before

    until(there)


def calls(function: Callable[[], Any]) -> int:
    """Call it, and return how many functions that called, in Python or C: what its work grows with, on any machine."""
    count = 0

    def counted(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count

"""After every test here: no thread of the package runs, and no file of a store or cache is open."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest

_SECONDS = 60.0  # on a machine that is busy with other things


def threads() -> set[str]:
    return {f"{thread.name} {thread.ident}" for thread in threading.enumerate() if thread.name.startswith("actcache")}


def files() -> set[str]:
    """Open files and folders, by descriptor; pipes, sockets and devices are other people's."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:  # the one that listed them
            continue
        if target.startswith("/") and not target.startswith(("/dev/", "/proc/")):
            found.add(f"{descriptor} {target}")
    return found


@pytest.fixture(autouse=True)
def nothing_stays_open():
    before = threads(), files()
    yield
    deadline = time.monotonic() + _SECONDS
    while (left := (threads() - before[0], files() - before[1])) != (set(), set()) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert left == (set(), set())

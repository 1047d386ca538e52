"""The page cache of the whole machine, which cold reads are not to find anything in, and the memory that it takes."""

from __future__ import annotations

import os
from pathlib import Path

from actcache.admin.benchmark.caches import evict

#: The least free blocks that Linux gives back to the host of a virtual machine, as a power of two of pages.
_REPORTED = Path("/sys/module/page_reporting/parameters/page_reporting_order")
_LARGEST = 10  # such blocks that there are, where pages have 4 KiB


def memory_that_goes() -> str:
    """Return what to know of a machine whose free memory is not at hand; empty where nothing says that it is such."""
    try:
        given_back = int(_REPORTED.read_text(encoding="ascii")) <= _LARGEST
    except (OSError, ValueError):
        return ""
    if not given_back:
        return ""
    return (
        "this machine may give free memory back to a host, and be slow to get it again (0.3 GB/s were seen): figures "
        f"swing with what it has at hand. As root, until it starts again: echo {_LARGEST + 1} > {_REPORTED}"
    )


def drop_caches(folder: Path) -> None:
    """Empty the page cache: all of it as root, else of the files in a folder, whose names and sizes stay known."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
    except OSError:
        evict(folder)

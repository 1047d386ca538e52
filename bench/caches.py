"""The page cache of the whole machine, which cold reads are not to find anything in."""

from __future__ import annotations

import os
from pathlib import Path

from actcache.admin.benchmark.caches import evict


def drop_caches(folder: Path) -> None:
    """Empty the page cache: all of it as root, else of the files in a folder, whose names and sizes stay known."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
    except OSError:
        evict(folder)

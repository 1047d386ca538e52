"""The page cache, which a cold read must not find anything in."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

_PATIENCE = 5.0  # seconds for the thread of an iteration that was broken off


def drop_caches(folder: Path) -> None:
    """Empty the page cache: all of it as root, else of the files in a folder, whose names and sizes stay known."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        for path in folder.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def refuse_mappings(folders: list[Path]) -> None:
    """Make sure that nothing of a store is still mapped, which would keep its pages in memory."""
    end = time.monotonic() + _PATIENCE
    while kept := _mapped(folders):
        if time.monotonic() > end:
            raise RuntimeError(f"{kept[0]} is still mapped; its pages cannot be dropped")
        gc.collect()  # a mapping goes with the last array over it
        time.sleep(0.01)


def _mapped(folders: list[Path]) -> list[str]:
    mapped = Path("/proc/self/maps").read_text()
    return [str(folder) for folder in folders if f"{folder}/" in mapped]

"""The page cache, which a cold read must not find anything in."""

from __future__ import annotations

import os
from pathlib import Path


def drop_caches() -> None:
    """Empty the page cache. Needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def refuse_mappings(folders: list[Path]) -> None:
    """Make sure that nothing of a store is still mapped, which would keep its pages in memory."""
    mapped = Path("/proc/self/maps").read_text()
    kept = [str(folder) for folder in folders if f"{folder}/" in mapped]
    if kept:
        raise RuntimeError(f"{kept[0]} is still mapped; its pages cannot be dropped")

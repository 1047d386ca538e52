"""The page cache, which a cold read must not find anything in."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from actcache.errors import StorageIOError

_MAPS = Path("/proc/self/maps")


def evict(folder: Path) -> None:
    """Ask the kernel to forget the contents of the files in a folder, which needs no rights; others' stay as they are.

    Pages that are not on the medium yet stay, and so do mapped ones; ``resident`` says what did.
    """
    for path in _files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def resident(folder: Path) -> float:
    """Return the share of a folder's files that is in memory, 0 to 1; ``mincore`` tells whoever may write them."""
    pages = there = 0
    for path in _files(folder):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                continue
            with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as memory:
                states = _states(memory, size)
            pages, there = pages + len(states), there + int((states & 1).sum())
    return there / pages if pages else 0.0


def evict_surely(folder: Path, tolerated: float) -> float:
    """Evict until at most a share of the pages are left; return the share.

    Raises:
        StorageIOError: more stays, as it does where the file system is memory or has a cache of its own.
    """
    for _ in range(20):  # the kernel writes back and lets go of pages on its own time
        evict(folder)
        left = resident(folder)
        if left <= tolerated:
            return left
        time.sleep(0.05)
    raise StorageIOError(
        f"{left:.0%} of the pages of {folder} stayed in memory when they were dropped, so nothing there is read cold; "
        "take a folder on a disk, or measure warm"
    )


def refuse_mappings(folders: list[Path]) -> None:
    """Make sure that nothing of a store is still mapped, which would keep its pages in memory."""
    end = time.monotonic() + 5.0  # seconds for the thread of an iteration that was broken off
    while kept := [str(folder) for folder in folders if os.fsencode(folder) + b"/" in _MAPS.read_bytes()]:
        if time.monotonic() > end:
            raise StorageIOError(f"{kept[0]} is still mapped; its pages cannot be dropped")
        gc.collect()  # a mapping goes with the last array over it
        time.sleep(0.01)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _states(memory: mmap.mmap, size: int) -> np.ndarray:
    """Return a byte a page, of which the lowest bit says whether it is in memory."""
    states = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    bytes_of = np.frombuffer(memory, np.uint8)
    address, length = ctypes.c_void_p(bytes_of.ctypes.data), ctypes.c_size_t(size)
    del bytes_of  # else the mapping could not be closed
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(address, length, ctypes.c_void_p(states.ctypes.data)):
        raise StorageIOError(f"mincore: {os.strerror(ctypes.get_errno())}")
    return states

"""What the kernel is told of mapped rows that are read soon."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_PAGE = mmap.PAGESIZE
# Linux 5.10 and later, the same number on every architecture; the C libraries have no name for it.
_PROCESS_MADVISE = 440
_MOST_RANGES = 1024  # of one call
_LOOKS = 64  # pages that are looked at before a batch is asked for

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.syscall.restype = ctypes.c_long
if hasattr(_libc, "mincore"):
    _libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

_in_one_call = hasattr(os, "pidfd_open") and hasattr(_libc, "syscall")


def will_need(addresses: NDArray[np.int64], nbytes: NDArray[np.int64]) -> None:
    """Ask for ranges of whole pages, ``[n]`` each; returns at once.

    For many of them a system call each costs more than reading warm rows.
    """
    global _in_one_call
    if _in_one_call:
        ranges = np.ascontiguousarray(np.stack([addresses, nbytes], axis=1), np.uint64)
        me = os.pidfd_open(os.getpid())
        try:
            for start in range(0, len(ranges), _MOST_RANGES):
                some = ranges[start : start + _MOST_RANGES]
                arguments = ctypes.c_int(me), ctypes.c_void_p(some.ctypes.data), ctypes.c_size_t(len(some))
                if _libc.syscall(ctypes.c_long(_PROCESS_MADVISE), *arguments, mmap.MADV_WILLNEED, 0) < 0:
                    _in_one_call = False  # an older kernel, or one that asks for a privilege
                    break
        finally:
            os.close(me)
    if not _in_one_call:
        for address, length in zip(addresses.tolist(), nbytes.tolist(), strict=True):
            _libc.madvise(address, length, mmap.MADV_WILLNEED)


def tells(path: Path) -> bool:
    """Return whether the kernel tells this process which pages of a file are in memory.

    Of a file that is neither its own nor one that it may write, Linux says that all of them are (mincore(2)).
    """
    if not hasattr(_libc, "mincore"):
        return False
    effective = os.access in os.supports_effective_ids
    return os.stat(path).st_uid == os.geteuid() or os.access(path, os.W_OK, effective_ids=effective)


def in_memory(addresses: NDArray[np.int64], nbytes: NDArray[np.int64]) -> bool:
    """Return whether ranges of whole pages seem to be in memory: some pages, evenly spread over them, all are.

    Asking for what is there costs the kernel a walk over every range: for a thousand of them three times what a look
    costs. Where one page in twenty is not there, this is wrong once in twenty-seven times (0.95 to the power of 64),
    and the read then waits for those.
    """
    ends = np.cumsum(nbytes // _PAGE)
    pages = np.linspace(0, int(ends[-1]) - 1, min(_LOOKS, int(ends[-1])), dtype=np.int64)
    which = np.searchsorted(ends, pages, side="right")
    places = addresses[which] + nbytes[which] - (ends[which] - pages) * _PAGE
    state = ctypes.create_string_buffer(1)
    return all(_libc.mincore(place, _PAGE, state) == 0 and state.raw[0] & 1 for place in places.tolist())

"""Mapped files: an arena of rows that lie in many files, addressable as one array, and what the kernel is told of them.

Files are mapped side by side into one reserved range of addresses, each placed so that its first row falls on a whole
row of the range; so a batch that is spread over a thousand segments is one native gather over one array. Row 0 of the
range is zeros; it stands for padding. Python's ``mmap`` cannot choose addresses, so ``ctypes`` makes the system call.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache.errors import FormatError, StorageIOError

_PAGE = mmap.PAGESIZE
_HUGE = 2 << 20  # bytes of a huge page, of x86 and of ARM with small pages
_MAP_FIXED = 0x10  # Linux and macOS
_MAP_NORESERVE = 0x4000 if os.uname().sysname == "Linux" else 0x40
_PROT_NONE = 0
_FAILED = ctypes.c_void_p(-1).value
_FIRST_RESERVATION = 64 << 30
_LEAST_RESERVATION = 1 << 20

_MREMAP_MAYMOVE_FIXED = 3
# Linux 5.10 and later, the same number on every architecture; the C libraries have no name for it.
_PROCESS_MADVISE = 440
_MOST_RANGES = 1024  # of one call

_libc = ctypes.CDLL(None, use_errno=True)
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_libc.mmap.restype, _libc.mmap.argtypes = _POINTER, (_POINTER, _SIZE, _INT, _INT, _INT, ctypes.c_longlong)
_libc.munmap.argtypes = (_POINTER, _SIZE)
_libc.madvise.argtypes = (_POINTER, _SIZE, _INT)
_libc.syscall.restype = ctypes.c_long
if hasattr(_libc, "mremap"):
    _libc.mremap.restype, _libc.mremap.argtypes = _POINTER, (_POINTER, _SIZE, _SIZE, _INT, _POINTER)
if hasattr(_libc, "mincore"):
    _libc.mincore.argtypes = (_POINTER, _SIZE, _POINTER)

_NO_MEMORY = (
    ": the process has too many mappings (compact the space) or too little address space (ulimit -v); "
    "a store that is opened with mapped=False needs neither"
)
_in_one_call = hasattr(os, "pidfd_open") and hasattr(_libc, "syscall")


def will_need(addresses: NDArray[np.int64], nbytes: NDArray[np.int64]) -> None:
    """Ask for ranges of whole pages, ``[n]`` each; returns at once. A system call for each would cost more than reading
    warm rows."""
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


def _mmap(address: int | None, length: int, protection: int, flags: int, descriptor: int = -1, offset: int = 0) -> int:
    result = _libc.mmap(address, length, protection, flags, descriptor, offset)
    if result == _FAILED or result is None:
        raise _failure(f"cannot map {length} bytes")
    return int(result)


def _failure(what: str) -> StorageIOError:
    code = ctypes.get_errno()
    return StorageIOError(f"{what}: {os.strerror(code)}{_NO_MEMORY if code == errno.ENOMEM else ''}")


def _check_size(path: Path, size: int, needed: int) -> None:
    if size < needed:
        raise FormatError(f"{path} is truncated: it has {size} bytes and should have {needed} or more")


class _Range:
    """A reserved range of addresses, from a multiple of ``_HUGE`` on; given back when nothing refers to it any more."""

    def __init__(self, length: int) -> None:
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        reserved = _mmap(None, length + _HUGE, _PROT_NONE, anonymous | _MAP_NORESERVE)
        self.length = length
        self.address = -(-reserved // _HUGE) * _HUGE
        self.buffer = (ctypes.c_char * length).from_address(self.address)
        # Arrays made over the buffer keep it alive, and the buffer keeps the mapping.
        # Not at the interpreter's exit: threads that still read would crash it.
        weakref.finalize(self.buffer, _libc.munmap, reserved, length + _HUGE).atexit = False


class Arena:
    """The rows, of ``dtype`` and shape ``trailing``, of one array of every segment of a space, ``[N, *trailing]``.

    Thread-safe. An array that ``rows`` returned stays valid, with all that was placed before, while it is referred to.
    """

    def __init__(self, dtype: str, trailing: tuple[int, ...], reserve: int = _FIRST_RESERVATION) -> None:
        self._dtype = np.dtype(dtype)
        self._trailing = trailing
        self.row_bytes = self._dtype.itemsize * int(np.prod(trailing))
        self._lock = threading.Lock()
        self._placed: list[tuple[Path, int, int, int]] = []  # path, file offset, rows, first row in the range
        self._told = True  # of all files that are placed: whether the kernel tells what is in memory
        self._end = 0
        while True:
            try:
                self._grow(reserve)
                break
            except StorageIOError:
                if reserve <= _LEAST_RESERVATION:
                    raise
                reserve //= 8  # the address space is limited

    def _grow(self, length: int) -> None:
        """Move to a longer range. Old arrays keep the old one alive; the new one shows only when all is mapped."""
        grown = _Range(length)
        zeros = -(-self.row_bytes // _PAGE) * _PAGE
        _mmap(grown.address, zeros, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED)
        for path, offset, rows, first in self._placed:
            if hasattr(_libc, "mremap"):
                self._map_again(grown, offset, rows, first)
            else:
                self._map(grown, path, offset, rows, first)
        usable = length // self.row_bytes
        raw = np.frombuffer(memoryview(grown.buffer).cast("B"), np.uint8, usable * self.row_bytes)
        rows_of_range = raw.view(self._dtype).reshape(usable, *self._trailing)
        rows_of_range.flags.writeable = False
        self._end = max(self._end, zeros)
        self._range = grown
        self._rows: NDArray[np.generic] = rows_of_range

    def rows(self) -> NDArray[np.generic]:
        """Return the whole range as one array. Only row 0 and rows that were placed may be touched."""
        return self._rows

    def place(self, path: Path, offset: int, rows: int) -> int:
        """Map the ``rows`` rows at ``offset`` of a file and return the number of their first row.

        Raises:
            FormatError: the file is shorter than that, or its rows cannot be aligned.
            FileNotFoundError: there is none.
        """
        _check_size(path, os.path.getsize(path), offset + rows * self.row_bytes)  # before a range is made for it
        with self._lock:
            shift = offset % _PAGE
            base = self._base_for(offset - shift, shift, rows * self.row_bytes)
            if base is None:
                raise FormatError(f"{path}: rows of {self.row_bytes} bytes at offset {offset} cannot be aligned")
            first = (base + shift) // self.row_bytes
            end = base + shift + rows * self.row_bytes
            if end > self._range.length:
                self._grow(max(2 * self._range.length, 2 * end))
            self._map(self._range, path, offset, rows, first)
            self._end = end
            self._placed.append((path, offset, rows, first))
            self._told = self._told and tells(path)
            return first

    def _base_for(self, offset: int, shift: int, nbytes: int) -> int | None:
        """Return where in the range the page at ``offset`` of a file goes, ``shift`` bytes into which rows begin; None
        where they fall on whole rows of the range nowhere.

        Huge pages of the page cache are mapped as such where they lie in the range as in the file. That is worth some
        addresses, as many as the rows take.
        """
        for unit, most in ((_HUGE, nbytes if nbytes >= _HUGE else 0), (_PAGE, self.row_bytes * _PAGE)):
            base = self._end + (offset - self._end) % unit
            for at in range(base, base + most, unit):
                if (at + shift) % self.row_bytes == 0:
                    return at
        return None

    def _map(self, target: _Range, path: Path, offset: int, rows: int, first: int) -> None:
        nbytes = rows * self.row_bytes
        shift = offset % _PAGE
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Beyond the end of the file a mapping kills the process with SIGBUS.
            _check_size(path, os.fstat(descriptor).st_size, offset + nbytes)
            address, flags = target.address + first * self.row_bytes - shift, mmap.MAP_SHARED | _MAP_FIXED
            _mmap(address, nbytes + shift, mmap.PROT_READ, flags, descriptor, offset - shift)
        finally:
            os.close(descriptor)

    def _map_again(self, target: _Range, offset: int, rows: int, first: int) -> None:
        """Give the mapping of placed rows a second place. The file may have lost its name since."""
        shift = offset % _PAGE
        begin = first * self.row_bytes - shift
        old, new = self._range.address + begin, target.address + begin
        # An old size of zero leaves the old mapping, which arrays in use refer to, where it is.
        if _libc.mremap(old, 0, rows * self.row_bytes + shift, _MREMAP_MAYMOVE_FIXED, new) != new:
            raise _failure(f"cannot move a mapping of {rows} rows")

    @property
    def is_told(self) -> bool:
        """Whether the kernel tells what of this is in memory."""
        return self._told

    def will_need(self, begins: NDArray[np.int64], nbytes: NDArray[np.int64]) -> None:
        """Ask the kernel to load stretches of placed rows, ``nbytes[i]`` from ``begins[i]`` on; returns at once."""
        first, last = begins // _PAGE * _PAGE, -(-(begins + nbytes) // _PAGE) * _PAGE
        will_need(self._range.address + first, last - first)

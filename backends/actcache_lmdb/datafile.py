"""Looks at ``data.mdb`` before LMDB maps it: what is damaged there would crash whoever maps it.

A file that is shorter than its meta pages say would be a SIGBUS. The structure inside is examined by another process.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from actcache.errors import FormatError, StorageIOError

_META = struct.Struct("<IIQQ48s48sQQ")  # magic, version, address, map size, free db, main db, last page, transaction
_PAGE = struct.Struct("<QHHI")  # number, padding, flags, bounds
_DB = struct.Struct("<IHHQQQQQ")  # page size or key size, flags, depth, branch, leaf, overflow pages, entries, root
_MAGIC = 0xBEEFC0DE
_P_META = 0x08
_NO_PAGE = 2**64 - 1
_TRIES = 50
_FROM_OUTSIDE = {
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGKILL,
}  # the signals by which somebody ends a process
_ATTEMPTS = 4  # a writer may change pages under the examination; damage stays
_PAUSE = 0.5


@dataclass(frozen=True)
class Meta:
    """What the newer meta page says."""

    page_size: int
    last_page: int
    transaction: int

    @property
    def nbytes(self) -> int:
        """The bytes that the file has to have."""
        return (self.last_page + 1) * self.page_size


def read_meta(path: Path) -> Meta:
    """Parse both meta pages, and compare the newer one with the size of the file.

    Raises ``OSError``, or ``FormatError`` where they are damaged or of another format than 1, or the file is truncated.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            first = _parse(path, os.pread(descriptor, _PAGE.size + _META.size, 0), 0)
            second = _parse(path, os.pread(descriptor, _PAGE.size + _META.size, first.page_size), 1)
            # Transactions write them in turns. LMDB has no checksum there: a damaged number would make the older one
            # the newer one, and the last transaction would be lost.
            in_turn = abs(first.transaction - second.transaction) == 1
            if first.page_size == second.page_size and (in_turn or first == second):
                break
            time.sleep(0.001)  # somebody is writing just now
        else:
            raise FormatError(f"{path}: its meta pages contradict each other")
        size = os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    meta = max(first, second, key=lambda meta: meta.transaction)
    if meta.last_page < 1 or size < meta.nbytes:
        raise FormatError(f"{path} is truncated: it has {size} bytes and its pages end at {meta.nbytes}")
    return meta


def _parse(path: Path, data: bytes, number: int) -> Meta:
    if len(data) < _PAGE.size + _META.size:
        raise FormatError(f"{path} is truncated: {len(data)} bytes of meta page {number}")
    page, _, flags, _ = _PAGE.unpack_from(data)
    magic, version, _, _, free, main, last, transaction = _META.unpack_from(data, _PAGE.size)
    if page != number or not flags & _P_META or magic != _MAGIC:
        raise FormatError(f"{path}: meta page {number} is damaged, or this is no LMDB file of this kind of machine")
    if version != 1:
        raise FormatError(f"{path} is of LMDB's data format {version}; actcache writes and reads format 1 (LMDB 0.9)")
    page_size = _DB.unpack(free)[0]
    if page_size & (page_size - 1) or not 512 <= page_size <= 65536:
        raise FormatError(f"{path}: meta page {number} is damaged: pages of {page_size} bytes")
    if transaction % 2 != number and transaction:
        raise FormatError(f"{path}: meta page {number} is damaged: it is of transaction {transaction}")
    for root in (_DB.unpack(free)[-1], _DB.unpack(main)[-1]):
        if root != _NO_PAGE and not 2 <= root <= last:
            raise FormatError(f"{path}: meta page {number} is damaged: a root at page {root} of {last}")
    return Meta(page_size, last, transaction)


def examine(folder: Path) -> str | None:
    """Have lmdb's own verifier walk a file in a process of its own; return what is wrong, None where nothing is.

    Raises ``StorageIOError`` where somebody ended the verifier.
    """
    said = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE)
        # From within: the verifier takes no name that the locale's encoding lacks.
        command = [sys.executable, "-m", "lmdb", "verify", "-e", "."]
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            cwd=folder,
            check=False,
            process_group=0,  # what a terminal or a batch system sends to all of this one's group is not for it
        )
        if done.returncode == 0:
            return None
        lines = (done.stdout + done.stderr).strip().splitlines()
        said = lines[-1][:200] if lines else ""
        if done.returncode < 0:
            said = f"the verifier was ended by {signal.Signals(-done.returncode).name}"
            if -done.returncode in _FROM_OUTSIDE:
                raise StorageIOError(f"cannot look for damage in {folder}: {said}; do it again")
    return said or "lmdb's verifier refuses it"

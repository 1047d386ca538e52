"""How much memory the page cache may take: that of the machine, or of the container that the process is in."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available() -> int:
    """Return the bytes that files could take up in memory beside what programs hold."""
    found = [_of_machine(), _of_container()]
    return min((nbytes for nbytes in found if nbytes is not None), default=os.sysconf("SC_PAGE_SIZE") << 20)


def _of_machine() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (OSError, ValueError):
        return None


def _of_container() -> int | None:
    """What its limit leaves beside its programs' memory; files that it has read count against the limit, but go when
    room is needed."""
    own = [line.partition("::")[2] for line in _lines(Path("/proc/self/cgroup")) if line.startswith("0::")]
    for folder in (_CGROUP / own[0].lstrip("/") if own else _CGROUP, _CGROUP):
        limit = _lines(folder / "memory.max")
        if limit and limit[0].isdigit():
            stat = dict(line.split() for line in _lines(folder / "memory.stat"))
            return max(0, int(limit[0]) - int(stat.get("anon", 0)))
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []

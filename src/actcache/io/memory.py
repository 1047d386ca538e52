"""How much memory the page cache may take: that of the machine, or of the container that the process is in."""

from __future__ import annotations

import os
from pathlib import Path

_ROOT, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


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
    found = []
    for line in _lines(_OWN):
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2
            root, limit, held = _ROOT, "memory.max", "anon"
        elif "memory" in controllers.split(","):
            root, limit, held = _ROOT / "memory", "memory.limit_in_bytes", "total_rss"
        else:
            continue
        for folder in (root / path.lstrip("/"), root):  # within a container its own group is the root
            if (most := "".join(_lines(folder / limit))).isdigit():
                stat = dict(line.split() for line in _lines(folder / "memory.stat"))
                found.append(max(0, int(most) - int(stat.get(held, 0))))
                break
    return min(found, default=None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []

"""Facts about this machine and this installation, for bug reports and benchmarks."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?[^;]*(?:;\s*extra\s*==\s*[\"']([^\"']+)[\"'])?")


def installed(name: str) -> str | None:
    """Return the version of a distribution, None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def requirements() -> list[tuple[str, str]]:
    """Return what the distribution requires: (name, extra), the extra empty for what is always required."""
    with suppress(PackageNotFoundError):
        matches = (_REQUIREMENT.match(text) for text in requires("actcache") or ())
        return [(match[1], match[2] or "") for match in matches if match is not None]
    return []


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package, and of what it requires."""
    found = {"actcache": installed("actcache") or "not installed as a distribution"}
    found["python"] = f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})"
    for name in sorted({name for name, _ in requirements()} - {"actcache"}):
        number = installed(name)
        if number is not None:
            found[name] = number
    return found


def facts() -> dict[str, str]:
    """Return system, processors, memory and limits."""

    def limit(kind: int, unit: int = 1) -> str:
        soft = resource.getrlimit(kind)[0]
        return "unlimited" if soft == resource.RLIM_INFINITY else f"{soft // unit:,}"

    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": str(os.cpu_count()),
        "memory": f"{pages * page / (1 << 30):.1f} GiB, pages of {page} bytes",
        "open files": limit(resource.RLIMIT_NOFILE),
        "locked (pinned) memory": f"{limit(resource.RLIMIT_MEMLOCK, 1024)} KiB",
        "temporary folder": tempfile.gettempdir(),
    }


def processor() -> str:
    """Return the processor's name."""
    models = (line for line in _text(Path("/proc/cpuinfo")).splitlines() if line.startswith("model name"))
    name = next(models, "").partition(":")[2].strip()
    return name or platform.processor() or platform.machine()


def disk_of(folder: Path) -> str:
    """Return the block device of a folder, and whether it turns; the kernel's word, which a virtual disk may invent."""
    number = folder.stat().st_dev
    path = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not path.exists():
        return "no block device of this machine"
    device = path.resolve()
    disk = device if (device / "queue").exists() else device.parent  # a partition's queue is its disk's
    model, turns = _text(disk / "device" / "model"), _text(disk / "queue" / "rotational")
    named = f"{device.name} ({model})" if model else device.name
    return f"{named}, {'rotational' if turns == '1' else 'not rotational'}" if turns else named


def _text(path: Path) -> str:
    """Return what the kernel says in a file, nothing where it says nothing."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""

"""Has a bare checkout run as it is where nothing can be installed: no package index, no build tools but a C compiler.

Whoever has installed the project needs none of this.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
_LOOPS = ROOT / "src/actcache/io/loops.c"
#: as hatch_build.py compiles them, which cannot be imported without hatchling
_FLAGS = ["-O2", "-std=c11", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"]


def environment(folder: Path) -> dict[str, str]:
    """Return the environment in which processes find this checkout, its backends and its compiled loops.

    ``folder`` is for what an installation would have written: which backends there are.
    """
    build_loops()
    paths = [str(ROOT), str(ROOT / "src"), str(ROOT / "backends")]
    try:
        metadata.distribution("actcache")
    except metadata.PackageNotFoundError:
        write_metadata(folder)
        paths.append(str(folder))
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def write_metadata(folder: Path) -> None:
    """Write which entry points the project has, as an installation does."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = re.search(r'__version__ = "(.*)"', (ROOT / "src/actcache/__init__.py").read_text())
    version = found[1] if found is not None else "0"
    target = folder / f"actcache-{version}.dist-info"
    target.mkdir(parents=True)
    (target / "METADATA").write_text(f"Metadata-Version: 2.1\nName: actcache\nVersion: {version}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (target / "entry_points.txt").write_text("\n".join(lines) + "\n")


def build_loops() -> None:
    """Compile the loops of the read path, unless that was done after they were changed last."""
    library = _LOOPS.with_name("_loops.dylib" if sys.platform == "darwin" else "_loops.so")
    if library.exists() and library.stat().st_mtime >= _LOOPS.stat().st_mtime:
        return
    compiler = os.environ.get("CC", "").split() or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    if not compiler:
        print("there is no C compiler here: reads go by NumPy, which is slower", file=sys.stderr)
        return
    built = library.with_suffix(f".{os.getpid()}")
    subprocess.run([*compiler, *_FLAGS, str(_LOOPS), "-o", str(built)], check=True)
    built.replace(library)

"""Compiles the loops of the read path (``src/actcache/io/loops.c``) while a wheel is built or the project is installed.

The system's C compiler does it; where there is none, ``ziglang`` does, a package that carries one and is asked for as a
requirement of the build. The library knows nothing of Python, so one wheel serves every Python of a platform.

``ACTCACHE_LOOPS=numpy`` builds without it: a wheel for any platform, whose reads are slow.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("src/actcache/io/loops.c")
LIBRARY = SOURCE.with_name("_loops.dylib" if sys.platform == "darwin" else "_loops.so")
# -O2: what takes time is memcpy and XXH3, which are compiled elsewhere.
FLAGS = ["-O2", "-std=c11", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"]


def compiler() -> list[str] | None:
    """Return the command of the system's C compiler; None where there is none."""
    named = os.environ.get("CC", "").split()
    return named or next(([path] for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


class LoopsBuildHook(BuildHookInterface):
    def _wanted(self) -> bool:
        return self.target_name == "wheel" and os.environ.get("ACTCACHE_LOOPS") != "numpy"

    def dependencies(self) -> list[str]:
        return ["ziglang>=0.13"] if self._wanted() and compiler() is None else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if not self._wanted():
            return
        # Without a word, zig compiles for this very processor, and the wheel would die on an older one.
        command = compiler() or [sys.executable, "-m", "ziglang", "cc", "-mcpu=baseline"]
        root = Path(self.root)
        built = root / LIBRARY.with_suffix(f".{os.getpid()}")  # then renamed: others may have the old one open
        try:
            subprocess.run([*command, *FLAGS, str(root / SOURCE), "-o", str(built)], check=True)
            built.replace(root / LIBRARY)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                f"cannot compile {SOURCE} by {' '.join(command)}: {error}. Name another compiler as CC, or install "
                "with ACTCACHE_LOOPS=numpy in the environment: reads are then slower"
            ) from None
        finally:
            built.unlink(missing_ok=True)
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].append(f"/{LIBRARY}")

"""Examination of a data file's structure without mapping it: what is damaged there would crash whoever maps it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from actcache.errors import StorageIOError

#: By which somebody ends a process, not what it finds.
_FROM_OUTSIDE = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL}

_ATTEMPTS = 4  # a writer may change pages under the examination; damage stays
_PAUSE = 0.5


def examine(folder: Path) -> str | None:
    """Have lmdb's own verifier walk a file in a process of its own; return what is wrong, None where nothing is.

    Raises:
        StorageIOError: somebody ended the verifier.
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

"""Small files in the user's cache folder that spare work: what cannot be read or written is as if it were not there."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

_ENTRIES = 1000


def path_of(name: str) -> Path:
    """Return where a memo lies; raises ``RuntimeError`` where there is no home directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "actcache" / f"{name}.json"


def read(name: str) -> dict[str, Any]:
    """Return a memo; empty where there is none."""
    try:
        memo = json.loads(path_of(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    return memo if isinstance(memo, dict) else {}


def write(name: str, memo: dict[str, Any]) -> None:
    """Write a memo, of which the newest entries are kept."""
    newest = dict(list(memo.items())[-_ENTRIES:])
    temporary = None
    try:
        path = path_of(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{name}-", delete=False
        ) as file:
            temporary = file.name
            json.dump(newest, file)
        os.replace(temporary, path)
    except (OSError, RuntimeError):
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)

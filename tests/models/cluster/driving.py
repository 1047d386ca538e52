"""A process that leads a fill, for tests to kill; its workers log what they compute.

``python -m tests.models.cluster.driving MODEL STORE TEXTS LOG``: TEXTS is a JSON list, LOG a folder. Prints the report.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import xxhash

from actcache import Recycler
from actcache.admin.display import fields_as_json
from actcache.models import cluster
from actcache.models.remote import Blueprint

LOG = "ACTCACHE_TEST_LOG"


def digest(token_ids: Any) -> str:
    return xxhash.xxh3_64_hexdigest(" ".join(map(str, token_ids)).encode())


def logging_recycler(model: str, **options: Any) -> Recycler:
    """Make a recycler that writes down, before it computes something, what that is: a file a process."""
    made = Recycler.from_pretrained(model, **options)
    lower, path = made.agreement.lower, Path(os.environ[LOG]) / str(os.getpid())
    compute = lower.run_encoded

    def logged(inputs: Any, *others: Any, **more: Any) -> Any:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(f"{digest(one.token_ids)}\n" for one in inputs)
        return compute(inputs, *others, **more)

    lower.run_encoded = logged  # type: ignore[method-assign]
    return made


def deadly(*given: object, **named: object) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def broken(*given: object, **named: object) -> Any:
    raise RuntimeError("CUDA out of memory")


OPTIONS: dict[str, Any] = {"layer": 1, "dtype": "float32", "max_length": 48, "too_long": "truncate"}
OPTIONS |= {"check_canaries": False}  # which would compute some documents again


def main(model: str, store: str, texts: str, log: str) -> None:
    os.environ[LOG] = log
    blueprint = Blueprint(logging_recycler, model, store, OPTIONS)
    given = json.loads(Path(texts).read_text(encoding="utf-8"))
    report = cluster.fill(given, blueprint, address="local", workers=2, finish=False, progress=False)
    print(json.dumps(fields_as_json(report)))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A process that leads fills, for tests to kill; its workers log what they compute.

``python -m tests.models.cluster.driving FILE``: FILE is JSON with ``model``, ``texts``, the ``address`` of the cluster,
``places`` (``store``, its ``options``, and ``log``, a folder, each), which are filled at once, and more options of
``cluster.fill``. Prints the reports.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from actcache import Recycler
from actcache.admin.display import fields_as_json
from actcache.models import cluster
from actcache.models.cluster import leader
from actcache.models.late_store import LateStore
from actcache.models.remote import Blueprint
from actcache.store.store import open_store
from tests.support.waiting import until

GO = "go"  # a file beside the log: those that were held go on
DEAD = "dead"  # likewise: somebody has died


def digest(token_ids: Any) -> str:
    return xxhash.xxh3_64_hexdigest(" ".join(map(str, token_ids)).encode())


def logging_recycler(
    model: str,
    *,
    store: LateStore,
    log: str,
    held: int | None = None,
    dies: int | None = None,
    segment_bytes: int | None = None,
    **options: Any,
) -> Recycler:
    """Make a recycler that writes down, before it computes something, what that is: a file a process.

    Args:
        held: batches after which it waits for the file ``GO``.
        dies: batches after which the first process that has computed so many kills itself.
        segment_bytes: of its segments; None for what they have.
    """
    if segment_bytes is not None:
        opened = store.open()
        opened.space = functools.partial(opened.space, segment_bytes=segment_bytes)  # type: ignore[method-assign]
    made = Recycler.from_pretrained(model, store=store, **options)
    lower, path = made.agreement.lower, Path(log) / str(os.getpid())
    compute = lower.run_encoded
    batches = 0

    def logged(inputs: Any, *others: Any, **more: Any) -> Any:
        nonlocal batches
        if batches == held:
            until((Path(log).parent / GO).exists, 3600)
        if batches == dies:
            with contextlib.suppress(FileExistsError):
                (Path(log).parent / DEAD).touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        batches += 1
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


def main(given: str) -> None:
    import ray

    settings = json.loads(Path(given).read_text(encoding="utf-8"))
    model, texts, places = settings.pop("model"), settings.pop("texts"), settings.pop("places")
    with leader.connected(ray, settings.pop("address")), ThreadPoolExecutor() as threads:
        print(json.dumps([*threads.map(lambda one: fill(one, model, texts, **settings), places)]))


def fill(
    place: dict[str, Any],
    model: str,
    texts: list[str],
    *,
    held: int | None = None,
    segment_bytes: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Fill a place by two workers of the cluster to which this process is connected."""
    with open_store(place["store"], **place["options"]) as store:
        more = {"log": place["log"], "held": held, "segment_bytes": segment_bytes}
        blueprint = Blueprint(logging_recycler, model, store, {**OPTIONS, **more})
        report = cluster.fill(texts, blueprint, workers=2, progress=False, **options)
    return fields_as_json(report)


if __name__ == "__main__":
    main(*sys.argv[1:])

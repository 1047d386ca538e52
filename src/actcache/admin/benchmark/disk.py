"""The whole benchmark of a folder's disk: make the stores, compare, clean up, and say what machine it was."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from actcache.admin import machine
from actcache.admin.benchmark.caches import evict_surely
from actcache.admin.benchmark.corpus import SHAPES, Documents, StoredCorpus
from actcache.admin.benchmark.reading import Comparison, cold, flat_path, warm
from actcache.admin.inspection import Progress
from actcache.backend import SegmentFormat, SpaceEngine
from actcache.errors import BackendError, MissingExtraError, OutOfSpaceError, StorageIOError, UsageError
from actcache.io.files import mount_of, translated
from actcache.io.workers import available_cpus
from actcache.segments import registry

PREFIX = "actcache-bench-"  # of the scratch folder

_MEMORY = {"tmpfs", "ramfs"}
_TOLERATED = 0.001  # share of pages that may have stayed in memory before a cold turn
_ROOM = 1.25  # of the rows' bytes, for keys, token ids and lmdb's pages


@dataclass(frozen=True)
class Bench:
    """What ``run`` found: comparisons, and all that a reader needs to believe them."""

    facts: dict[str, str]
    versions: dict[str, str]
    left_out: dict[str, str]  # backends that could not be measured, and why
    comparisons: list[Comparison]


def local_backends() -> tuple[list[str], dict[str, str]]:
    """Return the installed backends that keep a store in a folder, and of others why they cannot be used."""
    usable, missing = [], {}
    for name in registry.backends():
        try:
            plugin = registry.load(name)
        except (MissingExtraError, BackendError) as error:
            missing[name] = str(error)
            continue
        if isinstance(plugin, SegmentFormat | SpaceEngine) and plugin.name == name:  # else a protocol of object stores
            usable.append(name)
    return usable, missing


def run(
    folder: Path,
    *,
    backends: Sequence[str] | None = None,
    shapes: Sequence[str] = ("paper",),
    modes: Sequence[str] = ("cold",),
    nbytes: int = 1 << 30,
    rounds: int = 15,
    batches: int = 8,
    keep: bool = False,
    progress: Progress = lambda step, done, total: None,
) -> Bench:
    """Measure a folder's disk, and the backends on it.

    Writes ``nbytes`` once for each backend and once for the limit, in a new folder inside of ``folder`` that is removed
    again whatever happens. Holds ``nbytes`` in memory while it writes. Nobody else's pages are dropped from the cache.

    Args:
        backends: names; None for all that are installed and keep a store in a folder.
        shapes: ``paper`` (60-512 tokens x 768) and ``short`` (8-48 x 384), float16.
        nbytes: of the rows of a shape; never less than one batch.
        batches: that are read in a turn; each ratio is of two turns of one round.
        keep: leave the scratch folder where it is; ``facts`` names it.

    Raises:
        UsageError: a name is not known, or a number not positive.
        OutOfSpaceError: the folder has too little room; nothing was written.
        StorageIOError: there is no cold read in this folder, for it is memory or keeps pages that were dropped.
    """
    usable, missing = local_backends()
    chosen = list(dict.fromkeys(usable if backends is None else backends))
    _check_backends(chosen, usable, missing)
    for what, names, known in (("shape", shapes, SHAPES), ("mode", modes, ("cold", "warm"))):
        for name in names:
            if name not in known:
                raise UsageError(f"there is no {what} {name!r}; there are {', '.join(known)}")
    for what, number in (("size", nbytes), ("rounds", rounds), ("batches", batches)):
        if number < 1:
            raise UsageError(f"{what} is a number of 1 or more, not {number}")
    folder = folder.absolute()
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; name one on the disk that is to be measured")
    _, kind = mount_of(folder)
    if "cold" in modes and kind in _MEMORY:
        raise StorageIOError(
            f"{folder} lies on {kind}, which is memory: nothing there is ever read cold; "
            "take a folder on a disk, or measure warm"
        )
    load = os.getloadavg()[0]
    comparisons: list[Comparison] = []
    left_out = missing if backends is None else {}
    for name in shapes:
        with translated(f"cannot write in {folder}"):
            scratch = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        try:
            _check_room(folder, nbytes, name, len(chosen))
            urls = {backend: f"{backend}:{scratch / backend}" for backend in chosen}
            tell = partial(progress, f"{name} stores")
            tell(0, 1 + len(urls))
            corpus = StoredCorpus(Documents(SHAPES[name], nbytes), urls, {}, flat_path(scratch), tell)
            for mode in modes:
                tell = partial(progress, f"{name} {mode}")
                if mode == "warm":
                    comparisons.append(warm(corpus, scratch, rounds, batches, tell))
                else:
                    drop = partial(evict_surely, scratch, _TOLERATED)
                    comparisons.append(cold(corpus, scratch, rounds, batches, drop, tell))
        finally:
            if not keep:
                _remove(scratch)
    facts = _facts(folder, load)
    if keep:
        facts["kept"] = f"{folder}/{PREFIX}*"
    return Bench(facts, machine.versions(), left_out, comparisons)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:  # gigabytes do not stay behind because it came in the middle
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_backends(chosen: Sequence[str], usable: Sequence[str], missing: Mapping[str, str]) -> None:
    for name in chosen:
        if name in missing:
            raise MissingExtraError(missing[name])
        if name not in usable:
            raise UsageError(f"{name!r} is no backend that keeps a store in a folder; there are {', '.join(usable)}")


def _check_room(folder: Path, nbytes: int, shape: str, stores: int) -> None:
    least = SHAPES[shape].batch * SHAPES[shape].longest * SHAPES[shape].row_bytes
    needed = int(_ROOM * max(nbytes, least)) * (1 + stores)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutOfSpaceError(
            f"{folder} has {free / 2**30:.1f} GiB free and this takes about {needed / 2**30:.1f} while it runs: "
            "give a smaller --size, fewer backends, or another folder"
        )


def _facts(folder: Path, load: float) -> dict[str, str]:
    found = machine.facts()
    point, kind = mount_of(folder)
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": f"{machine.processor()}, {available_cpus()} of {os.cpu_count()} usable",
        "memory": found["memory"],
        "system": found["system"],
        "folder": f"{folder}, {kind or 'unknown file system'} at {point or 'unknown'}, {machine.disk_of(folder)}",
        "load": f"{load:.1f} before, {os.getloadavg()[0]:.1f} after",
    }

"""``cachectl doctor``: what a bug report needs, to copy and paste."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from actcache.admin import machine
from actcache.cli import options
from actcache.cli.common import ExitCode, print_json, say
from actcache.errors import ActcacheError, BackendError, MissingExtraError, StoreNotFoundError
from actcache.io import loops
from actcache.io.files import FileOperations, is_local, mount_of
from actcache.segments import registry
from actcache.segments.places.local_place import local_path
from actcache.store.store import open_store

_PROBES = 5


def doctor(
    store: Annotated[
        str | None, typer.Argument(help="Path or URL of a store, or of where one is to be.", show_default=False)
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show versions, extras, backends, and what is particular about a place; for bug reports.

    Tells no credentials. Exit code 3 where a place is given that cannot be used.

    Example: cachectl doctor ./activations
    """
    extras = _extras()
    facts = {
        "versions": machine.versions(),
        "extras": extras,
        "backends": _backends(extras),
        "machine": machine.facts(),
    }
    warnings: list[str] = []
    if loops.missing:
        facts["machine"]["read path"] = f"NumPy: {loops.missing}"
        warnings.append("the compiled loops of the read path cannot be used: reads are right, and several times slower")
    else:
        facts["machine"]["read path"] = f"compiled loops, {loops.THREADS} threads"
    usable = store is None or _look_at(store, facts, warnings)
    if as_json:
        print_json({"facts": facts, "warnings": warnings, "usable": usable})
    else:
        for section, found in facts.items():
            say(f"{section}:")
            for name, value in found.items():
                say(f"  {name}: {value}")
        for warning in warnings:
            say(f"warning: {warning}")
    if not usable:
        raise typer.Exit(ExitCode.STORE)


def _look_at(url: str, facts: dict[str, dict[str, str]], warnings: list[str]) -> bool:
    """Add what is to be said of a place; return whether it can be used."""
    try:
        scheme, location = registry.parse(url)
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", location) or (scheme and location.startswith("//")):
            facts["environment"] = _environment()
        else:
            facts["place"] = _place(local_path(location), warnings)
    except (BackendError, OSError) as error:
        warnings.append(str(error))
    facts["store"], usable = _store(url, warnings)
    return usable


def _extras() -> dict[str, str]:
    wanted: dict[str, list[str]] = {}
    for name, extra in machine.requirements():
        if extra and name != "actcache":
            wanted.setdefault(extra, []).append(name)
    found = {}
    for extra, names in sorted(wanted.items()):
        missing = [name for name in names if machine.installed(name) is None]
        found[extra] = f"lacks {', '.join(missing)}: pip install 'actcache[{extra}]'" if missing else "installed"
    return found


def _backends(extras: dict[str, str]) -> dict[str, str]:
    found = {}
    for name in registry.backends():
        try:
            registry.load(name)
            lacks = extras.get(name, "")
            found[name] = lacks if lacks.startswith("lacks") else "works"
        except (BackendError, MissingExtraError) as error:
            found[name] = str(error)
    return found


def _environment() -> dict[str, str]:
    """Return which settings of object stores there are; the values of no secret."""
    shown = {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"}
    return {
        name: value if name in shown else "set"
        for name, value in sorted(os.environ.items())
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_", "FSSPEC_"))
    }


def _place(root: Path, warnings: list[str]) -> dict[str, str]:
    standing = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    folder = standing if standing.is_dir() else standing.parent
    point, kind = mount_of(folder)
    usage, status = shutil.disk_usage(folder), os.statvfs(folder)
    free = usage.free / (1 << 30)
    found = {
        "path": str(root.absolute()) if standing == root.absolute() else f"{root.absolute()} (not there yet)",
        "file system": f"{kind or 'unknown'} at {point or 'unknown'}",
        "free": f"{free:,.1f} of {usage.total / (1 << 30):,.1f} GiB, {status.f_favail:,} inodes",
        "local": "yes" if is_local(folder) else "no",
    }
    if not is_local(folder):
        warnings.append(f"{kind} is a network file system: rows are read, not mapped, and lmdb refuses it")
    if kind in ("tmpfs", "ramfs"):
        warnings.append(f"{kind} is memory: what lies there is gone after a restart")
    if free < 1:
        warnings.append("less than 1 GiB is free")
    if status.f_flag & os.ST_RDONLY:
        found["writable"] = "no: mounted read-only"
    elif not os.access(folder, os.W_OK):
        found["writable"] = "no: permissions"
    else:
        found["writable"] = "yes"
        tmp = folder / "tmp"
        found |= _probe(tmp if tmp.is_dir() else folder, warnings)
    return found


def _probe(folder: Path, warnings: list[str]) -> dict[str, str]:
    """Try what a store needs of a file system."""
    try:
        with tempfile.TemporaryDirectory(prefix=".actcache-doctor-", dir=folder) as name:
            one, other = Path(name, "one"), Path(name, "other")
            seconds = []
            for _ in range(_PROBES):
                began = time.perf_counter()
                with open(one, "wb") as file:
                    file.write(bytes(4096))
                    file.flush()
                    os.fsync(file.fileno())
                seconds.append(time.perf_counter() - began)
            found = {"write and fsync of 4 KiB": f"{sorted(seconds)[_PROBES // 2] * 1e3:.2f} ms"}
            try:
                FileOperations().link(one, other)
                found["hard links"] = "yes"
            except OSError as error:
                found["hard links"] = f"no: {error.strerror}"
                warnings.append("no hard links: two writers that create one store at the same moment write equal bytes")
            skew = time.time() - one.stat().st_mtime
            found["clock of the medium"] = f"{-skew:+.1f} s"
            if abs(skew) > 60:
                warnings.append("the medium's clock differs by more than a minute; ages go by that clock")
            return found
    except OSError as error:
        warnings.append(f"cannot write in {folder}: {error}")
        return {}


def _store(url: str, warnings: list[str]) -> tuple[dict[str, str], bool]:
    """Open what lies at a place; return what it says, and whether the place can be used."""
    shown = url.partition("?")[0]  # the query may hold keys
    began = time.perf_counter()
    try:
        with open_store(url, mode="r") as store:
            spaces, unreadable = store.fingerprints(), []
            for fingerprint in spaces:
                try:
                    store.recipe(fingerprint)
                except ActcacheError as error:
                    unreadable.append(str(error))
    except StoreNotFoundError as error:
        return {"url": shown, "state": f"reachable; {str(error).partition(';')[0]}"}, True
    except ActcacheError as error:
        warnings.append(str(error))
        return {"url": shown, "state": f"cannot be opened ({type(error).__name__})"}, False
    warnings += unreadable
    found = {"url": shown, "state": "opens", "spaces": str(len(spaces)), "unreadable spaces": str(len(unreadable))}
    found["opened and listed in"] = f"{time.perf_counter() - began:.2f} s"
    return found, True

"""The registry: from a URL to a backend, by entry points. Nothing here knows a backend's name."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from actcache.backend import Backend, SegmentFormat, SpaceEngine, StoreDriver
from actcache.errors import BackendError, MissingExtraError
from actcache.segments.places import marker
from actcache.segments.places.local_place import LocalPlace, local_path
from actcache.segments.places.place import Place
from actcache.segments.store_driver import check_folder, check_options, open_engine, open_segmented

GROUP = "actcache.backends"
REMOTE = "s3"  # the one whose format is made at a URL of another scheme, which fsspec knows
DEFAULT = "default"  # the entry point that serves a bare path where no store stands yet

Plugin = Backend | SegmentFormat | SpaceEngine

#: The entry points of the distributions on a ``sys.path``. To look through all of them takes some ms, and opening a
#: store asks for its backend several times.
_known: dict[tuple[str, ...], list[EntryPoint]] = {}

_LOCAL = ("file", "local")  # schemes of fsspec for paths of this machine
_REMOTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):(.*)", re.DOTALL)


def backends() -> list[str]:
    """Return the names (URL schemes) of the installed backends, sorted."""
    return sorted({point.name for point in _points()} - {DEFAULT})


def _points() -> list[EntryPoint]:
    """Return the entry points that are there now."""
    points = _known[tuple(sys.path)] = list(entry_points(group=GROUP))
    return points


def parse(url: str) -> tuple[str | None, str]:
    """Split ``"scheme:rest"``; the scheme is None for a bare path, ``./a:b`` and ``C:\\x`` among them."""
    match = _SCHEME.fullmatch(url)
    if match is None or "/" in match[1]:
        return None, url
    if match[1].lower() in _LOCAL:
        return None, _path(url)
    rest = _path(match[2])
    # "lmdb:///abs" and "lmdb:/abs" are the same place; "s3://bucket" keeps its bucket
    return match[1].lower(), f"/{rest.lstrip('/')}" if rest.startswith("///") else rest


def _path(location: str) -> str:
    """Return a location without what fsspec writes before paths of this machine: ``file://``."""
    scheme, colon, rest = location.partition(":")
    if not colon or scheme.lower() not in _LOCAL:
        return location
    return f"/{rest.lstrip('/')}" if rest.startswith("///") else rest


def _at(scheme: str) -> Plugin:
    """Return what serves ``scheme://``: a backend of that name, or what lies by default wherever fsspec gets at.

    Raises as ``load``.
    """
    if scheme not in backends():
        with suppress(ImportError):
            from actcache.segments.places.objects import protocols

            if protocols.is_known(scheme):
                return load(REMOTE)
    return load(scheme)


def load(name: str) -> Plugin:
    """Import a backend. ``BackendError``: there is none of that name. ``MissingExtraError``: its library is missing."""
    points = [point for point in _known.get(tuple(sys.path), ()) if point.name == name]
    points = points or [point for point in _points() if point.name == name]  # it may have been installed meanwhile
    if not points:
        raise BackendError(f"there is no backend {name!r}; installed are {', '.join(backends())}")
    try:
        plugin = points[0].load()
    except ImportError as error:
        raise MissingExtraError(f"the {name} backend cannot be imported ({error}): {_remedy(points[0])}") from error
    except AttributeError as error:
        raise BackendError(f"the {name} backend is broken: {error}; its entry point is {points[0].value}") from error
    if not isinstance(plugin, Plugin):
        raise BackendError(f"{points[0].value} is no Backend, SpaceEngine or SegmentFormat; see actcache.backend")
    return plugin


def _remedy(point: EntryPoint) -> str:
    distribution = point.dist.name if point.dist is not None else "actcache"
    extras = f"[{','.join(point.extras)}]" if point.extras else ""
    return f"pip install '{distribution}{extras}'"


def resolve(url: str | Path) -> str | Path:
    """Return a URL or path that means the same from every working directory, and in another process: it travels.

    Raises ``BackendError`` where it names no place, or the scheme is not known.
    """
    if not isinstance(url, str | Path):
        raise BackendError(f"a store is opened by a URL or path, not by {url!r:.80}")
    scheme, location = parse(url) if isinstance(url, str) else (None, str(url))
    if not location or "\0" in location:
        raise BackendError(f"{url!r} names no place; write a path, or scheme:path")
    if scheme is None:
        return local_path(location)
    if location.startswith("//") or _REMOTE.match(location):
        return url
    if _is_protocol(scheme):
        raise BackendError(f"{url!r} names no bucket; write {scheme}://bucket/prefix")
    return url if isinstance(load(scheme), Backend) else f"{scheme}:{local_path(location)}"


def open_driver(url: str | Path, mode: str, options: Mapping[str, Any], *, create: bool = True) -> StoreDriver:
    """Open the store at a URL or path. A store that stands at a bare path says itself which backend it is of.

    Mode ``"a"`` makes one where none stands if it may ``create``. Raises as ``Backend.open`` does, and ``BackendError``
    where the scheme or an option is not known.
    """
    if mode not in ("r", "a"):
        raise BackendError(f"mode is 'r' (read) or 'a' (read, write, create), not {mode!r}")
    url = resolve(url)
    create = create and mode == "a"
    scheme, location = parse(url) if isinstance(url, str) else (None, str(url))
    if scheme is not None and location.startswith("//"):  # of an object store: "s3://bucket/prefix"
        return _open_remote(_at(scheme), f"{scheme}:{location}", mode, create, options)
    if scheme is None:
        place = LocalPlace(Path(location))
        check_folder(place.root)
        standing = marker.read(place)
        scheme = standing.backend if standing is not None else DEFAULT
    return _open(load(scheme), location, mode, create, options)


def _is_protocol(scheme: str) -> bool:
    """Return whether a scheme stands for an object store's protocol, and not for a format."""
    plugin = load(scheme)
    return isinstance(plugin, SegmentFormat) and plugin.name != scheme and scheme != DEFAULT


def _open(plugin: Plugin, location: str, mode: str, create: bool, options: Mapping[str, Any]) -> StoreDriver:
    if isinstance(plugin, Backend):
        if mode == "a" and not create:
            plugin.open(location, mode="r", options=options).close()
        return plugin.open(location, mode=mode, options=options)
    if isinstance(plugin, SpaceEngine):
        if _REMOTE.match(location):
            raise BackendError(f"a {plugin.name} store lies in a folder of this machine, not at {location}")
        return open_engine(plugin, local_path(location), mode=mode, create=create, options=options)
    return open_segmented(plugin, _place(plugin, location, options), mode=mode, create=create)


def _open_remote(default: Plugin, location: str, mode: str, create: bool, options: Mapping[str, Any]) -> StoreDriver:
    """Open whatever store of segments stands at a URL; where none does, one of the default format is made."""
    if not isinstance(default, SegmentFormat):
        return _open(default, location, mode, create, options)
    place = _place(default, location, options)
    standing = marker.read(place)
    if standing is None or standing.backend == default.name:
        return open_segmented(default, place, mode=mode, create=create, standing=standing)
    place.close()
    return _open(load(standing.backend), location, mode, create, options)


def _place(format: SegmentFormat, location: str, options: Mapping[str, Any]) -> Place:
    if not _REMOTE.match(location):
        check_options(format.name, options, frozenset({"mapped"}))
        root = local_path(location)
        check_folder(root)
        return LocalPlace(root, mapped=options.get("mapped"))
    try:
        from actcache.segments.places.objects import ObjectPlace
    except ImportError as error:
        raise MissingExtraError(f"{location} needs fsspec ({error}): pip install 'actcache[s3]'") from error
    return ObjectPlace(location, format.commit, options)

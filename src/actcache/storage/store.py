"""The store that the core builds around any ``SegmentFormat``, in a folder of a local or shared file system.

    root/actcache.json                       what this is: format version and backend
    root/spaces/<fingerprint>/...            blobs of a space (recipe.json, canaries.npz)
    root/spaces/<fingerprint>/segments/      immutable segments
    root/spaces/<fingerprint>/tombstones/    which entries of them are deleted
    root/spaces/<fingerprint>/index/         sorted tables over the segments, rebuildable
    root/collections/                        blobs
    root/tmp/                                what is being written; never listed

No locks: segment names are unique, published whole, and never change.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actcache.backend import SegmentFormat, StoreDriver
from actcache.errors import (
    BackendError,
    FormatVersionError,
    NotAStoreError,
    ReadOnlyError,
    StoreNotFoundError,
)
from actcache.recipe import is_fingerprint
from actcache.storage.files import Files, is_local, translated
from actcache.storage.segment import Columns
from actcache.storage.space import SegmentedSpace

FORMAT_VERSION = 1
MARKER = "actcache.json"


def local_path(location: str) -> Path:
    """Return the folder that a location names.

    Raises:
        BackendError: it begins with the home of a user that is not known.
    """
    try:
        return Path(location).expanduser()
    except RuntimeError as error:
        raise BackendError(f"{location}: {error} Write ./~name for a folder of that name") from None


def read_marker(root: Path) -> dict[str, Any] | None:
    """Return what a folder says about itself; None where it is no store.

    Raises:
        NotAStoreError: the marker is not one of this package.
        FormatVersionError: a newer release wrote the store.
    """
    try:
        with translated(f"cannot read {root / MARKER}"):
            text = (root / MARKER).read_bytes() if root.is_dir() and (root / MARKER).is_file() else None
    except FileNotFoundError:
        return None
    if text is None:
        return None
    try:
        marker = json.loads(text)
        version, name = marker["format_version"], marker["backend"]
        if not isinstance(version, int) or not isinstance(name, str):
            raise TypeError("wrong types")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise NotAStoreError(
            f"{root / MARKER} is damaged or not actcache's ({error}); restore it from a copy"
        ) from None
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{root} has format version {version} and this release reads up to {FORMAT_VERSION}: upgrade actcache"
        )
    return dict(marker)


class SegmentedStore(StoreDriver):
    """Implements ``StoreDriver`` for one folder.

    Args:
        format: the segments' format.
        location: the folder; made where it is absent or empty and ``mode`` is ``"a"``.
        mode: ``"r"`` or ``"a"``.
        mapped: whether rows are gathered from mappings; None decides by the file system.
    """

    def __init__(self, format: SegmentFormat, location: str, *, mode: str, mapped: bool | None = None) -> None:
        self._format = format
        self._root = local_path(location)
        self._writable = mode == "a"
        self._files = Files(self._root)
        marker = read_marker(self._root)
        if marker is None:
            self._create()
        elif marker["backend"] != format.name:
            raise BackendError(
                f"{self._root} is a {marker['backend']} store: open it as {marker['backend']}:{location} or by its path"
            )
        self._mapped = is_local(self._root) if mapped is None else mapped

    def _create(self) -> None:
        if self._root.exists() and not self._root.is_dir():
            raise NotAStoreError(f"{self._root} is a file; a store is a folder")
        with translated(f"cannot list {self._root}"):
            names = os.listdir(self._root) if self._root.is_dir() else []
        created = MARKER in names  # by another process, a moment ago
        strangers = [name for name in names if name != "tmp"]
        if strangers and not created:
            raise NotAStoreError(
                f"{self._root} holds other files ({strangers[0]}, ...) and no {MARKER}: it is no store"
            )
        if not created and not self._writable:
            raise StoreNotFoundError(f"there is no store at {self._root}; open it with mode='a' to create one")
        marker = {"format": "actcache", "format_version": FORMAT_VERSION, "backend": self._format.name}
        if not created:
            # Another process may be creating the same store: whichever marker came first stands, and ours is equal.
            self._files.publish_bytes(self._root / MARKER, json.dumps(marker).encode() + b"\n", replace=False)
        settled = read_marker(self._root)
        if settled is None or settled["backend"] != self._format.name:
            raise NotAStoreError(f"{self._root} became a store of another backend meanwhile; open it by its path")

    def _path(self, name: str) -> Path:
        return self._root / name

    def _check_writable(self) -> None:
        if not self._writable:
            raise ReadOnlyError(f"{self._root} was opened with mode='r'; open it with mode='a' to write")

    def read_blob(self, name: str) -> bytes | None:
        with translated(f"cannot read {self._path(name)}"):
            try:
                return self._path(name).read_bytes()
            except FileNotFoundError:
                return None

    def write_blob(self, name: str, data: bytes, *, replace: bool) -> bool:
        self._check_writable()
        return self._files.publish_bytes(self._path(name), data, replace=replace)

    def delete_blob(self, name: str) -> bool:
        self._check_writable()
        return self._files.remove(self._path(name))

    def blobs(self, prefix: str) -> list[str]:
        folder = self._path(prefix)
        with translated(f"cannot list {folder}"):
            if not folder.is_dir():
                return []
            return sorted(f"{prefix}/{entry.name}" for entry in os.scandir(folder) if entry.is_file())

    def spaces(self) -> list[str]:
        folder = self._path("spaces")
        with translated(f"cannot list {folder}"):
            return sorted(name for name in os.listdir(folder) if is_fingerprint(name)) if folder.is_dir() else []

    def space(self, fingerprint: str, columns: Columns) -> SegmentedSpace:
        folder = self._path(f"spaces/{fingerprint}")
        return SegmentedSpace(self._format, self._files, folder, columns, writable=self._writable, mapped=self._mapped)

    def close(self) -> None:
        """Nothing is held open between calls."""


def open_store(format: SegmentFormat, location: str, *, mode: str, options: Mapping[str, Any]) -> SegmentedStore:
    """Open a folder of segments.

    Raises:
        BackendError: an option is none of this kind of store.
    """
    unknown = set(options) - {"mapped"}
    if unknown:
        raise BackendError(f"a {format.name} store has no option {sorted(unknown)[0]!r}; it has 'mapped'")
    return SegmentedStore(format, location, mode=mode, mapped=options.get("mapped"))

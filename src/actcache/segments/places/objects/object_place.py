"""A place in an object store: a prefix of a bucket.

A file is an object. A segment of several files is the objects below its name; it is there when its commit object is,
which is written last and removed first. Nothing is ever renamed: what a killed writer leaves behind is an unfinished
upload, or objects without their commit, and neither is listed.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from actcache.backend import SegmentFiles, StoredFile
from actcache.errors import OutOfSpaceError, StoreError
from actcache.io.files import translated
from actcache.io.workers import ProcessLock
from actcache.segments.places.objects import options as opt
from actcache.segments.places.objects.blocks import CachedBlocks, ObjectSegment
from actcache.segments.places.objects.client import (
    Head,
    ObjectExistsError,
    ObjectNotFoundError,
    UnsupportedError,
    Upload,
)
from actcache.segments.places.objects.fetched_rows import FetchedRows
from actcache.segments.places.objects.session import Session
from actcache.segments.places.objects.transfers import download, upload, upload_bytes
from actcache.segments.places.place import Place
from actcache.segments.rows import RowSource
from actcache.segments.segment import Segment, is_name

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TEMPORARY = "actcache-object-"
_COPIES = 8  # local ones at a time; what is mapped stays so without its name


class ObjectPlace(Place):
    """Implements ``Place`` below ``protocol://bucket/prefix``. Usable after a fork.

    The file ``commit`` makes a segment of several files whole; it is empty where segments are single files. Options are
    those of docs/object-stores.md. Raises ``BackendError`` where the URL names no bucket, or an option is not known.
    """

    indexes_each = True

    def __init__(self, url: str, commit: str, options: Mapping[str, Any]) -> None:
        target = opt.target(url, options)
        self.where = target.url
        self._commit = commit
        self._session = Session(self.where, target.connect, target.retry_seconds)
        self._blocks = CachedBlocks(self._session)
        self._copies = self._no_copies()
        self._lock = ProcessLock()
        self._pid = os.getpid()

    def make(self) -> None:
        """Nothing to do: a prefix is there as soon as something lies under it."""

    def check_bucket(self) -> None:
        self._session.client().check_bucket()

    # --- names -------------------------------------------------------------------------------------------------------

    def names(self, folder: str) -> list[str]:
        prefix = f"{folder}/" if folder else ""
        client = self._session.client()
        # Whether a segment of several objects is whole, a listing of all that is in it tells.
        deep = bool(self._commit) and folder.rpartition("/")[2] == "segments"
        found = client.listing(prefix, recursive=deep)
        if not deep and any(self._is_segment(key.removeprefix(prefix).rstrip("/")) for key in found.folders):
            found = client.listing(prefix, recursive=True)
        self._blocks.learn({key: listed.size for key, listed in found.files.items()})
        inside = [key.removeprefix(prefix) for key in (*found.files, *found.folders)]
        names = {name.partition("/")[0] for name in inside}
        commits = {name.removesuffix(f"/{self._commit}") for name in inside if name.endswith(f"/{self._commit}")}
        files = {name for name in inside if "/" not in name}
        return sorted(
            {name for name in names if name and (name in files or not self._is_segment(name))} | (names & commits)
        )

    def _is_segment(self, name: str) -> bool:
        """Return whether the last part of a name is a segment's that has several objects."""
        return bool(self._commit) and _is_unique(name)

    def age(self, name: str) -> float | None:
        # A plain file may have a segment's name: a tombstone has.
        for key in (f"{name}/{self._commit}", name) if self._is_segment(name) else (name,):
            with suppress(ObjectNotFoundError):
                return self._session.client().head(key).age
        return None

    def read(self, name: str) -> bytes | None:
        try:
            if _is_unique(name):  # a tombstone, which every snapshot reads again
                return self._blocks.read(name, 0, self._blocks.size(name))
            client = self._session.client()
            body = client.get(name, 0, 1 << 20)
            return bytes(body.data if body.size <= 1 << 20 else client.get(name, 0, body.size).data)
        except ObjectNotFoundError:
            return None

    # --- writing -----------------------------------------------------------------------------------------------------

    def publish(self, name: str, write: Callable[[Path], object], *, replace: bool = False) -> bool:
        with self._temporary() as folder, translated(f"cannot write {self.where}/{name}"):
            path = folder / f"file{Path(name).suffix}"
            write(path)
            if path.is_dir():
                return self._publish_folder(name, path, replace)
            return self._created(lambda: upload(self._session.client(), name, path, create=not replace))

    def publish_bytes(self, name: str, data: bytes, *, replace: bool) -> bool:
        return self._created(lambda: upload_bytes(self._session.client(), name, data, create=not replace))

    @staticmethod
    def _created(write: Callable[[], None]) -> bool:
        with suppress(ObjectExistsError):
            write()
            return True
        return False

    def _publish_folder(self, name: str, path: Path, replace: bool) -> bool:
        client = self._session.client()
        commit = f"{name}/{self._commit}"
        if not replace:
            with suppress(ObjectNotFoundError):
                client.head(commit)
                return False
        files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        if self._commit not in files:
            raise ValueError(f"the format wrote no {self._commit!r}")
        files.remove(self._commit)
        try:
            self._each(lambda file: upload(client, f"{name}/{file}", path / file), files)
            return self._created(lambda: upload(client, commit, path / self._commit, create=not replace))
        except BaseException:
            # An answer may have been lost: the commit object goes first. What stays is not listed, and swept later.
            for file in (self._commit, *files):
                with suppress(StoreError):
                    client.remove(f"{name}/{file}")
            raise

    def _each(self, job: Callable[[str], T], names: Iterable[str]) -> list[T]:
        """Do a job for each name, some at a time; raise the first failure when all have ended."""
        futures = [self._session.submit(partial(job, name)) for name in names]
        wait(futures)
        return [future.result() for future in futures]

    def remove(self, name: str) -> bool:
        commit, *rest = self._keys(name)
        client = self._session.client()
        there = True
        try:
            client.head(commit)
        except ObjectNotFoundError:
            there = bool(rest)  # which a listing has just shown
        else:
            client.remove(commit)
        self._each(client.remove, rest)
        self._blocks.forget(f"{name}/" if self._is_segment(name) else name)
        return there

    def _keys(self, name: str) -> list[str]:
        """Return the objects of a file or segment, the commit object first."""
        if self._is_segment(name) and (found := self._session.client().listing(f"{name}/", recursive=True).files):
            return sorted(found, key=lambda key: key != f"{name}/{self._commit}")
        return [name]

    def move(self, name: str, target: str) -> bool:
        client = self._session.client()
        keys = self._keys(name)
        try:
            for key in reversed(keys):  # the commit object last
                client.copy(key, target + key.removeprefix(name))
        except ObjectNotFoundError:
            return False
        for key in keys:
            client.remove(key)
        self._blocks.forget(f"{name}/" if self._is_segment(name) else name)
        return True

    def sync_names(self, folder: str) -> None:
        """Nothing to do: an object that is listed is durable."""

    # --- reading -----------------------------------------------------------------------------------------------------

    def segment(self, name: str) -> SegmentFiles:
        return ObjectSegment(self._session, self._blocks, name, self._commit)

    def rows(self, segments: list[Segment]) -> RowSource:
        return FetchedRows(self._session, self._blocks, segments, self._key_of)

    def lost(self, folder: str) -> frozenset[str]:
        return frozenset(name.rpartition("/")[2] for name in self._blocks.take_lost(f"{folder}/"))

    def _key_of(self, segment: Segment, file: str) -> str:
        name = segment.files.where.removeprefix(f"{self.where}/")
        return f"{name}/{file}" if file else name

    def beginning(self, name: str, nbytes: int, whole: int = 0) -> tuple[bytes, int] | None:
        listed = self._blocks.listed_size(name)
        most = max(nbytes, whole) if listed is None or listed <= whole else nbytes
        try:
            body = self._session.client().get(name, 0, most, listed)
        except ObjectNotFoundError:
            raise FileNotFoundError(f"{self.where}/{name}") from None
        return bytes(body.data), body.size

    def local_copy(self, name: str) -> Path:
        with self._lock:
            path = self._copies.get(name) if self._pid == os.getpid() else None
        if path is not None and path.exists():
            return path
        descriptor, text = tempfile.mkstemp(prefix=_TEMPORARY, suffix=Path(name).suffix)
        path = Path(text)
        try:
            with translated(f"cannot copy {self.where}/{name}"), open(descriptor, "wb") as file:
                download(self._session, name, file)
        except BaseException as error:
            path.unlink()
            if isinstance(error, ObjectNotFoundError):
                raise FileNotFoundError(f"{self.where}/{name}") from None
            raise
        with self._lock:
            if self._pid != os.getpid():  # those of the parent are its own to remove
                self._copies, self._pid = self._no_copies(), os.getpid()
            self._copies[name] = path
            while len(self._copies) > _COPIES:
                self._copies.popitem(last=False)[1].unlink(missing_ok=True)
        return path

    def _no_copies(self) -> OrderedDict[str, Path]:
        copies: OrderedDict[str, Path] = OrderedDict()
        weakref.finalize(self, _remove_copies, copies, os.getpid())  # nobody may have closed it
        return copies

    # --- tidying up --------------------------------------------------------------------------------------------------

    def remove_folder(self, folder: str) -> bool:
        client = self._session.client()
        found = client.listing(f"{folder}/", recursive=True).files

        def turn(key: str) -> int:
            name = key.removeprefix(f"{folder}/")
            if name == "recipe.json":
                return 0
            if name.startswith("tombstones/"):
                return 3
            if name.startswith("index/"):  # else it would name what is not there any more
                return 1
            return 1 if self._commit and key.endswith(f"/{self._commit}") else 2

        for now in range(4):
            self._each(client.remove, (key for key in found if turn(key) == now))
        self._blocks.forget(f"{folder}/")
        return bool(found)

    def listing(self, *, exact: bool) -> dict[str, StoredFile]:
        files = self._session.client().listing("", recursive=True).files
        return {name: StoredFile(listed.size, listed.age) for name, listed in files.items()}

    def sweep(self, older_than: float) -> int:
        client = self._session.client()
        swept = _sweep_local(older_than)
        stale: list[Upload] = []
        if client.multipart:
            try:
                stale = [found for found in client.uploads() if found.age >= older_than]
            except UnsupportedError as error:  # the rest is swept nevertheless
                logger.warning(
                    "unfinished uploads stay where they are: %s; a lifecycle rule of the bucket helps", error
                )
        for found in stale:
            client.abort(found.key, found.id)
        uncommitted = self._uncommitted(older_than) if self._commit else []
        for key in uncommitted:
            client.remove(key)
        return swept + len(stale) + len(uncommitted)

    def _uncommitted(self, older_than: float) -> list[str]:
        """Return old objects of segments that have no commit object."""
        files = self._session.client().listing("", recursive=True).files
        segments: dict[str, dict[str, Head]] = {}
        for key, listed in files.items():
            parts = key.split("/")
            for depth, part in enumerate(parts[:-1], 1):
                if self._is_segment(part):
                    segments.setdefault("/".join(parts[:depth]), {})[key] = listed
                    break
        return [
            key
            for name, objects in segments.items()
            if f"{name}/{self._commit}" not in objects and min(o.age for o in objects.values()) >= older_than
            for key in objects
        ]

    def close(self) -> None:
        self._session.close()
        with self._lock:
            _remove_copies(self._copies, self._pid)

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY))
        try:
            yield folder
        except OutOfSpaceError as error:
            raise OutOfSpaceError(f"{error} (in {folder.parent}; TMPDIR names another folder)") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _is_unique(name: str) -> bool:
    """Return whether a name has a random part: such a thing is written once, and never changes."""
    return is_name(name.rpartition("/")[2].partition(".")[0])


def _remove_copies(copies: OrderedDict[str, Path], pid: int) -> None:
    while copies and pid == os.getpid():
        copies.popitem()[1].unlink(missing_ok=True)


def _sweep_local(older_than: float) -> int:
    """Remove what killed processes left in the temporary folder of this machine."""
    swept = 0
    for path in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*"):
        with suppress(OSError):  # somebody else's, or gone
            inside = tuple(path.iterdir()) if path.is_dir() else ()
            if time.time() - max(p.stat().st_mtime for p in (path, *inside)) < older_than:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:  # a copy: who still needs it has it mapped
                path.unlink()
            swept += 1
    return swept

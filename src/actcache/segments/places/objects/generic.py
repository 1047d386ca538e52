"""Any other store that fsspec knows: ``memory://``, ``gs://``, ``az://`` and so on.

What fsspec has no words for is done without: there are no conditional writes everywhere (then it is looked first, and
written next), and unfinished uploads are the library's own business.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import os
import select
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.exceptions import FSTimeoutError

from actcache.errors import (
    BackendError,
    ReadOnlyError,
    StorageIOError,
    StoreError,
    StoreNotFoundError,
)
from actcache.segments.places.objects import client, protocols

_TIMES = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")
_REFUSED = (401, 403)
_SLOWEST = 1 << 18  # bytes a second of a transfer that is still waited for
_NAMES_BYTES = 1 << 26  # of a listing of everything, in pages
_COPY_BYTES = 1 << 30  # of a copy on the server, whose size is not looked at
#: What fsspec's own constructors call the options that they hand up to their base.
_PASSED_UP = ("kwargs", "storage_options")


class FsspecClient(client.Client):
    """A client by a file system of fsspec, as thread-safe as that is; belongs to the process that made it."""

    multipart = False

    def __init__(self, url: str, options: dict[str, Any], timeout: float = 20.0) -> None:
        self.where, self._timeout = url.rstrip("/"), timeout
        protocol, _, rest = url.partition("://")
        self._protocol, self._bucket = protocol, rest.partition("/")[0]
        kind = protocols.file_system(url, protocol)
        _check_options(kind, protocol, options)
        try:
            options = {**kind._get_kwargs_from_urls(url), **options}  # a host, an account
            self._fs: Any = kind(skip_instance_cache=True, use_listings_cache=False, **options)
        except ImportError as error:
            raise protocols.missing(url, protocol, error) from error
        except (ValueError, TypeError, OSError) as error:
            raise StorageIOError(f"cannot open {url}: {error}; check the options") from error
        # Looking first and writing next is not the server's check; most libraries can ask for that, by either name.
        self._finds = _is_own(kind)
        writes = inspect.signature(getattr(self._fs, "_pipe_file", self._fs.pipe_file)).parameters
        self._by_overwrite = "overwrite" in writes and "mode" not in writes
        self._loop = getattr(self._fs, "loop", None)  # of those that are asynchronous inside
        self._root = str(self._fs._strip_protocol(url)).rstrip("/")

    def _call(self, method: str, *args: Any, nbytes: int = 0, **options: Any) -> Any:
        """Call a method of the file system; what is asynchronous inside waits as long as such a transfer may take."""
        coroutine = getattr(self._fs, f"_{method}", None)
        if self._loop is None or not inspect.iscoroutinefunction(coroutine):
            return getattr(self._fs, method)(*args, **options)
        return sync(self._loop, coroutine, *args, timeout=self._timeout + nbytes / _SLOWEST, **options)

    def check_bucket(self) -> None:
        if self._protocol == "memory":  # where a folder is there when something is in it
            return
        bucket = self._fs._strip_protocol(f"{self._protocol}://{self._bucket}")
        with self._translated("look at", ""):
            try:
                self._call("info", bucket)
            except FileNotFoundError:
                try:
                    self._call("ls", bucket)  # who may not look at a bucket may list it nevertheless
                except FileNotFoundError:
                    raise self._no_bucket(f"cannot look at {self.where}") from None

    def _no_bucket(self, what: str) -> StoreNotFoundError:
        return StoreNotFoundError(f"{what}: there is no bucket {self._bucket}; create it, or check its name")

    def get(self, key: str, offset: int, nbytes: int, size: int | None = None) -> client.Body:
        known = size is not None
        with self._translated("read", key):
            if size is None:
                size = int(self._call("info", self._path(key))["size"])
            end = min(size, offset + nbytes)
            data = b""
            if end > offset:
                try:
                    data = bytes(self._call("cat_file", self._path(key), start=offset, end=end, nbytes=end - offset))
                except Exception as error:  # what is read behind the end has no common name
                    if not known or isinstance(error, FileNotFoundError | FSTimeoutError):
                        raise
        if known and len(data) != max(0, end - offset):  # shorter than it was, or only this answer is
            return self.get(key, offset, nbytes)
        if len(data) != max(0, end - offset):
            raise client.TransientError(f"cannot read {self.where}/{key}: got {len(data)} of {nbytes} bytes")
        return client.Body(data, size)

    def head(self, key: str) -> client.Head:
        with self._translated("look at", key):
            info = self._call("info", self._path(key))
            if info["type"] != "file":
                raise FileNotFoundError(key)
            return client.Head(int(info["size"]), _age(info))

    def listing(self, prefix: str, *, recursive: bool) -> client.Listing:
        if recursive and self._finds:
            with self._translated("list", prefix):
                found = self._call("find", self._path(prefix).rstrip("/"), detail=True, nbytes=_NAMES_BYTES)
            if isinstance(found, Mapping):  # adlfs tells a list where there is an object of the folder's own name
                return client.Listing(dict(self._listed(found.values(), prefix)), frozenset())
        return self._walked(prefix, recursive=recursive)

    def _listed(self, found: Iterable[Any], folder: str) -> Iterator[tuple[str, client.Head]]:
        """Yield the keys and heads of the objects of a folder, given with its slash, among what was found."""
        for info in found:
            key = self._key(info)
            if info["type"] != "directory" and f"{key}/" != folder and key.startswith(folder):
                yield key, client.Head(int(info["size"]), _age(info))

    def _key(self, info: Mapping[str, Any]) -> str:
        return str(info["name"]).rstrip("/").removeprefix(f"{self._root}/")

    def _walked(self, prefix: str, *, recursive: bool) -> client.Listing:
        files: dict[str, client.Head] = {}
        folders: set[str] = set()
        pending = [prefix]
        while pending:
            folder = pending.pop()
            with self._translated("list", folder):
                try:
                    found = self._call("ls", self._path(folder).rstrip("/"), detail=True)
                except (FileNotFoundError, NotADirectoryError):
                    found = []
            files.update(self._listed(found, folder))
            for info in found:
                if info["type"] == "directory":
                    (pending.append if recursive else folders.add)(f"{self._key(info)}/")
        return client.Listing(files, frozenset(folders))

    def put(self, key: str, data: client.Data, token: str, *, create: bool) -> None:
        self._check_whole()
        with self._translated("write", key, writing=True):
            if create and self._call("exists", self._path(key)):
                raise client.ObjectExistsError(key)
            try:
                how: dict[str, Any] = {"mode": "create" if create else "overwrite"}
                how = {"overwrite": not create} if self._by_overwrite else how
                answer = self._call("pipe_file", self._path(key), bytes(data), nbytes=len(data), **how)
            except FileExistsError:
                raise client.ObjectExistsError(key) from None
            digest = hashlib.md5(data, usedforsecurity=False)
            # The store's answer tells what it has got, where the library hands it on.
            if not isinstance(answer, Mapping) or _md5(answer) != digest.digest():
                self._check(key, len(data), lambda: digest)

    def _check_whole(self) -> None:
        if self._protocol in protocols.FOLDERS:
            raise ReadOnlyError(
                f"cannot write {self.where}: at {self._protocol}:// a file appears before it is whole; mount it as a "
                "folder and open that, or read it with mode='r'"
            )

    def put_file(self, key: str, path: Path) -> None:
        def digest() -> Any:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))

        self._check_whole()
        with self._translated("write", key, writing=True):
            self._call("put_file", str(path), self._path(key), nbytes=os.path.getsize(path))
            self._check(key, os.path.getsize(path), digest)

    def _check(self, key: str, nbytes: int, digest: Callable[[], Any]) -> None:
        """Raise ``TransientError``, and remove the object, where the store says that it holds something else."""
        info = self._call("info", self._path(key))
        told = _md5(info)
        if int(info["size"]) != nbytes or (told is not None and told != digest().digest()):
            self._call("rm_file", self._path(key))
            raise client.TransientError(f"cannot write {self.where}/{key}: it is not what was sent")

    def copy(self, key: str, target: str) -> None:
        with self._translated("copy", key, writing=True):
            self._call("cp_file", self._path(key), self._path(target), nbytes=_COPY_BYTES)

    def remove(self, key: str) -> None:
        with self._translated("remove", key, writing=True), suppress(FileNotFoundError):
            self._call("rm_file", self._path(key))

    def abandon(self) -> None:
        leave_to_parent(self._fs, self._loop)

    def close(self) -> None:
        """fsspec ends its connections when the file system is forgotten."""

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    @contextmanager
    def _translated(self, verb: str, key: str, *, writing: bool = False) -> Iterator[None]:
        what = f"cannot {verb} {self.where}/{key}"
        try:
            yield
        except (StoreError, client.ObjectNotFoundError, client.ObjectExistsError):
            raise
        except FileNotFoundError as error:
            raise (self._no_bucket(what) if verb == "write" else client.ObjectNotFoundError(what)) from error
        except PermissionError as error:
            raise _refused(what, error, writing) from error
        except (OSError, FSTimeoutError) as error:
            raise client.TransientError(f"{what}: {str(error) or type(error).__name__}") from error
        except (ValueError, TypeError, KeyError, NotImplementedError) as error:
            raise StorageIOError(f"{what}: {error!r:.300}; check the URL and the options") from error
        except Exception as error:  # gcsfs and adlfs raise exceptions of libraries that need not be installed
            status = getattr(error, "status", None) or getattr(error, "status_code", None) or getattr(error, "code", 0)
            if status in _REFUSED:
                raise _refused(what, error, writing) from error
            if status == 404:
                raise (self._no_bucket(what) if verb == "write" else client.ObjectNotFoundError(what)) from error
            if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
                raise StorageIOError(f"{what}: {error!r:.300}") from error
            raise client.TransientError(f"{what}: {error!r:.300}") from error


def _is_own(kind: type) -> bool:
    """Return whether a file system has a way of its own to find all that is below a folder.

    fsspec's lists folder by folder, as is done here, and takes those that cannot be listed for empty.
    """
    plain = {AbstractFileSystem.find, AsyncFileSystem._find, AsyncFileSystem.find}
    return getattr(kind, "_find" if issubclass(kind, AsyncFileSystem) else "find") not in plain


def leave_to_parent(fs: object, loop: object) -> None:
    """In a fork's child: have a file system of the parent's, and its event loop (or None), let the connections be."""
    for reference in weakref.getweakrefs(fs):
        finalizer = reference.__callback__
        if isinstance(finalizer, weakref.finalize):
            finalizer.detach()
    selector: Any = getattr(loop, "_selector", None)
    if type(selector).__name__ == "EpollSelector":
        # The parent's epoll is open here, too: a connection that is closed here would fall silent there.
        with select.epoll() as empty:
            os.dup2(empty.fileno(), selector.fileno(), inheritable=False)


def _check_options(kind: type, protocol: str, options: Mapping[str, Any]) -> None:
    """Raise ``BackendError`` for an option that a file system does not have.

    One that hands what it does not know on to another library is not asked.
    """
    known: set[str] = set()
    for maker in kind.__mro__:
        made_by = vars(maker).get("__init__")
        for parameter in inspect.signature(made_by).parameters.values() if made_by else ():
            if parameter.kind is parameter.VAR_KEYWORD and maker is kind and parameter.name not in _PASSED_UP:
                return
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                known.add(parameter.name)
    unknown = sorted(options.keys() - (known - {"self"}))
    if unknown:
        has = ", ".join(sorted(known - {"self", "loop", "asynchronous"} | {"retry_seconds", "timeout"}))
        raise BackendError(f"an {protocol}:// store has no option {unknown[0]!r}; it has {has}")


def _md5(info: Mapping[str, Any]) -> bytes | None:
    """Return the MD5 that a store tells of an object, where it tells one."""
    told = info.get("md5Hash") or (info.get("content_settings") or info).get("content_md5")
    try:
        return base64.b64decode(told, validate=True) if isinstance(told, str) else bytes(told) if told else None
    except (ValueError, TypeError):
        return None


def _refused(what: str, error: Exception, writing: bool) -> StoreError:
    if writing:
        return ReadOnlyError(f"{what}: {error}; check what these credentials may do, or read with mode='r'")
    return StorageIOError(f"{what}: {error}; check the credentials and what they may do")


def _age(info: dict[str, Any]) -> float:
    """Return the seconds since something was written; by this machine's clock, as fsspec does not tell the server's."""
    for name in _TIMES:
        written = info.get(name)
        if isinstance(written, str):
            try:
                written = datetime.fromisoformat(written)
            except ValueError:
                continue
        if isinstance(written, datetime):
            written = written if written.tzinfo else written.replace(tzinfo=UTC)
            return max(0.0, (datetime.now(UTC) - written).total_seconds())
        if isinstance(written, int | float):
            return max(0.0, time.time() - written)
    return 0.0  # not told: nothing is ever old enough to be swept

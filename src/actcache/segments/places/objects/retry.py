"""Repeats what may succeed a moment later: exponential backoff with full jitter, bounded in time."""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from actcache.errors import ClosedError, StorageIOError
from actcache.segments.places.objects.client import (
    Body,
    Client,
    Data,
    Head,
    Listing,
    ObjectExistsError,
    ObjectNotFoundError,
    TransientError,
    Upload,
)

T = TypeVar("T")

_FIRST_SECONDS = 0.1  # the most that the first pause lasts; the next ones' limit doubles
_LONGEST_SECONDS = 8.0


class Retrying(Client):
    """Wraps a client. A write whose answer was lost is looked for on the store before it is repeated. Thread-safe.

    Args:
        seconds: no attempt begins later than so many seconds after the first one.
    """

    def __init__(self, client: Client, seconds: float) -> None:
        self.where = client.where
        self.multipart = client.multipart
        self._client = client
        self._seconds = seconds
        self._closed = threading.Event()

    def _run(self, attempt: Callable[[], T], lost: Callable[[], T | None] = lambda: None) -> T:
        """Return what ``attempt`` returns in the end; after a failure ``lost`` tells what it has done nevertheless."""
        begin, count = time.monotonic(), 0
        while True:
            if self._closed.is_set():
                raise ClosedError(f"{self.where} was closed")
            try:
                done = lost() if count else None
                return attempt() if done is None else done
            except TransientError as error:
                pause = random.uniform(0, min(_LONGEST_SECONDS, _FIRST_SECONDS * 2**count))
                count += 1
                elapsed = time.monotonic() - begin
                if elapsed + pause > self._seconds:
                    raise StorageIOError(
                        f"{error} (tried {count} times in {elapsed:.0f} s): check the network and the store, "
                        "then do the same again"
                    ) from error
            self._closed.wait(pause)

    def get(self, key: str, offset: int, nbytes: int) -> Body:
        return self._run(lambda: self._client.get(key, offset, nbytes))

    def head(self, key: str) -> Head:
        return self._run(lambda: self._client.head(key))

    def listing(self, prefix: str, *, recursive: bool) -> Listing:
        return self._run(lambda: self._client.listing(prefix, recursive=recursive))

    def put(self, key: str, data: Data, token: str, *, create: bool) -> None:
        attempts = 0

        def attempt() -> bool:
            nonlocal attempts
            attempts += 1
            try:
                self._client.put(key, data, token, create=create)
            except ObjectExistsError:
                # An attempt that seemed to fail may have been the one that made it.
                if not self._wrote(key, len(data), token) and not (attempts > 1 and self._holds(key, data)):
                    raise
            return True

        self._run(attempt, lambda: self._wrote(key, len(data), token) or None)

    def put_file(self, key: str, path: Path) -> None:
        self._run(lambda: self._client.put_file(key, path))

    def begin(self, key: str, token: str) -> str:
        return self._run(lambda: self._client.begin(key, token))

    def part(self, key: str, upload: str, number: int, data: Data) -> str:
        return self._run(lambda: self._client.part(key, upload, number, data))

    def complete(self, key: str, upload: str, etags: Sequence[str], token: str, *, create: bool) -> None:
        def attempt() -> bool:
            try:
                self._client.complete(key, upload, etags, token, create=create)
            except (ObjectNotFoundError, ObjectExistsError) as error:  # the upload ended: well, or by another's hand
                if not self._wrote(key, None, token):
                    if isinstance(error, ObjectExistsError):
                        raise
                    raise StorageIOError(
                        f"the upload of {self.where}/{key} was aborted by somebody else; do the same again"
                    ) from None
            return True

        self._run(attempt, lambda: self._wrote(key, None, token) or None)

    def _wrote(self, key: str, size: int | None, token: str) -> bool:
        """Return whether the object is there and is ours."""
        try:
            head = self._client.head(key)
        except ObjectNotFoundError:
            return False
        return head.token is not None and secrets.compare_digest(head.token, token) and size in (None, head.size)

    def _holds(self, key: str, data: Data) -> bool:
        """Return whether the object has these bytes, where the store keeps no tokens that would tell whose it is."""
        try:
            if self._client.head(key).token is not None:
                return False
            body = self._client.get(key, 0, len(data) + 1)
        except ObjectNotFoundError:
            return False
        return body.size == len(data) and bytes(body.data) == bytes(data)

    def abort(self, key: str, upload: str) -> None:
        with suppress(ObjectNotFoundError):
            self._run(lambda: self._client.abort(key, upload))

    def uploads(self) -> list[Upload]:
        return self._run(self._client.uploads)

    def copy(self, key: str, target: str) -> None:
        self._run(lambda: self._client.copy(key, target))

    def remove(self, key: str) -> None:
        self._run(lambda: self._client.remove(key))

    def abandon(self) -> None:
        self._client.abandon()

    def stop(self) -> None:
        """Have calls that wait for their next attempt end with ``ClosedError``."""
        self._closed.set()

    def close(self) -> None:
        self.stop()
        self._client.close()

"""Uploads of local files, in parts where they are large, and downloads into local files, in pieces at a time."""

from __future__ import annotations

import itertools
import os
import secrets
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from actcache.errors import StorageIOError, StoreError
from actcache.segments.places.objects.client import Body, Client, ObjectNotFoundError
from actcache.segments.places.objects.session import Session

_SINGLE_BYTES = 16 << 20  # up to here in one request
_PART_BYTES = 16 << 20
_MOST_PARTS = 9_000  # S3 takes 10,000
_PARTS_AT_A_TIME = 4  # parts in memory
_PIECE = 4 << 20
_PIECES_AT_A_TIME = 8  # pieces in memory


def upload_bytes(client: Client, key: str, data: bytes, *, create: bool) -> None:
    """Write a small object. Raises as ``Client.put`` does."""
    client.put(key, data, secrets.token_hex(16), create=create)


def upload(client: Client, key: str, path: Path, *, create: bool = False) -> None:
    """Write an object from a local file; holds four parts of it in memory.

    Raises:
        ObjectExistsError: it stands already, and ``create`` is true.
        StoreError, OSError: the object was not written, and no part of it is left on the store unless that failed, too.
    """
    size = os.path.getsize(path)
    if size <= _SINGLE_BYTES:
        upload_bytes(client, key, path.read_bytes(), create=create)
    elif client.multipart:
        _in_parts(client, key, path, size, create)
    else:
        client.put_file(key, path)


def _in_parts(client: Client, key: str, path: Path, size: int, create: bool) -> None:
    token = secrets.token_hex(16)
    each = max(_PART_BYTES, -(-size // _MOST_PARTS))
    upload = client.begin(key, token)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:

        def send(number: int) -> str:
            data = os.pread(descriptor, each, number * each)
            return client.part(key, upload, number + 1, data)

        with ThreadPoolExecutor(_PARTS_AT_A_TIME, thread_name_prefix="actcache-upload") as pool:
            parts = [pool.submit(send, number) for number in range(-(-size // each))]
            try:
                etags = [part.result() for part in parts]
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        client.complete(key, upload, etags, token, create=create)
        _check_size(client, key, size)
    except BaseException:
        with suppress(StoreError):  # it stays until it is swept; the first failure is the one to tell
            client.abort(key, upload)
        raise
    finally:
        os.close(descriptor)


def _check_size(client: Client, key: str, nbytes: int) -> None:
    """Raise ``StorageIOError``, and remove the object, where the store has not got all of it."""
    try:
        found = client.head(key).size
    except ObjectNotFoundError:
        found = 0
    if found != nbytes:
        client.remove(key)
        raise StorageIOError(f"{client.where}/{key} has {found} of {nbytes} bytes after its upload; do the same again")


def download(session: Session, key: str, file: BinaryIO) -> None:
    """Write an object's bytes to a file.

    Raises ``ObjectNotFoundError``, ``OSError`` of the file, or ``StoreError``: unread, or replaced meanwhile.
    """
    client = session.client()
    first = client.get(key, 0, _PIECE)
    file.write(first.data)
    starts = iter(range(_PIECE, first.size, _PIECE))
    pending: deque[Future[Body]] = deque()

    def ask(start: int) -> Future[Body]:
        return session.submit(lambda: client.get(key, start, min(_PIECE, first.size - start)))

    try:
        pending.extend(map(ask, itertools.islice(starts, _PIECES_AT_A_TIME)))
        while pending:
            body = pending.popleft().result()
            pending.extend(map(ask, itertools.islice(starts, 1)))
            if body.size != first.size:
                raise StorageIOError(f"{client.where}/{key} was replaced while it was read; do the same again")
            file.write(body.data)
    finally:
        for future in pending:
            future.cancel()

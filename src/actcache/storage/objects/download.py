"""Downloads of whole objects into local files, in pieces, several at a time."""

from __future__ import annotations

import itertools
from collections import deque
from concurrent.futures import Future
from typing import BinaryIO

from actcache.errors import StorageIOError
from actcache.storage.objects.client import Body
from actcache.storage.objects.session import Session

_PIECE = 4 << 20
_AT_A_TIME = 8  # pieces in memory


def download(session: Session, key: str, file: BinaryIO) -> None:
    """Write an object's bytes to a file.

    Raises:
        AbsentError: there is none.
        StoreError: it cannot be read, or was replaced meanwhile.
        OSError: the file cannot be written.
    """
    client = session.client()
    first = client.get(key, 0, _PIECE)
    file.write(first.data)
    starts = iter(range(_PIECE, first.size, _PIECE))
    pending: deque[Future[Body]] = deque()

    def ask(start: int) -> Future[Body]:
        return session.submit(lambda: client.get(key, start, min(_PIECE, first.size - start)))

    try:
        pending.extend(map(ask, itertools.islice(starts, _AT_A_TIME)))
        while pending:
            body = pending.popleft().result()
            pending.extend(map(ask, itertools.islice(starts, 1)))
            if body.size != first.size:
                raise StorageIOError(f"{client.where}/{key} was replaced while it was read; do the same again")
            file.write(body.data)
    finally:
        for future in pending:
            future.cancel()

"""Notes in the store what this process stores."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from os import getpid

from actcache.errors import ActcacheError, ClosedError
from actcache.store.contributions import Contribution, blob_name, dumps
from actcache.store.space import Space

logger = logging.getLogger(__name__)


class Contributor:
    """Notes what this process stores in some spaces from now on. Thread-safe.

    Args:
        partition: its share, such as ``"3/8"``.
        run: of all processes of one fill; None for one of its own.
    """

    def __init__(
        self, spaces: Sequence[Space], partition: str, *, run: str | None = None, attempt: int = 0, device: str = ""
    ) -> None:
        self._spaces = list(spaces)
        self._before = [space.written for space in spaces]
        self._noted = [0] * len(self._spaces)  # segments
        self._lock = threading.Lock()
        self._name = (run or secrets.token_hex(4), partition, attempt)
        self._worker = f"{socket.gethostname()}:{getpid()}" + (f" {device}" if device else "")
        self._began, self._start = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", time.monotonic()

    def note(self) -> None:
        """Write what was published since the last note, if anything was. A failure is logged: it costs the note. Once
        a space is closed nothing is noted."""
        with self._lock, suppress(ClosedError):
            for i, (space, before) in enumerate(zip(self._spaces, self._before, strict=True)):
                done = space.written.since(before)
                if done.segments > self._noted[i]:
                    counts = (done.published, done.tokens, done.nbytes, done.segments)
                    seconds = round(time.monotonic() - self._start, 1)
                    fingerprint = space.recipe.fingerprint
                    found = Contribution(fingerprint, *self._name, self._worker, self._began, seconds, *counts)
                    self._noted[i] = done.segments
                    try:
                        space.put_blob(blob_name(found), dumps([found]), replace=True)
                    except ActcacheError as error:
                        logger.warning("what this process has stored is not noted: %s", error)

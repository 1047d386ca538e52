"""When a space was last used: a small blob that whoever reads or writes a space renews, at most once an hour.

It only decides what a pruning takes first. Stores that are opened read-only leave no trace: pin what is read so.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time

from actcache.backend import StoreDriver
from actcache.errors import DataError, StoreError
from actcache.store.description import space_blob

logger = logging.getLogger(__name__)

NAME = "used.json"
HOUR = 3600.0


class LastUse:
    """Notes the uses of one space through one object. Thread-safe; a note that cannot be written is left out.

    Args:
        writable: whether the store may be written to; else nothing is noted.
    """

    def __init__(self, driver: StoreDriver, fingerprint: str, *, writable: bool) -> None:
        self._driver = driver
        self._blob = space_blob(fingerprint, NAME)
        self._next = 0.0 if writable else math.inf  # by the monotonic clock: before then there is nothing to do
        self._lock = threading.Lock()

    def note(self) -> None:
        """Note that the space is used now. Costs a look at the clock, and once an hour a read and a write."""
        if time.monotonic() < self._next or not self._lock.acquire(blocking=False):
            return
        try:
            self._next = time.monotonic() + HOUR
            now = time.time()
            if not 0 <= now - self._noted() < HOUR:  # another process may have noted it
                text = json.dumps({"used": round(now)})
                self._driver.write_blob(self._blob, text.encode() + b"\n", replace=True)
        except (StoreError, DataError) as error:
            logger.debug("cannot note the use of a space: %s", error)
        finally:
            self._lock.release()

    def stop(self) -> None:
        """Note nothing from here on."""
        self._next = math.inf

    def _noted(self) -> float:
        data = self._driver.read_blob(self._blob)
        try:
            return float(json.loads(data)["used"]) if data is not None else 0.0
        except (ValueError, KeyError, TypeError, RecursionError):
            return 0.0

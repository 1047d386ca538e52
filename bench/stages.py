"""Where the time of a reader goes, stage by stage: its functions are wrapped, and each is charged what it takes itself.

Times are added over all threads, so that stages which run side by side count in full. Besides the time that passes
there is the time of the processor, which other work on the machine lengthens less, and which has no waiting in it.
Wrapping costs about a microsecond a call, and the stages are called a few times a batch.
"""

from __future__ import annotations

import functools
import importlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: Where a stage is: module, then the path of attributes. A column is told apart where a function takes one.
STAGES = {
    "look-up": ("actcache.segments.snapshot", "SegmentedSnapshot.locate"),
    "which columns": ("actcache.segments.snapshot", "SegmentedSnapshot.has"),
    "planning": ("actcache.segments.rows", "MappedRows.prepare"),
    "first seeds": ("actcache.format.checksum", "entry_seeds"),
    "digests": ("actcache.format.checksum", "chainer"),
    "hand-over": ("actcache.reader.delivery", "HostDelivery.deliver"),
    "buffers": ("actcache.reader.buffers", "BufferPool.take"),
    "read-ahead hints": ("actcache.segments.rows", "MappedRows.will_need"),
    "sharing among threads": ("actcache.io.workers", "Workers.run"),
    "other Python": ("actcache.reader.epoch", "read_batch"),
}


class Stages:
    """Counts seconds and calls by stage.

    Attributes:
        seconds: that passed.
        processor: seconds of the processor.
        missing: stages whose functions are not there any more.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.processor: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.missing: list[str] = []
        self._running = threading.local()
        self._lock = threading.Lock()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Wrap the stages' functions, and put them back."""
        undo: list[tuple[Any, str, Any]] = []
        for stage, (module, path) in STAGES.items():
            owner: Any = importlib.import_module(module)
            *parents, name = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent, None)
            if owner is None or not hasattr(owner, name):
                self.missing.append(stage)
                continue
            undo.append((owner, name, owner.__dict__[name]))
            setattr(owner, name, self._wrapped(stage, owner.__dict__[name]))
        try:
            yield
        finally:
            for owner, name, function in undo:
                setattr(owner, name, function)

    def _wrapped(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **options: Any) -> Any:
            with self._timed(stage):
                result = function(*args, **options)
            if stage == "planning":  # what it returns does the gathering, on several threads
                column = args[1] if isinstance(args[1], str) else "rows"
                return self._wrapped(f"gathering {column}", result)
            if stage == "digests" and callable(result):  # it computes those of a chunk
                return self._wrapped(stage, result)
            return result

        return wrapper

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Charge a stage its time, less that of the stages it calls."""
        inner: list[list[float]] = self._running.__dict__.setdefault("inner", [])
        inner.append([0.0, 0.0])
        start, begun = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            spent, busy = time.perf_counter() - start, time.thread_time() - begun
            below = inner.pop()
            if inner:
                inner[-1][0] += spent
                inner[-1][1] += busy
            with self._lock:
                self.seconds[stage] += spent - below[0]
                self.processor[stage] += busy - below[1]
                self.calls[stage] += 1

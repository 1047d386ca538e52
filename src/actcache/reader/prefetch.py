"""Threads that work ahead of their consumer, and never leave it waiting for nothing."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from actcache.errors import ClosedError

T = TypeVar("T")

_JOIN_SECONDS = 10.0  # close() returns by then, also where a dead network file system holds the thread


class _Channel(Generic[T]):
    """A bounded queue between one producer and one consumer, either of which may end it."""

    def __init__(self, depth: int) -> None:
        # Two queues of C's: a wait costs a tenth of a condition's, and may be ended from a finalizer.
        self._items: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()  # None: there are no more
        self._room: SimpleQueue[None] = SimpleQueue()
        for _ in range(depth):
            self._room.put(None)
        self._ended = False
        self.closed = False  # the consumer wants no more

    def wait_for_room(self) -> bool:
        """Wait until there is room; False where the consumer has left."""
        self._room.get()
        return not self.closed

    def put(self, item: T) -> None:
        if not self.closed:
            self._items.put((item,))

    def end(self, failure: BaseException | None = None) -> None:
        """Say that there are no more items, and why."""
        self._ended = True
        self._items.put(failure)

    def get(self) -> T:
        """Wait for an item. Raises the producer's failure once, then, and at the end, ``StopIteration``."""
        found = None if self.closed else self._items.get()
        if isinstance(found, tuple):
            self._room.put(None)
            return found[0]
        self._items.put(None)  # for whoever asks once more
        if found is not None and not self.closed:
            raise found
        raise StopIteration

    def close(self) -> None:
        self.closed = True
        with suppress(Empty):
            while True:
                self._items.get_nowait()
        self._items.put(None)
        self._room.put(None)

    def __len__(self) -> int:
        return max(0, self._items.qsize() - self._ended)


class Prefetch(Iterator[T]):
    """Iterates over what ``produce`` yields, which a thread computes up to ``depth`` items ahead.

    An exception of the thread is raised by the ``next`` whose turn it is. The thread ends when the iterator is used up,
    closed, or collected; a fork's child, which has no such thread, is told so. One consumer at a time.

    Args:
        produce: a generator; it must not refer to this object. It is closed by the thread that ran it.
        waited: called with the seconds that a ``next`` waited, and how many items were ready.
    """

    def __init__(self, produce: Iterator[T], depth: int, waited: Callable[[float, int], None]) -> None:
        self._channel: _Channel[T] = _Channel(depth)
        self._waited = waited
        self._pid = os.getpid()
        what = produce, self._channel
        self._thread = threading.Thread(target=_run, args=what, name="actcache-prefetch", daemon=True)
        self._finalizer = weakref.finalize(self, _Channel.close, self._channel)
        _OPEN.add(self)
        self._thread.start()

    def __next__(self) -> T:
        if self._pid != os.getpid():
            raise ClosedError("this iterator belongs to another process; iterate over the reader anew in this one")
        start, ready = time.perf_counter(), len(self._channel)
        try:
            return self._channel.get()
        except StopIteration:
            self.close()
            raise
        finally:
            self._waited(time.perf_counter() - start, ready)

    def close(self) -> None:
        """End the thread; what was read ahead is dropped. Does nothing the second time."""
        self._channel.close()
        if self._pid == os.getpid() and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_SECONDS)
        _OPEN.discard(self)


def _run(produce: Iterator[T], channel: _Channel[T]) -> None:
    """What the thread does. It knows the channel alone, so that the iterator can be collected."""
    failure: BaseException | None = None
    try:
        while channel.wait_for_room():
            item = next(produce, _NOTHING)
            if item is _NOTHING:
                break
            channel.put(item)  # type: ignore[arg-type]
            del item  # or it would hold a buffer while it waits
    except BaseException as error:
        failure = error
    finally:
        if (close := getattr(produce, "close", None)) is not None:
            close()
        channel.end(failure)


class Helpers:
    """Daemon threads that make calls: where a dead network file system holds one, the process can end all the same.

    Threads are started as they are needed, ``most`` of them.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._calls: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        self._started = 0

    def submit(self, call: Callable[..., T], *given: Any) -> Future[T]:
        """Have a call made after those before it; the future has what it returns or raises."""
        future: Future[T] = Future()
        self._calls.put((future, call, given))
        if self._started < self._most:
            threading.Thread(target=_help, args=(self._calls,), name="actcache-prefetch-read", daemon=True).start()
            self._started += 1
        return future

    def close(self) -> None:
        """End the threads after the calls that were submitted; does not wait."""
        for _ in range(self._started):
            self._calls.put(None)


def _help(calls: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]) -> None:
    while (found := calls.get()) is not None:
        future, call, given = found
        try:
            future.set_result(call(*given))
        except BaseException as error:
            future.set_exception(error)
        del found, future, call, given  # or they would hold a buffer while this waits


_NOTHING = object()
_OPEN: weakref.WeakSet[Any] = weakref.WeakSet()


def _close_all() -> None:
    for one in list(_OPEN):
        one.close()


atexit.register(_close_all)

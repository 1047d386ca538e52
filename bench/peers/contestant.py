"""One way to deliver the documents, and what a turn of it takes."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.loading import Loader, Wanted

Content = tuple[int, int]  # tokens, and a sum of the rows

_SECONDS = 120  # after which a turn in a process of its own is given up


@dataclass(frozen=True)
class Contestant:
    """Names what to open, so that another process can open it.

    Attributes:
        module: of ``bench.peers``.
        way: a key of the module's ``ways``.
        count: documents.
    """

    name: str
    module: str
    folder: Path
    way: str
    count: int
    workers: int

    @property
    def peer(self) -> bool:
        """Whether it is neither actcache nor the reference."""
        return self.module not in ("ours", "native")

    def open(self, wanted: Wanted) -> Loader:
        made: Loader = load(self.module).ways(self.folder, self.count, wanted, self.workers)[self.way]()
        return made

    def anew(self, wanted: Wanted, turn: int) -> float:
        """Take a turn in a process of its own, with everything opened there; return the turn's seconds."""
        seconds: float = self._apart(_seconds, wanted, turn)
        return seconds

    def content_anew(self, wanted: Wanted) -> Content:
        """Return what ``content`` does of a loader that is opened in a process of its own."""
        found: Content = self._apart(_content, wanted, 0)
        return found

    def _apart(self, what: Callable[[Loader, int], Any], wanted: Wanted, turn: int) -> Any:
        context = multiprocessing.get_context("forkserver")
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(there, what, self, replace(wanted, persistent=False), turn))
        process.start()
        there.close()
        try:
            if not here.poll(_SECONDS):
                raise TimeoutError(f"{self.name} took more than {_SECONDS} s")
            return here.recv()
        except EOFError:
            raise RuntimeError(f"{self.name} failed in a process of its own; its error is printed above") from None
        finally:
            process.join(10)
            if process.is_alive():
                process.kill()


def load(module: str) -> Any:
    return importlib.import_module(f"bench.peers.{module}")


def prepare(modules: Iterable[str]) -> None:
    """Have processes that are started later find these modules loaded."""
    named = sorted({f"bench.peers.{module}" for module in modules})
    multiprocessing.get_context("forkserver").set_forkserver_preload(["bench.peers.contestant", *named])


def timed(loader: Loader, turn: int) -> float:
    """Return the seconds of one epoch."""
    start = time.perf_counter()
    for _ in loader.epoch(turn):
        pass
    return time.perf_counter() - start


def content(loader: Loader) -> Content:
    """Return the tokens of an epoch, and the sum of its rows as uint16, which no order changes."""
    tokens = total = 0
    for rows, lengths in loader.epoch(0):
        tokens += int(lengths.sum())
        total += int(rows.numpy().view(np.uint16).sum(dtype=np.uint64))
    return tokens, total


def _seconds(loader: Loader, turn: int) -> float:
    gc.collect()
    return timed(loader, turn)


def _content(loader: Loader, turn: int) -> Content:
    return content(loader)


def _run(
    pipe: Connection, what: Callable[[Loader, int], Any], contestant: Contestant, wanted: Wanted, turn: int
) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of a loader's workers, as it is where nobody says another
    loader = contestant.open(wanted)
    pipe.send(what(loader, turn))
    loader.close()

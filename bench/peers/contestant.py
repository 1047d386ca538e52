"""One way to deliver the documents, and what a turn of it takes."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.loading import Loader, Wanted

_SECONDS = 600  # after which a turn in a process of its own is given up


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
    def ours(self) -> bool:
        return self.module == "ours"

    def open(self, wanted: Wanted) -> Loader:
        made: Loader = load(self.module).ways(self.folder, self.count, wanted, self.workers)[self.way]()
        return made

    def content(self, wanted: Wanted) -> tuple[int, int]:
        """Return the tokens of an epoch, and the sum of its rows as uint16, which no order changes."""
        loader = self.open(replace(wanted, persistent=False))
        tokens = total = 0
        for rows, lengths in loader.epoch(0):
            tokens += int(lengths.sum())
            total += int(rows.numpy().view(np.uint16).sum(dtype=np.uint64))
        loader.close()
        return tokens, total

    def anew(self, wanted: Wanted, turn: int) -> float:
        """Take a turn in a process of its own, with everything opened there; return the turn's seconds."""
        context = multiprocessing.get_context("forkserver")
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_turn, args=(there, self, replace(wanted, persistent=False), turn))
        process.start()
        there.close()
        try:
            if not here.poll(_SECONDS):
                raise TimeoutError(f"{self.name} took more than {_SECONDS} s")
            seconds: float = here.recv()
        except EOFError:
            raise RuntimeError(f"{self.name} failed in a process of its own; its error is printed above") from None
        finally:
            process.join(10)
            if process.is_alive():
                process.kill()
        return seconds


def load(module: str) -> Any:
    return importlib.import_module(f"bench.peers.{module}")


def prepare(contestants: list[Contestant]) -> None:
    """Have processes that are started later find all modules loaded."""
    modules = sorted({f"bench.peers.{contestant.module}" for contestant in contestants})
    multiprocessing.get_context("forkserver").set_forkserver_preload(["bench.peers.contestant", *modules])


def timed(loader: Loader, turn: int) -> float:
    """Return the seconds of one epoch."""
    start = time.perf_counter()
    for _ in loader.epoch(turn):
        pass
    return time.perf_counter() - start


def _turn(pipe: Connection, contestant: Contestant, wanted: Wanted, turn: int) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of a loader's workers, as it is where nobody says another
    loader = contestant.open(wanted)
    gc.collect()
    pipe.send(timed(loader, turn))
    loader.close()

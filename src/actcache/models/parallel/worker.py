"""One of the processes that fill: its messages, its signals, and what it does."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import FrameType

import torch
from transformers.utils import logging

from actcache.format.keys import Document
from actcache.models import error_budget
from actcache.models.budget import Shared
from actcache.models.filling import FillReport
from actcache.models.partition import Part
from actcache.models.remote import Blueprint, Failed


@dataclass(frozen=True)
class Job:
    """What all the processes do."""

    blueprint: Blueprint  # its store is a URL or path that means the same from everywhere
    token_budget: int
    max_bytes: int | None
    sample: list[Document]  # of which the first process measures what storing does, before any stores
    max_error: float | None
    metric: str
    first: Sequence[Document] = ()  # which have to be such as can be stored, or else nothing is made


# What a process says. Only ``More`` is answered, by a ``Part`` or None.


@dataclass(frozen=True)
class Ready:
    """The model is loaded, and these spaces are there; of the first process: storing is within the error budget."""

    fingerprints: tuple[str, ...]


@dataclass(frozen=True)
class More:
    """It wants a part."""


@dataclass(frozen=True)
class Advanced:
    """So many documents are stored, of which so many, with so many tokens, were computed just now."""

    documents: int
    computed: int
    tokens: int


@dataclass(frozen=True)
class Done:
    """All is stored, and everything is closed."""

    report: FillReport


STOP_SECONDS = 60.0  # for a process to store what it has computed when it is told to end

#: SIGTERM is what the first process sends. A batch system sends it to all, a terminal that is closed SIGHUP.
_ENDING = (signal.SIGTERM, signal.SIGHUP)
_GONE = (BrokenPipeError, ConnectionResetError, EOFError)  # the first process


class _Stopped(BaseException):
    """The first process wants this one to end, or is gone; or whoever ended all."""


class _Stop:
    """Ends what the process does when it gets a signal, once: what follows is storing what was computed."""

    number = 0  # of the signal that has come

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.ignore()
        self.number = number
        raise _Stopped

    def heed(self) -> None:
        """Have signals end the process, but SIGHUP where the first process has it ignored (``nohup``)."""
        for number in _ENDING:
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self)

    def ignore(self) -> None:
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)

    def check(self) -> None:
        """End it where the signal came in the middle of something that lets no exception through."""
        if self.number:
            raise _Stopped


def main(channel: Connection, job: Job, device: str, number: int, threads: int, shared: Shared | None) -> None:
    """Fill the parts that the first process sends: the main function of the process of a ``number``, from 0.

    It computes with so many ``threads``; ``shared`` is what its ``ByteBudget`` has in common with the others'.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the first process decides what it means
    stop = _Stop()
    with contextlib.suppress(_Stopped, *_GONE):  # what was computed is stored, and nobody listens
        try:
            stop.heed()
            threading.Thread(target=_follow, daemon=True).start()
            channel.send(_result(channel, job, device, number, threads, shared, stop))
        finally:
            stop.ignore()
    if stop.number:
        sys.exit(128 + stop.number)


def _result(
    channel: Connection, job: Job, device: str, number: int, threads: int, shared: Shared | None, stop: _Stop
) -> Done | Failed:
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # of the tokenizer
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def advance(*counts: int) -> None:
        stop.check()
        channel.send(Advanced(*counts))

    try:
        with contextlib.closing(job.blueprint.make(device, job.first)) as recyclers:
            filler = recyclers.filler
            if number == 0:
                error_budget.measured(job.sample, filler.agreements, job.max_error, job.metric)
            channel.send(Ready(filler.fingerprints))
            report = filler.fill_parts(
                _parts(channel),
                advance=advance,
                token_budget=job.token_budget,
                max_bytes=job.max_bytes,
                shared=shared,
                number=number,
            )
        return Done(report)
    except _GONE:
        raise
    except Exception as error:  # it is raised where the fill was called
        return Failed.by(error, f"the process for {device}")


def _parts(channel: Connection) -> Iterator[Part]:
    while True:
        channel.send(More())
        if (part := channel.recv()) is None:
            return
        yield part


def _follow() -> None:
    """End with the first process, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STOP_SECONDS)
        os._exit(1)

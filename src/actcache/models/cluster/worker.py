"""One of the workers of a cluster: it fills the parts that it is given, and says what has become of them."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.utils import logging

from actcache.errors import WorkerError
from actcache.format.keys import Document
from actcache.models import error_budget
from actcache.models.documents import HeldColumns
from actcache.models.filling import Filler, FillReport
from actcache.models.partition import Part, Partition
from actcache.models.remote import Blueprint, Failed
from actcache.store.contributor import Contributor

_IN_HAND = 2  # parts: one is computed, the next one waits
_NEWS_SECONDS = 1.0  # after which the leader gets an answer in any case

Numbered = tuple[int, Part]  # parts are numbered as they are given, from 0


@dataclass(frozen=True)
class WithColumns:
    """A document on its way to a worker, and what stands beside its tokens."""

    document: Document
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Job:
    """What all the workers do."""

    blueprint: Blueprint
    token_budget: int
    sample: list[Document]  # of which the first worker measures what storing does, before any stores
    max_error: float | None
    metric: str
    run: str
    workers: int
    reopen: tuple[Any, ...] | None = None  # opens the blueprint's store there, and no other: what pickles it
    columns: tuple[str, ...] = ()  # the caller's own, where documents come ``WithColumns``


@dataclass(frozen=True)
class Durable:
    """A part of which all is stored, and survives this worker."""

    number: int
    report: FillReport  # what this worker did with it

    @property
    def computed(self) -> int:
        """How many documents of it this worker computed."""
        return self.report.computed


@dataclass(frozen=True)
class News:
    """What has become of the parts since the last news."""

    documents: int = 0  # that are stored
    computed: int = 0  # just now
    tokens: int = 0
    durable: tuple[Durable, ...] = ()
    wants: int = 0  # parts that it would take
    fingerprints: tuple[str, ...] = ()  # once the model is loaded
    report: FillReport | None = None  # all is stored, and everything is closed
    failed: Failed | None = None


class _Stopped(BaseException):
    """The leader wants this worker to end: what is computed is stored."""


class Worker:
    """An actor. One thread computes; the actor's own one takes parts and answers.

    Args:
        number: from 0; the share of the documents.
        attempt: how many workers of this share have died before.
        device: None for a GPU where Ray gives it one, else the CPU.
        threads: that it computes with, on a CPU.
    """

    def __init__(self, job: Job, number: int, attempt: int, device: str | None, threads: int) -> None:
        self._job, self._share, self._attempt = job, Partition(number, job.workers), attempt
        self._device, self._threads = device, threads
        self._parts: queue.SimpleQueue[Numbered | None] = queue.SimpleQueue()
        self._stopping = False
        self._changed = threading.Condition()
        self._counts = (0, 0, 0)  # documents stored, computed, and their tokens, since the last news
        self._in_hand = 0
        self._fingerprints: tuple[str, ...] = ()
        self._columns = HeldColumns(job.columns) if job.columns else None
        self._put: list[tuple[list[int], Durable]] = []  # those not known to be durable, and entries added by then
        self._durable: list[Durable] = []  # since the last news
        self._filler: Filler | None = None
        self._contributor: Contributor | None = None
        self._report: FillReport | None = None
        self._failed: Failed | None = None
        self._thread = threading.Thread(target=self._run, name="actcache-fill", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:  # Ray's log lines begin with it
        return f"fill {self._share}"

    # --- by the leader ------------------------------------------------------------------------------------------------

    def news(self, parts: Sequence[Numbered | None]) -> News:
        """Take parts (None: there are no more), and tell what has become of those before: at once where that is
        something, else when something has, or in a second."""
        if self._contributor is not None:
            self._contributor.note()  # within a second of a segment: a worker that is killed says no more
        with self._changed:
            self._in_hand += sum(part is not None for part in parts)
            for part in parts:
                self._parts.put(part)
            if not parts:
                self._changed.wait_for(lambda: any(self._counts) or self._ended(), _NEWS_SECONDS)
            self._look()
            (documents, computed, tokens), self._counts = self._counts, (0, 0, 0)
            durable, self._durable = tuple(self._durable), []
            wants = max(0, _IN_HAND - self._in_hand) if self._fingerprints else 0
            told = self._fingerprints, self._report, self._failed
            return News(documents, computed, tokens, durable, wants, *told)

    def stop(self) -> News:
        """Store what is computed, and end."""
        self._stopping = True
        self._parts.put(None)
        self._thread.join()
        return self.news([None])

    # --- by the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        report, failed = None, None
        try:
            report = self._fill()
        except _Stopped:
            pass
        except Exception as error:  # the leader raises it
            failed = Failed.by(error, f"worker {self._share}")
        except BaseException as error:
            failed = Failed(WorkerError, f"worker {self._share} failed: {type(error).__name__}: {error}")
            raise
        finally:
            with self._changed:
                self._report, self._failed = report, failed
                self._changed.notify()

    def _fill(self) -> FillReport:
        job = self._job
        device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
        _check_device(device)
        os.environ["RAYON_NUM_THREADS"] = str(self._threads)  # of the tokenizer
        torch.set_num_threads(self._threads)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        blueprint = job.blueprint
        with contextlib.ExitStack() as stack:
            if job.reopen is not None:  # here, where an error is told
                store = stack.enter_context(job.reopen[0](*job.reopen[1]))
                blueprint = replace(blueprint, store=store)
            recyclers = stack.enter_context(contextlib.closing(blueprint.make(device, job.sample)))
            filler = recyclers.filler
            if self._share.number == 0:
                error_budget.measured(job.sample, filler.agreements, job.max_error, job.metric)
            contributor = Contributor(
                filler.spaces, str(self._share), run=job.run, attempt=self._attempt, device=device
            )
            with self._changed:
                self._filler, self._fingerprints, self._contributor = filler, filler.fingerprints, contributor
                self._changed.notify()
            try:
                return filler.fill_parts(
                    self._given(filler),
                    advance=self._advance,
                    token_budget=job.token_budget,
                    partition=self._share,
                    contributor=contributor,
                    own=self._columns,
                )
            finally:
                with self._changed:
                    self._look()
                    self._filler = self._contributor = None

    def _given(self, filler: Filler) -> Iterator[Part]:
        before: FillReport | None = None
        while (numbered := self._parts.get()) is not None and not self._stopping:
            number, part = numbered
            yield part if self._columns is None else _held(part, self._columns)
            with self._changed:  # all of it was put
                assert filler.so_far is not None
                added, now = [space.written.added for space in filler.spaces], filler.so_far()
                self._put.append((added, Durable(number, now if before is None else now.since(before))))
                before = now
                self._in_hand -= 1
                self._changed.notify()
        if self._stopping:
            raise _Stopped

    def _advance(self, documents: int, computed: int, tokens: int) -> None:
        if self._stopping:
            raise _Stopped
        with self._changed:
            before = self._counts
            self._counts = (before[0] + documents, before[1] + computed, before[2] + tokens)
            self._changed.notify()

    def _ended(self) -> bool:
        return self._report is not None or self._failed is not None

    def _look(self) -> None:
        """Learn which parts are durable by now: entries become so in the order in which they were put."""
        if (filler := self._filler) is None:
            return
        published = [space.written.published for space in filler.spaces]
        while self._put and all(done >= added for done, added in zip(published, self._put[0][0], strict=True)):
            self._durable.append(self._put.pop(0)[1])


def _held(part: Part, columns: HeldColumns) -> Part:
    """Return documents alone; ``columns`` holds what came beside them."""
    positions, given = part
    documents: list[Document] = []
    for position, one in zip(positions, given, strict=True):
        assert isinstance(one, WithColumns)
        columns.hold(position, one.values)
        documents.append(one.document)
    return positions, documents


def _check_device(device: str) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise WorkerError(
            f"Ray gave this worker a GPU on {socket.gethostname()}, and torch {torch.__version__} finds none there: "
            "install a build of torch with CUDA on the nodes, and their drivers; or compute on CPUs, by device='cpu'"
        )

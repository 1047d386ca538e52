"""The process that partitions the documents, and what becomes of the others when one fails."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

import torch

from actcache.errors import ActcacheError, StorageIOError, StoreError, StoreNotFoundError, UsageError, WorkerError
from actcache.format.arguments import nbytes_of
from actcache.format.keys import Document
from actcache.io.workers import available_cpus
from actcache.models import error_budget
from actcache.models.documents import check_texts
from actcache.models.filling import CHUNK, FillReport
from actcache.models.lower_half import TOKEN_BUDGET, check_token_budget
from actcache.models.parallel import worker
from actcache.models.parallel.worker import STOP_SECONDS, Advanced, Done, Job, More, Ready
from actcache.models.partition import Partitioner
from actcache.models.progress import FillProgress
from actcache.models.recyclers import Recyclers
from actcache.models.remote import Blueprint, Failed
from actcache.models.sites import several
from actcache.segments.registry import resolve
from actcache.store.store import open_store

_SAME_SECONDS = 0.5  # within which a signal to all processes comes to each


def fill(
    texts: Iterable[Document],
    model: str | Path,
    *,
    devices: Sequence[str],
    store: str | Path,
    layers: Sequence[int | str] | str = (),
    sites: Sequence[str] = (),
    token_budget: int = TOKEN_BUDGET,
    progress: bool = True,
    max_bytes: int | str | None = None,
    max_error: float | None = None,
    metric: str = "rows",
    **options: Any,
) -> FillReport:
    """Fill a store as ``Recyclers.fill`` does, by a process for each device; durable when it returns.

    The processes are spawned: a script calls this below ``if __name__ == "__main__":``. Those on CPUs share its cores.
    When one of them fails or dies, and on Ctrl-C, all end, having stored what they have computed; also where this
    process is ended by a signal that it does not handle, or killed.

    Args:
        devices: such as ``["cuda:0", "cuda:1"]`` or ``["cpu", "cpu"]``.
        store: its URL or path. Other processes must see it: not one in memory.
        max_bytes: see ``Recycler.fill``. Here, each process leaves out what is missing from the first of its documents
            on that does not fit.
        max_error, metric: see ``Recycler.fill``; the first process measures, before any stores.
        options: the other arguments of ``Recyclers.from_pretrained``.

    Raises:
        UsageError: the texts are none; there are no devices, or one is none; the store is seen by one process only.
        WorkerError: a process died, or failed with an error that is none of this package's.
        ActcacheError: one failed with this; see ``Recycler.fill``.
        ErrorBudgetError: storing changes ``metric`` by more than ``max_error``; nothing was stored.
        StoreError: also where this was interrupted, or one failed, and what the others had could not be stored; its
            ``lost`` says how many entries that was.
    """
    several(layers, sites)
    error_budget.check_metric(metric)
    token_budget = check_token_budget(token_budget)
    check_devices(devices)
    limit = None if max_bytes is None else nbytes_of("max_bytes", max_bytes)
    check_texts(texts)
    count = len(texts) if isinstance(texts, Sized) else None
    first, texts = error_budget.peeked(texts, CHUNK)
    where = {"layers": layers if isinstance(layers, str) else list(layers), "sites": list(sites)}
    blueprint = Blueprint(Recyclers.from_pretrained, str(model), resolve(store), {**where, **options})
    job = Job(blueprint, token_budget, limit, first[: error_budget.SAMPLE], max_error, metric, first)
    start = time.monotonic()
    partitioner = Partitioner(texts, len(devices), CHUNK)
    with (
        FillProgress(count, show=progress) as bar,
        _Crew(job, devices) as crew,
    ):
        reports = _lead(crew, partitioner, bar, job)
    total = sum(reports[1:], start=reports[0])
    present = partitioner.taken - total.computed - total.left_out
    return replace(total, documents=partitioner.taken, present=present, seconds=time.monotonic() - start)


def _lead(crew: _Crew, partitioner: Partitioner, bar: FillProgress, job: Job) -> list[FillReport]:
    """Answer the processes until all are done."""
    reports: list[FillReport] = []
    idle: list[_Member] = []
    measured = False  # what storing does, which the first process says
    while len(reports) < len(crew.members):
        for member, message in crew.messages():
            match message:
                case Ready(fingerprints):
                    _check_seen(job, fingerprints)
                    measured = measured or member.number == 0
                case More():
                    idle.append(member)
                case Advanced(documents, computed, tokens):
                    bar.advance(documents, computed, tokens)
                case Done(report):
                    reports.append(report)
                    member.done = True
                case Failed():
                    member.failed = message.error()
                    raise member.failed
        if not measured:
            continue  # nobody gets documents to store
        waiting, idle = idle, []
        for member in waiting:
            part = partitioner.part(member.number)
            if part is None or part[1]:
                member.send(part)
            else:
                idle.append(member)
    return reports


@dataclass
class _Member:
    """A process, and the way to it."""

    number: int
    device: str
    process: SpawnProcess
    channel: Connection
    done: bool = False
    failed: ActcacheError | None = None

    def send(self, part: object) -> None:
        try:
            self.channel.send(part)
        except OSError:
            raise self.death() from None

    def receive(self) -> object:
        try:
            return self.channel.recv()
        except (EOFError, OSError):
            raise self.death() from None

    def end(self, deadline: float) -> StoreError | None:
        """Wait until it has ended; return why it could not store what it had, None where it did."""
        with contextlib.suppress(EOFError, OSError):  # its end of the channel is closed
            while wait([self.channel, self.process.sentinel], _left(deadline)) and self.channel.poll():
                if isinstance(message := self.channel.recv(), Failed):
                    self.failed = message.error()
        self.process.join(_left(deadline))
        if self.process.exitcode is None:
            late = f"the process for {self.device} did not store what it had within {STOP_SECONDS:.0f} s and was killed"
            return StorageIOError(f"{late}: that is lost, fill again")
        return self.failed if isinstance(self.failed, StoreError) else None

    def death(self) -> WorkerError:
        """Return the error that says how the process died."""
        self.process.join(STOP_SECONDS)
        code = self.process.exitcode
        how = f"ended with exit code {code}"
        if (ended := _signal_of(code)) is not None:
            time.sleep(_SAME_SECONDS)  # where all were to end, this process ends by its own signal
            how = f"was ended by {ended.name}"
            how += "; it often means that memory ran out" if ended == signal.SIGKILL else ""
        return WorkerError(f"the process for {self.device} {how}. What was stored stays: fill again to go on")


def _together(failures: Sequence[StoreError]) -> StoreError:
    """Return one error for what several processes could not store."""
    first, lost = failures[0], sum(error.lost for error in failures)
    if lost == first.lost:
        return first
    error = type(first)(f"{first}. Other processes lost {lost - first.lost} more")
    error.lost = lost
    return error


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _signal_of(code: int | None) -> signal.Signals | None:
    """Return the signal that ended a process, by its exit code."""
    try:
        return signal.Signals(-code if code is not None and code < 0 else (code or 0) - 128)
    except ValueError:
        return None


class _Crew:
    """The processes. A context manager: none of them outlives it."""

    def __init__(self, job: Job, devices: Sequence[str]) -> None:
        self.members: list[_Member] = []
        self._job, self._devices = job, devices
        self._shared: tuple[Any, Any] | None = None  # its lock is there for the others as long as it is held here

    def __enter__(self) -> _Crew:
        context = multiprocessing.get_context("spawn")
        if self._job.max_bytes is not None:
            self._shared = context.Array("q", 1 + len(self._devices), lock=False), context.Lock()
        try:
            with _interrupts_later(context):
                for number, device in enumerate(self._devices):
                    self._start(context, number, device)
        except BaseException:
            self._end()
            raise
        return self

    def _start(self, context: SpawnContext, number: int, device: str) -> None:
        ours, theirs = context.Pipe()
        threads = max(1, available_cpus() // len(self._devices))
        process = context.Process(
            target=worker.main,
            args=(theirs, self._job, device, number, threads, self._shared),
            name=f"actcache-fill-{number}",
            daemon=True,
        )
        self.members.append(_Member(number, device, process, ours))
        try:
            process.start()
        finally:
            theirs.close()  # or the end of the process would not be the end of what can be received

    def messages(self) -> Iterator[tuple[_Member, object]]:
        """Wait until a process says something, and yield what each says."""
        channels = {member.channel: member for member in self.members if not member.done}
        for channel in wait(list(channels)):
            member = channels[channel]  # type: ignore[index]
            yield member, member.receive()

    def _end(self) -> None:
        """Have the processes store what they have, and end; those that don't, or at a second Ctrl-C, are killed.

        Raises:
            StoreError: one could not store what it had, or not in time; in place of what ended the others.
        """
        running = [member for member in self.members if member.process.pid is not None]
        try:
            for member in running:
                if not member.done:
                    member.process.terminate()
            deadline = time.monotonic() + STOP_SECONDS
            failures = [error for member in running if (error := member.end(deadline)) is not None]
        finally:
            for member in running:
                member.process.kill()
                member.process.join()
            for member in self.members:
                member.channel.close()
        if failures:
            raise _together(failures)

    def __exit__(self, *error: object) -> None:
        self._end()


@contextlib.contextmanager
def _interrupts_later(context: SpawnContext) -> Iterator[None]:
    """Start processes that never see Ctrl-C, which a terminal sends to all, and hear of it here when they have started.

    The signal mask is inherited; multiprocessing's own helper, which would change it, is made to start before.
    """
    context.Lock()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_devices(devices: Sequence[str]) -> None:
    """Raise ``UsageError`` where there are no devices, or one is none."""
    if not devices or isinstance(devices, str):
        raise UsageError(f"devices are a list such as ['cuda:0', 'cuda:1'] or ['cpu', 'cpu'], not {devices!r}")
    for device in devices:
        try:
            torch.device(device)
        except RuntimeError:
            raise UsageError(f"{device!r} is no device; devices are such as 'cuda:0' or 'cpu'") from None


def _check_seen(job: Job, fingerprints: Sequence[str]) -> None:
    """Refuse a store that lies in one process's memory."""
    seen: set[str] = set()
    with contextlib.suppress(StoreNotFoundError), open_store(str(job.blueprint.store), mode="r") as opened:
        seen.update(opened.fingerprints())
    if not seen.issuperset(fingerprints):
        raise UsageError(
            f"what one process stores in {job.blueprint.store} no other one sees: fill it from one process"
        )

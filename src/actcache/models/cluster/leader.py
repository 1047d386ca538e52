"""The process that partitions the documents, and what becomes of the others when a worker dies."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from actcache.errors import ActcacheError, StorageIOError, StoreError, UsageError, WorkerError, requires_extra
from actcache.format.arguments import whole
from actcache.format.keys import Document
from actcache.io.workers import available_cpus
from actcache.models import error_budget
from actcache.models.cluster.worker import Job, News, Numbered, WithColumns, Worker
from actcache.models.documents import DocumentsWithColumns, check_texts, document_keys
from actcache.models.filling import CHUNK, FillReport
from actcache.models.lower_half import TOKEN_BUDGET, check_token_budget
from actcache.models.partition import Part, Partitioner
from actcache.models.progress import FillProgress
from actcache.models.remote import Blueprint
from actcache.store.contributions import Contribution
from actcache.store.store import Store, open_store

logger = logging.getLogger(__name__)

STOP_SECONDS = 60.0  # for a worker to store what it has computed when it is told to end
_CONNECT_SECONDS = 10.0
_LOOK_SECONDS = 1.0  # after which it is looked whether workers have started


def fill(
    texts: Iterable[Document],
    blueprint: Blueprint,
    *,
    address: str | None = None,
    workers: int | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
    device: str | None = None,
    token_budget: int = TOKEN_BUDGET,
    progress: bool = True,
    max_error: float | None = None,
    metric: str = "rows",
    deaths: int = 3,
    start_seconds: float = 600.0,
    finish: bool = True,
    ray_options: Mapping[str, Any] | None = None,
    chunk: int = CHUNK,
    keys_of: Callable[[Sequence[Document], int], list[bytes]] = document_keys,
) -> FillReport:
    """Fill a store by the workers of a Ray cluster; see ``Recycler.fill_ray``.

    Args:
        blueprint: of the recyclers, which each worker makes; this process loads no model.
        chunk: documents that a worker is given at a time.
        keys_of: their keys, by which they are dealt out; it is told the position of the first.
    """
    error_budget.check_metric(metric)
    token_budget = check_token_budget(token_budget)
    check_texts(texts)
    with requires_extra("ray", "a fill by Ray's workers needs Ray"):
        import ray
    own = texts if isinstance(texts, DocumentsWithColumns) else None
    count = len(texts) if isinstance(texts, Sized) else None
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        store = blueprint.store
        if not isinstance(store, Store):
            store = stack.enter_context(open_store(store))
        store.check_writable()
        stack.enter_context(connected(ray, address))
        each = _asked(ray, workers, cpus, 0.0 if gpus is None and str(device) == "cpu" else gpus)
        sample, texts = error_budget.peeked(texts)
        job = Job(
            replace(blueprint, store=store.address),
            token_budget,
            sample,
            max_error,
            metric,
            secrets.token_hex(4),
            each.workers,
            store.__reduce__(),
            () if own is None else own.beside,
        )
        dealing = _Dealing(Partitioner(texts, each.workers, chunk, keys_of), own)
        bar = stack.enter_context(FillProgress(count, show=progress))
        crew = stack.enter_context(_Crew(ray, job, each, device, dict(ray_options or {}), deaths))
        total = reduce(add, [*crew.lead(dealing, bar, start_seconds), *crew.of_the_dead])
        crew.end()
        contributions = [one for name in crew.fingerprints for one in _noted(store, name, job.run, finish)]
    return replace(
        total,
        seconds=time.monotonic() - start,
        nbytes=sum(one.nbytes for one in contributions),
        segments=sum(one.segments for one in contributions),
        partition=None,
        contributions=tuple(contributions),
    )


def _noted(store: Store, fingerprint: str, run: str, finish: bool) -> list[Contribution]:
    """Finish a space, and return what the workers of this run have noted in the store."""
    with store[fingerprint] as space:
        if finish:
            space.finish()
        return [one for one in space.contributions() if one.run == run]


class _Dealing:
    """Parts of the documents for each worker, with what stands beside the documents' tokens."""

    def __init__(self, partitioner: Partitioner, own: DocumentsWithColumns | None) -> None:
        self._partitioner, self._own = partitioner, own

    def part(self, worker: int) -> Part | None:
        """See ``Partitioner.part``."""
        part = self._partitioner.part(worker)
        if part is None or self._own is None:
            return part
        given = zip(*part, strict=True)
        return part[0], [WithColumns(one, self._own.give(position)) for position, one in given]  # type: ignore[misc]


@contextlib.contextmanager
def connected(ray: Any, address: str | None) -> Iterator[None]:
    """Connect to a cluster, or start one here; where the caller is connected, use that."""
    if ray.is_initialized():
        if address not in (None, "auto"):
            raise UsageError("Ray is initialized already: leave the address out, or call ray.shutdown() first")
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    where = address if address not in (None, "auto") else os.environ.get("RAY_ADDRESS") or _running_here() or "local"
    with contextlib.ExitStack() as stack:
        with _own_handlers():
            if where == "local":
                stack.enter_context(_started(ray, quiet))
            else:
                _check_listens(where)
                try:
                    ray.init(address=where, **quiet)
                except ImportError as error:  # what Ray's client needs beside Ray
                    raise WorkerError(f"{where} needs Ray's client ({error}): pip install 'ray[client]'") from None
                except (ConnectionError, RuntimeError, ValueError) as error:
                    raise WorkerError(f"the Ray cluster at {where} cannot be used: {error}") from None
        try:
            yield
        finally:
            with _own_handlers():
                ray.shutdown()


def _running_here() -> str | None:
    """Return the address of the cluster that ``ray start`` has made this machine a node of; None where it has not, or
    that is gone."""
    try:
        where = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster").read_text(encoding="utf-8")
        _check_listens(where.strip())
    except (OSError, WorkerError):
        return None
    return where.strip()


def _check_listens(where: str) -> None:
    """Raise ``WorkerError`` where nobody listens: Ray itself would wait for minutes, or for ever."""
    host, _, port = where.rpartition("://")[2].strip("/").rpartition(":")
    if not host or not port.isdecimal():
        raise WorkerError(f"{where!r} is no address of a Ray cluster: write host:6379, ray://host:10001, auto or local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise WorkerError(f"there is no Ray cluster at {where}: {error}") from None


@contextlib.contextmanager
def _started(ray: Any, options: dict[str, Any]) -> Iterator[None]:
    """Start a cluster that is for this machine alone: it listens to no other, and tells nobody of its use."""
    given = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    before = {name: os.environ.get(name) for name in given}
    constants = ray._private.ray_constants  # where the variable is read when Ray is imported
    enabled = constants.ENABLE_RAY_CLUSTER
    os.environ.update({name: value for name, value in given.items() if before[name] is None})
    constants.ENABLE_RAY_CLUSTER = False
    try:
        ray.init(address="local", include_dashboard=False, num_cpus=available_cpus(), **options)
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = enabled
        for name in [name for name, value in before.items() if value is None]:
            del os.environ[name]


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Have Ray leave the program's signal handlers as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


@dataclass(frozen=True)
class _Each:
    """How many workers there are, and what each takes of the cluster."""

    workers: int
    cpus: float
    gpus: float


def _asked(ray: Any, workers: int | None, cpus: float | None, gpus: float | None) -> _Each:
    there = ray.cluster_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus is None:
        gpus = 1.0 if there.get("GPU", 0) >= 1 else 0.0
    if workers is not None:
        workers = whole("workers", workers, 1)
    if cpus is None:
        if gpus:
            cpus = 1.0
        elif workers is None:  # a worker a node
            cpus = max(1.0, min((found for node in nodes if (found := node.get("CPU", 0.0)) >= 1), default=1.0))
        else:
            share = there.get("CPU", 1.0) / workers
            cpus = float(int(share)) if share >= 1 else share
    if workers is None:
        rooms = (
            min(node.get("CPU", 0.0) // cpus if cpus else 1e9, node.get("GPU", 0.0) // gpus if gpus else 1e9)
            for node in nodes
        )
        workers = max(1, int(sum(rooms)))
    return _Each(workers, cpus, gpus)


@dataclass
class _Member:
    """A share of the documents, and the worker that fills it."""

    number: int
    actor: Any = None
    attempt: int = 0
    deaths: int = 0  # since something was stored
    started: float = 0.0
    answered: bool = False
    held: dict[int, Part] = field(default_factory=dict)  # what it was given and is not known to be durable
    given: int = 0  # parts so far
    told: int = 0  # documents that it said are stored, of parts that are not known to be durable
    stored: list[FillReport] = field(default_factory=list)  # of this attempt's parts that are known to be durable
    ending: bool = False  # no more come
    done: bool = False
    to_give: list[Numbered | None] = field(default_factory=list)

    def next_number(self) -> int:
        self.given += 1
        return self.given - 1


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _Crew:
    """The workers. A context manager: none of them outlives it."""

    def __init__(
        self, ray: Any, job: Job, each: _Each, device: str | None, options: dict[str, Any], deaths: int
    ) -> None:
        self._ray, self._job, self._each, self._device = ray, job, each, device
        self._actor = ray.remote(Worker)
        self._options = {"num_cpus": each.cpus, "num_gpus": each.gpus, **options, "max_restarts": 0}
        self._deaths = deaths  # of workers of one share, one after another, that have stored nothing
        self.members = [_Member(number) for number in range(each.workers)]
        self._calls: dict[Any, _Member] = {}
        self.of_the_dead: list[FillReport] = []  # what dead workers did with the parts that are known to be durable
        self.fingerprints: tuple[str, ...] = ()
        self._measured = False

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def lead(self, dealing: _Dealing, bar: FillProgress, start_seconds: float) -> list[FillReport]:
        """Give the workers their documents until all is stored; return what each worker that lives says."""
        reports: list[FillReport] = []
        for member in self.members:
            self._start(member)
        while self._calls:
            answered, _ = self._ray.wait(list(self._calls), timeout=_LOOK_SECONDS)
            for call in answered:
                member = self._calls.pop(call)
                news = self._news(member, call, bar)
                if news is None:
                    continue
                if news.failed is not None:
                    member.done = True
                    raise news.failed.error()
                if news.report is not None:
                    member.done = True
                    reports.append(news.report)
                    continue
                self._deal(member, news.wants, dealing)
                self._calls[member.actor.news.remote(member.to_give)] = member
                member.to_give = []
            self._check_started(start_seconds)
        return reports

    def _start(self, member: _Member) -> None:
        each = self._each
        member.started, member.answered, member.told = time.monotonic(), False, 0
        threads = max(1, int(each.cpus))
        device = self._device or ("cuda" if each.gpus else "cpu")
        member.actor = self._actor.options(**self._options).remote(
            self._job, member.number, member.attempt, device, threads
        )
        again: list[Numbered | None] = [*member.held.items()]
        if member.ending:
            again.append(None)
        self._calls[member.actor.news.remote(again)] = member

    def _news(self, member: _Member, call: Any, bar: FillProgress) -> News | None:
        """Return what a worker says; None where it has died, and another was started in its place."""
        try:
            news: News = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:  # what a worker foresees, it says
            raise WorkerError(f"worker {self._name(member)} failed: {error}") from None
        except self._ray.exceptions.RayError as error:  # it, its node, or what held the answer is gone
            self._died(member, error)
            bar.advance(-member.told)  # what was not durable is looked for, and computed, again
            self._start(member)
            return None
        member.answered = True
        member.told += news.documents
        bar.advance(news.documents, news.computed, news.tokens)
        if news.durable:
            member.deaths = 0
        for part in news.durable:
            member.told -= len(member.held.pop(part.number)[0])
            member.stored = [reduce(add, [*member.stored, part.report])]
        if news.fingerprints:
            self.fingerprints = self.fingerprints or news.fingerprints
            self._measured = self._measured or member.number == 0
        return news

    def _died(self, member: _Member, error: Exception) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(member.actor)
        why = _first_line(error)
        member.deaths += 1
        if member.deaths > self._deaths:
            member.done = True
            raise WorkerError(
                f"worker {self._name(member)} died, and so did those before it: {why}. It often means that memory ran "
                "out. What was stored stays: fill again to go on"
            )
        member.attempt += 1
        self.of_the_dead += member.stored
        member.stored = []
        logger.warning("worker %s died, another one goes on: %s", self._name(member), why)

    def _name(self, member: _Member) -> str:
        return f"{member.number}/{len(self.members)}"

    def _deal(self, member: _Member, wants: int, dealing: _Dealing) -> None:
        while self._measured and wants and not member.ending:
            part = dealing.part(member.number)
            if part is None:
                member.ending = True
                member.to_give.append(None)
            elif not part[1]:
                return  # others have first to take what is theirs
            else:
                number = member.next_number()
                member.held[number] = part
                member.to_give.append((number, part))
                wants -= 1

    def _check_started(self, seconds: float) -> None:
        now = time.monotonic()
        late = [one for one in self.members if not one.answered and not one.done and now - one.started > seconds]
        if late:
            there = self._ray.cluster_resources()
            raise WorkerError(
                f"{len(late)} of {len(self.members)} workers did not start within {seconds:.0f} s: each asks for "
                f"{self._each.cpus:g} CPUs and {self._each.gpus:g} GPUs, and the cluster has {there.get('CPU', 0):g} "
                f"and {there.get('GPU', 0):g}, which others may hold. Ask for fewer workers, or for less"
            )

    def end(self) -> None:
        """Have the workers store what they have, and end; those that do not in time are killed.

        Raises:
            StoreError: one could not store what it had; in place of what ended the others.
        """
        members, self.members = self.members, []
        self._calls.clear()
        failures: list[ActcacheError] = []
        try:
            stops = {one.number: one.actor.stop.remote() for one in members if one.answered and not one.done}
            deadline = time.monotonic() + STOP_SECONDS
            for number, stop in stops.items():
                try:
                    news = self._ray.get(stop, timeout=max(0.0, deadline - time.monotonic()))
                except self._ray.exceptions.GetTimeoutError:
                    late = f"worker {number} did not store what it had within {STOP_SECONDS:.0f} s and was killed"
                    failures.append(StorageIOError(f"{late}: that is lost, fill again"))
                except self._ray.exceptions.RayError as error:
                    logger.warning("worker %d died as it was told to end: %s", number, _first_line(error))
                else:
                    failures += [news.failed.error()] if news.failed is not None else []
        finally:
            for member in members:
                if member.actor is not None:
                    with contextlib.suppress(self._ray.exceptions.RayError):
                        self._ray.kill(member.actor)
        for failure in failures:
            if isinstance(failure, StoreError):
                raise failure

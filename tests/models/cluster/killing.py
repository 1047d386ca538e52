"""A fill by Ray of which a worker is killed, then the driver, and what must be true after it is run again."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import torch
from transformers import AutoModel

import actcache
from actcache.store.contributions import Contribution
from tests.models.cluster.driving import OPTIONS, digest
from tests.support import PYTHONPATH
from tests.support.waiting import until


def different(sources: Iterator[str], tokenizer: Any, count: int) -> dict[str, str]:
    """Return so many of the texts by the digests of their tokens, which differ."""
    found: dict[str, str] = {}
    while len(found) < count and (some := list(itertools.islice(sources, 1000))):
        cut = tokenizer(some, truncation=True, max_length=OPTIONS["max_length"])["input_ids"]
        for text, ids in zip(some, cut, strict=True):
            found.setdefault(digest(ids), text)
    assert len(found) >= count
    return dict(list(found.items())[:count])


@dataclass
class Killed:
    """A store that is filled by others, as one sees it from outside, and what they log of their computing."""

    url: str
    documents: dict[str, str]  # by the digests of their tokens
    log: Path  # a folder with a file a process
    options: Mapping[str, Any] = field(default_factory=dict)  # of the store
    victim: int = 0
    before_death: set[str] = field(default_factory=set)  # what was stored when the worker was killed
    before_rerun: set[str] = field(default_factory=set)
    first: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.log.mkdir()
        self.keys = {actcache.document_key(text): one for one, text in self.documents.items()}
        assert len(self.keys) == len(self.documents)

    @property
    def texts(self) -> list[str]:
        return list(self.documents.values())

    @contextlib.contextmanager
    def space(self, mode: str = "r") -> Iterator[Any]:
        with actcache.open(self.url, mode=mode, **self.options) as store:
            (recipe,) = store.recipes()
            with store.space(recipe) as space:
                yield space

    def notes(self) -> list[Contribution]:
        with contextlib.suppress(actcache.errors.StoreNotFoundError, ValueError), self.space() as space:
            found: list[Contribution] = space.contributions()
            return found
        return []

    def stored(self) -> set[str]:
        with self.space() as space:
            return {self.keys[key] for key in space.keys()}  # noqa: SIM118

    def workers(self) -> dict[int, int]:
        """Return how many documents each process has begun to compute."""
        return {int(path.name): len(path.read_text(encoding="utf-8").split()) for path in self.log.iterdir()}

    def logged(self) -> dict[str, list[int]]:
        """Return which processes have begun to compute each document."""
        found: dict[str, list[int]] = defaultdict(list)
        for path in self.log.iterdir():
            for line in path.read_text(encoding="utf-8").split():
                found[line].append(int(path.name))
        return found

    def kill_a_worker(self) -> None:
        self.victim = _pid_of(self.notes()[0])
        os.kill(self.victim, signal.SIGKILL)
        self.before_death = self.stored()

    def driver_is_dead(self) -> None:
        """See that its workers end, and what they have left."""
        until(lambda: not any(map(runs, self.workers())), 1800)
        self.before_rerun, self.first = self.stored(), self.logged()
        assert 0 < len(self.before_death) < len(self.before_rerun) < len(self.documents)

    def check_report(self, report: Mapping[str, Any]) -> None:
        """Look at what the next fill says, as JSON has it, and at what the store and the workers' own logs do."""
        assert report["documents"] == len(self.documents)
        assert report["computed"] == len(self.documents) - len(self.before_rerun)
        assert self.stored() == set(self.documents)

        # Who computed what, by the workers' own logs.
        victim = self.victim
        for document, by in self.first.items():
            assert len(by) == 1 or set(by) - {victim}, document
            assert len(by) == 1 or victim in by, "two workers that were not killed computed it"
            assert len(by) == 1 or document not in self.before_death, "it was stored when the worker was killed"
        second = {one: by for one, by in self.logged().items() if len(by) > len(self.first.get(one, ()))}
        assert second.keys() & self.documents.keys() == self.documents.keys() - self.before_rerun
        again = {one: len(by) - len(self.first.get(one, ())) for one, by in second.items() if one in self.documents}
        assert set(again.values()) == {1}

        # Who computed what, by the store.
        notes = self.notes()
        share = next(note.partition for note in notes if _pid_of(note) == victim)
        named = {(note.partition, note.attempt) for note in notes}
        assert named - {(share, 1)} == {("0/2", 0), ("1/2", 0)}  # the successor may have died before its first
        assert len({note.run for note in notes}) == 2
        run = report["contributions"][0]["run"]
        assert [dict(one) for one in report["contributions"]] == [vars(note) for note in notes if note.run == run]
        assert sum(note.entries for note in notes if note.run == run) == report["computed"]
        # What the driver's death cut off may have been published and not noted: one segment of each worker.
        known = sum(note.entries for note in notes if note.run != run)
        assert len(self.before_rerun) // 2 < known <= len(self.before_rerun)
        if self.url.startswith("hdf5"):
            assert set(_copies_in_files(self.url).values()) == {1}

    def recompute(self, model: str, tokenizer: Any, count: int) -> None:
        """Compute a sample by transformers alone."""
        upper = AutoModel.from_pretrained(model).eval()
        texts = self.texts
        with self.space() as space:
            for i in np.random.default_rng(0).choice(len(texts), count, replace=False):
                ids = tokenizer(texts[i], truncation=True, max_length=OPTIONS["max_length"], return_tensors="pt")
                with torch.no_grad():
                    expected = upper(**ids, output_hidden_states=True).hidden_states[1][0].numpy()
                (entry,) = space.get([actcache.document_key(texts[i])])
                assert np.abs(entry.activations - expected).max() <= 1e-5 * np.abs(expected).max()


class Driver:
    """A process that leads fills of some stores, to be killed. A context manager."""

    def __init__(self, folder: Path, places: list[Killed], **settings: Any) -> None:
        self._errors = folder / "errors"
        given = {"texts": places[0].texts, "places": [_place(one) for one in places], **settings}
        (folder / "fill.json").write_text(json.dumps(given), encoding="utf-8")
        command = [sys.executable, "-m", "tests.models.cluster.driving", str(folder / "fill.json")]
        # Who dies here is killed by the test: Ray's monitor would kill workers where others take the memory.
        environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "RAY_memory_monitor_refresh_ms": "0"}
        with self._errors.open("a") as errors:
            self._process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)

    def wait(self, what: Callable[[], Any], seconds: float) -> None:
        """Wait until something is true; the driver must not end before."""
        until(lambda: what() or self._process.poll() is not None, seconds)
        assert self._process.poll() is None, self._errors.read_text()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def reports(self, seconds: float) -> list[dict[str, Any]]:
        """Wait until it is done."""
        out, _ = self._process.communicate(timeout=seconds)
        assert self._process.returncode == 0, self._errors.read_text()
        found: list[dict[str, Any]] = json.loads(out)
        return found

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


def _place(one: Killed) -> dict[str, Any]:
    return {"store": one.url, "options": dict(one.options), "log": str(one.log)}


def runs(pid: int) -> bool:
    """Return whether a process is there, and no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _pid_of(note: Contribution) -> int:
    return int(note.worker.partition(" ")[0].rpartition(":")[2])


def _copies_in_files(url: str) -> Counter[bytes]:
    """Count the copies of each key in the files, read by h5py alone."""
    found: Counter[bytes] = Counter()
    for path in Path(url.removeprefix("hdf5:")).glob("spaces/*/segments/*.h5"):
        with h5py.File(path, "r") as file:
            found.update(key.tobytes() for key in file["keys"][:])
    return found

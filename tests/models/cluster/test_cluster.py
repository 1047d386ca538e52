"""What a fill by Ray's workers is made of, without Ray: tests with a cluster are in test_ray.py."""

from __future__ import annotations

import json
import pickle
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actcache
from actcache import Recycler, Recyclers
from actcache.errors import DocumentTooLongError, LowerHalfMismatchError, MissingExtraError, UsageError, WorkerError
from actcache.models.cluster import leader
from actcache.models.cluster.worker import Job, News, WithColumns, Worker
from actcache.models.documents import documents_with_columns
from actcache.models.filling import FillReport
from actcache.models.partition import Partitioner, share_of
from actcache.models.pretrained import load_pretrained
from actcache.models.remote import Blueprint
from tests.cli.running import cachectl
from tests.cli.test_fill import TEXTS, _own_cache, loaded, same, tiny  # noqa: F401
from tests.support import HIDDEN, recipe


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker says how many threads this process has."""
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- the blueprint ----------------------------------------------------------------------------------------------------


def test_a_blueprint_is_small_and_makes_the_same_recycler(tiny, tmp_path):  # noqa: F811
    options: dict[str, Any] = {"dtype": "float32", "max_length": 8, "too_long": actcache.windows(8, 2)}
    with Recycler.from_pretrained(tiny, layer=2, store=tmp_path / "s", extras=["word_ids"], **options) as recycler:
        sent = pickle.dumps(recycler.blueprint())
        assert len(sent) < 1500
        made = pickle.loads(sent).make("cpu")  # noqa: S301
        try:
            assert isinstance(made, Recycler)
            assert made.recipe == recycler.recipe
            assert made.agreement.encoder.extras == recycler.agreement.encoder.extras
            made.fill(TEXTS[:9], progress=False)
            recycler.space.refresh()
            assert recycler.missing(TEXTS[:10]) == [9]
        finally:
            made.close()


def test_one_of_several_sites_from_a_folder_next_door(tiny, tmp_path, monkeypatch):  # noqa: F811
    """A relative path means the same in a worker, whose working directory is another."""
    monkeypatch.chdir(tiny.parent)
    model, tokenizer = load_pretrained("./tiny", [1, 3], "cpu", None)
    with Recyclers(model, tokenizer, layers=[1, 3], store=tmp_path / "s") as recyclers:
        blueprint = recyclers.blueprint()
        monkeypatch.chdir(tmp_path)
        made = pickle.loads(pickle.dumps(blueprint)).make("cpu")  # noqa: S301
        assert {name: one.recipe for name, one in made.items()} == {n: one.recipe for n, one in recyclers.items()}
        made.close()


def test_a_worker_that_finds_another_model_refuses(tiny, tmp_path):  # noqa: F811
    model, tokenizer = load_pretrained(tiny, [1], "cpu", None)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[5] += 1
    with Recycler(model, tokenizer, layer=1, store=tmp_path / "s") as recycler:
        with pytest.raises(LowerHalfMismatchError, match="other weights"):
            recycler.blueprint().make("cpu")
        model.config.name_or_path = ""
        with pytest.raises(UsageError, match="save_pretrained"):
            recycler.blueprint()


# --- without Ray ------------------------------------------------------------------------------------------------------


def test_without_ray_one_line_says_what_to_install(tiny, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        Recycler.from_pretrained(tiny, layer=1, store=tmp_path / "s") as recycler,
        pytest.raises(MissingExtraError, match=r"pip install 'actcache\[ray\]'"),
    ):
        recycler.fill_ray(TEXTS)
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS))
    refused = [(tmp_path / "corpus.txt", {}, "is a path, not documents"), ([tmp_path / "a"], {}, "is a path")]
    refused += [(TEXTS, {"max_bytes": "1GiB"}, "max_bytes is not for a fill by Ray"), (TEXTS[0], {}, "not one text")]
    refused += [(TEXTS, {"partition": (0, 2)}, "partition is not for"), (TEXTS, {"columns": ["mask"]}, "field=")]
    with Recycler.from_pretrained(tiny, layer=1, store=tmp_path / "s") as recycler:
        for texts, options, said in refused:
            with pytest.raises(UsageError, match=said):
                recycler.fill_ray(texts, **options)
    spec = actcache.passages(24)
    with (
        Recycler.from_pretrained(tiny, layer=1, store=tmp_path / "s", too_long=spec) as recycler,
        pytest.raises(UsageError, match="cut into passages"),
    ):
        recycler.fill_ray([{"body": "la", "mask": [1]}], field="body", columns=["mask"])
    fill = ["fill", tmp_path / "s", tmp_path / "corpus.txt", "--model", tiny, "--layer", 1, "--ray", "local"]
    assert "pip install 'actcache[ray]'" in cachectl(*fill).refused(2)
    for wrong in (["--partition", "0/2"], ["--max-bytes", "1GiB"], ["--devices", "cpu,cpu"]):
        assert wrong[0] in cachectl(*fill, *wrong).refused(2)
    assert "--ray" in cachectl(*fill[:-2], "--workers", 2).refused(2)


def test_without_the_client_of_ray_one_line_says_what_to_install():
    class WithoutClient:
        def is_initialized(self) -> bool:
            return False

        def init(self, **options: object) -> None:
            raise ImportError("No module named 'grpc'")

    with socket.create_server(("127.0.0.1", 0)) as somebody:
        address = f"ray://127.0.0.1:{somebody.getsockname()[1]}"
        with (
            pytest.raises(WorkerError, match=r"needs Ray's client .*'grpc'.*: pip install 'ray\[client\]'"),
            leader.connected(WithoutClient(), address),
        ):
            pytest.fail("there is no cluster")


# --- a worker ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(tiny: Path, tmp_path: Path) -> Job:  # noqa: F811
    actcache.open(tmp_path / "s").close()
    blueprint = Blueprint(
        Recyclers.from_pretrained, str(tiny), str(tmp_path / "s"), {"layers": [1, 3], "dtype": "float32"}
    )
    return Job(blueprint, 1024, [], None, "rows", "run", 2)


def heard(worker: Worker, until: Any) -> list[News]:
    """Ask for news until something is true of them."""
    found: list[News] = []
    deadline = time.monotonic() + 60
    while not (found and until(found[-1])):
        assert time.monotonic() < deadline
        found.append(worker.news([]))
    return found


def test_a_worker_says_what_is_durable_and_no_more(job, tmp_path):
    """What it holds back is not durable, by its own word and by another process's view of the store."""
    worker = Worker(job, 1, 0, "cpu", 1)
    ready = heard(worker, lambda news: news.fingerprints)[-1]
    assert (len(ready.fingerprints), ready.wants, ready.durable) == (2, 2, ())
    assert worker.news([(0, (range(50), TEXTS[:50])), (1, (range(50, 90), [*TEXTS[50:70], *TEXTS[:20]]))]).wants == 0
    news = heard(worker, lambda one: one.wants == 2)
    assert sum(one.documents for one in news) == 90
    assert sum(one.computed for one in news) == 70
    assert [part for one in news for part in one.durable] == []
    with actcache.open(tmp_path / "s", mode="r") as store:
        assert [len(space) for space in store] == [0, 0]
    worker.news([None])
    news = heard(worker, lambda one: one.report)
    assert [(part.number, part.computed) for one in news for part in one.durable] == [(0, 50), (1, 20)]
    report = news[-1].report
    assert (report.documents, report.computed, report.partition) == (90, 70, "1/2")
    with actcache.open(tmp_path / "s", mode="r") as store:
        for space in store:
            assert len(space) == 70
            (noted,) = space.contributions()
            assert (noted.space, noted.run, noted.partition, noted.attempt) == (
                space.recipe.fingerprint,
                "run",
                "1/2",
                0,
            )
            assert (noted.entries, noted.tokens, noted.segments) == (70, report.tokens, 1)
            assert noted.worker.endswith(" cpu")
        assert report.nbytes == 2 * report.tokens * (64 * 4 + 4)  # rows, and token ids


def test_a_worker_that_is_told_to_stop_stores_what_it_has(job, tmp_path):
    worker = Worker(job, 0, 2, "cpu", 1)
    worker.news([(0, (range(30), TEXTS[:30]))])
    heard(worker, lambda one: one.wants == 2)
    news = worker.stop()
    assert (news.report, news.failed) == (None, None)
    with actcache.open(tmp_path / "s", mode="r") as store:
        assert [len(space) for space in store] == [30, 30]
        assert [one.attempt for space in store for one in space.contributions()] == [2, 2]


def test_what_fails_in_a_worker_is_told(job, tmp_path):
    """An error of a document, with its position in the corpus; what came before it is stored."""
    worker = Worker(job, 1, 0, "cpu", 1)
    worker.news([(0, (range(10), TEXTS[:10])), (1, ([4711], ["la " * 3000]))])
    failed = heard(worker, lambda one: one.failed)[-1].failed
    assert failed.kind is DocumentTooLongError
    assert "4711" in failed.message
    with actcache.open(tmp_path / "s", mode="r") as store:
        assert [len(space) for space in store] == [10, 10]

    def broken(*given: object, **named: object) -> None:
        raise RuntimeError("CUDA out of memory")

    worker = Worker(Job(Blueprint(broken, "m", "s"), 1, [], None, "rows", "run", 2), 1, 0, "cpu", 1)
    failed = heard(worker, lambda one: one.failed)[-1].failed
    assert (failed.kind, failed.message) == (WorkerError, "worker 1/2 failed: RuntimeError: CUDA out of memory")


def test_passages_are_durable_part_by_part_and_counted_by_documents(tiny, tmp_path):  # noqa: F811
    """A part is done when its passages are stored, though they would not fill a batch; the sum is a plain fill's."""
    texts = [" ".join(f"document {i // 3} says {n}" for n in range(7 * (i % 9))) or "la" for i in range(60)]
    options: dict[str, Any] = {"layer": 2, "dtype": "float32", "too_long": actcache.passages(24, least=4)}
    actcache.open(tmp_path / "s").close()
    blueprint = Blueprint(Recycler.from_pretrained, str(tiny), str(tmp_path / "s"), options)
    worker = Worker(Job(blueprint, 1024, [], None, "rows", "run", 1), 0, 0, "cpu", 1)
    heard(worker, lambda news: news.wants == 2)
    worker.news([(0, (range(30), texts[:30]))])
    news = heard(worker, lambda one: one.wants == 2)
    assert sum(one.documents for one in news) == 30
    worker.news([(1, (range(30, 60), texts[30:])), None])
    news = heard(worker, lambda one: one.report)
    durable = [part for one in news for part in one.durable]
    assert [part.number for part in durable] == [0, 1]
    total = durable[0].report + durable[1].report
    with (
        Recycler.from_pretrained(tiny, store=tmp_path / "alone", **options) as alone,
        Recycler.from_pretrained(tiny, store=tmp_path / "s", **options) as filled,
    ):
        whole = alone.fill(texts, progress=False)
        same(filled, alone, texts)
    assert whole.passages > whole.new_passages > whole.documents
    counted = ("documents", "tokens", "passages", "new_passages", "reused_tokens")
    for name in counted:
        assert getattr(total, name) == getattr(news[-1].report, name) == getattr(whole, name), name


def test_columns_travel_with_their_documents(tiny, tmp_path):  # noqa: F811
    """And two that are the same, of which one is stored."""
    rows = [{"body": f"document {i % 9}", "mask": [i % 9, 2, 3, 4]} for i in range(12)]
    given = documents_with_columns(rows, "body", ["mask"])
    dealing = leader._Dealing(Partitioner(given, 1, 5), given)
    actcache.open(tmp_path / "s").close()
    blueprint = Blueprint(Recycler.from_pretrained, str(tiny), str(tmp_path / "s"), {"layer": 1, "dtype": "float32"})
    worker = Worker(Job(blueprint, 1024, [], None, "rows", "run", 1, columns=("mask",)), 0, 0, "cpu", 1)
    parts = []
    while (part := dealing.part(0)) is not None:
        parts.append((len(parts), pickle.loads(pickle.dumps(part))))  # noqa: S301
    worker.news([*parts, None])
    assert [len(part[0]) for _, part in parts] == [5, 5, 2]
    assert heard(worker, lambda one: one.report or one.failed)[-1].report.computed == 9
    with actcache.open(tmp_path / "s", mode="r") as store:
        (space,) = store
        entries = space.get([actcache.document_key(row["body"]) for row in rows])
    for row, entry in zip(rows, entries, strict=True):
        np.testing.assert_array_equal(entry.columns["mask"], row["mask"])
    worker = Worker(Job(blueprint, 1024, [], None, "rows", "run", 1, columns=("mask",)), 0, 0, "cpu", 1)
    worker.news([(0, ([7], [WithColumns("document 77", ([1],))]))])
    failed = heard(worker, lambda one: one.failed)[-1].failed
    assert "position 7 of the texts: column mask has the shape [1]" in failed.message


def test_a_gpu_that_torch_does_not_find(job, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    failed = heard(Worker(job, 1, 0, "cuda", 1), lambda one: one.failed)[-1].failed
    assert failed.kind is WorkerError
    assert "Ray gave this worker a GPU" in failed.message
    assert "by device='cpu'" in failed.message


# --- what stands in the store -----------------------------------------------------------------------------------------


def test_shares_note_what_they_have_stored(loaded, tmp_path):  # noqa: F811
    """The reports and the notes say the same, of each share as the keys decide."""
    reports = []
    for share in ("0/2", "1/2"):
        with Recycler(*loaded, layer=1, store=tmp_path / "s", dtype="float32") as recycler:
            reports.append(recycler.fill(TEXTS, progress=False, partition=share))
    with Recycler(*loaded, layer=1, store=tmp_path / "s", dtype="float32") as recycler:
        recycler.fill(["one more"], progress=False)  # of no share: no note
        noted = recycler.space.contributions()
    mine = [share_of(actcache.document_key(text), 2) for text in TEXTS]
    assert {one.partition: one.entries for one in noted} == {"0/2": mine.count(0), "1/2": mine.count(1)}
    for report, one in zip(reports, sorted(noted, key=lambda one: one.partition), strict=True):
        assert (one.tokens, one.nbytes, one.segments) == (report.tokens, report.nbytes, report.segments)
    both = reports[0] + reports[1]
    assert both.nbytes == both.tokens * (64 * 4 + 4)
    assert (both.segments, both.partition) == (2, None)
    assert isinstance(both, FillReport)


def test_notes_that_are_damaged_and_notes_that_are_many(loaded, tmp_path, caplog):  # noqa: F811
    with Recycler(*loaded, layer=1, store=tmp_path / "s") as recycler:
        recycler.fill(TEXTS[:40], progress=False, partition="0/1")
        (noted,) = recycler.space.contributions()
        folder = tmp_path / "s" / "spaces" / recycler.recipe.fingerprint / "fills"
        (path,) = folder.iterdir()
        one = json.loads(path.read_text())["contributions"][0]
        for number, text in enumerate(["{", "[]", json.dumps({"contributions": [{**one, "entries": "x"}]})]):
            (folder / f"bad{number}.json").write_text(text)
        assert recycler.space.contributions() == [noted]
        assert caplog.text.count("is damaged and passed over") == 3
        for number in range(99):
            later = {**one, "run": f"{number:02}", "began": f"2027-{number:02}"}
            (folder / f"{number}.json").write_text(json.dumps({"contributions": [later]}))
        before = recycler.space.contributions()
        assert len(before) == 100
        recycler.space.finish()
        assert recycler.space.contributions() == before
        assert len([*folder.iterdir()]) <= 4  # the damaged ones, and one


def test_finishing_joins_small_segments_and_leaves_statistics(tmp_path):
    """And what is written of the space meanwhile is known by its entries, in order."""
    rows = np.random.default_rng(0).standard_normal((400, HIDDEN), np.float32)
    keys = [actcache.document_key(f"text {i}") for i in range(400)]
    with actcache.open(tmp_path / "s") as store:
        for first in range(0, 400, 100):
            with store.space(recipe(dtype="float32")) as space:
                assert space.written.added == 0
                space.put(keys[first : first + 100], [rows[i : i + 1] for i in range(first, first + 100)])
                assert (space.written.added, space.written.published) == (100, 0)
                space.flush()
                done = space.written
                assert (done.added, done.published, done.tokens, done.segments) == (100, 100, 100, 1)
        with store.space(recipe(dtype="float32")) as space:
            assert space.usage().segments == 4
            assert space.finish().segments_merged == 4
            assert space.usage().segments == 1
            assert space.statistics().count == 400
            np.testing.assert_allclose(space.statistics().mean, rows.mean(0, np.float64), atol=1e-6)
            assert space.finish().segments_merged == 0

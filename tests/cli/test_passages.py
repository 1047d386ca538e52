"""Passages on the shell: fill, diff, plan, prune, repair, verify and inspect of documents that are cut by content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import actcache
from actcache import Recycler
from actcache.errors import MissingEntryError
from actcache.models.pretrained import load_pretrained
from tests.cli.running import cachectl
from tests.cli.test_fill import _own_cache  # noqa: F401
from tests.support.backends import each
from tests.support.tiny import save_tiny

WORDS = ["red", "blue", "cats", "dogs", "run", "sleep", "here", "there"]
SPEC = actcache.passages(34, least=8)
CUT = ["--passages", 34, "--least", 8]


def _text(seed: int, paragraphs: int = 12) -> str:
    rng = np.random.default_rng(seed)
    return "\n\n".join(" ".join(rng.choice(WORDS, rng.integers(6, 15))) for _ in range(paragraphs))


OLD = [_text(i) for i in range(5)]
NEW = [*OLD[:3], f"red cats here\n\n{OLD[3]}", OLD[4]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", words=WORDS)


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Any:
    return load_pretrained(tiny, [1], "cpu", None)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("corpora")
    for name, texts in (("old", OLD), ("new", NEW)):
        lines = [json.dumps({"id": f"d{i}", "text": text}) for i, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder / "old.jsonl", folder / "new.jsonl"


@pytest.fixture
def common(tiny: Path) -> list[object]:
    return ["--field", "text", "--model", tiny]


def _recycler(loaded: Any, store: Path, **options: Any) -> Recycler:
    return Recycler(*loaded, layer=1, store=store, too_long=SPEC, **options)


def _damage(store: Path) -> None:
    """Change one number of the first entry in the newest segment."""
    path = sorted(store.glob("spaces/*/segments/*.h5"))[-1]
    with h5py.File(path, "r+") as file:
        file["values"][0, 0] += 1


def test_a_fill_of_a_revision_computes_what_has_changed_and_keeps_collections(common, corpora, loaded, tmp_path):
    options = [*common, *CUT, "--layer", 1, "--id-field", "id", "-q"]
    first = cachectl("fill", tmp_path / "s", corpora[0], *options, "--collection", "old", "--json").json()
    assert (first["documents"], first["computed"], first["reused_tokens"]) == (5, 5, 0)
    ahead = cachectl("fill", tmp_path / "s", corpora[1], *options, "--dry-run", "--json").json()
    done = cachectl("fill", tmp_path / "s", corpora[1], *options, "--collection", "new", "--json").json()
    assert (done["documents"], done["present"], done["computed"]) == (5, 4, 1)
    assert 1 <= done["new_passages"] <= 2
    assert (ahead["documents"], ahead["present"], ahead["new_passages"]) == (5, 4, done["new_passages"])
    assert ahead["tokens"] == pytest.approx(done["tokens"], abs=1)
    with _recycler(loaded, tmp_path / "s") as recycler, actcache.open(tmp_path / "s") as store:
        collection, outline = store.collection("new"), recycler.outline(NEW)
        assert collection.keys.tolist() == outline.keys.tolist()
        assert collection.documents.tolist() == outline.documents.tolist()
        assert collection.own.tolist() == outline.own.tolist()
        assert collection.ids == [f"d{i}" for i in outline.documents]
        assert collection.document_count == 5
        assert recycler.space.contains(collection.keys).all()
    shown = cachectl("ls", tmp_path / "s", "--tree").out
    assert f"collection new: 5 documents of {len(outline)} passages, {len(outline.distinct)} of them different" in shown
    again = cachectl("fill", tmp_path / "s", corpora[1], *options).out
    assert "0 computed" in again
    assert "100.0% of the tokens were there" in again


def test_repeated_passages_are_told(common, tiny, tmp_path):
    corpus = tmp_path / "twice.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in [OLD[0], OLD[1], OLD[0], OLD[0]]))
    options = [*common, *CUT, "--layer", 1, "-q"]
    cachectl("fill", tmp_path / "s", corpus, *options, "--collection", "c", "--json").json()
    space = cachectl("inspect", tmp_path / "s", "--all", "-q", "--json").json()["spaces"][0]
    held = space["passages"]["c"]
    assert held["documents"] == 4
    assert held["distinct"] == space["entries"] < held["passages"]
    assert held["share"] == pytest.approx(1 - space["tokens"] / held["tokens"])
    assert 0.4 < held["share"] < 0.6
    assert f"{held['share']:.1%} of the tokens are repeated" in cachectl("inspect", tmp_path / "s", "--all", "-q").out
    page = tmp_path / "page.html"
    cachectl("inspect", tmp_path / "s", "--html", page, "-q")
    assert "of the tokens are repeated" in page.read_text()


def test_diff_and_plan_say_what_a_revision_costs(common, corpora, loaded, tmp_path):
    found = cachectl("diff", *corpora, *common, *CUT, "--dtype", "float32", "--json").json()
    whole, cut = found["whole"], found["passages"]
    with _recycler(loaded, tmp_path / "s", dtype="float32") as recycler:
        with pytest.raises(MissingEntryError, match="5 of the 5 documents that were revised are not in the space"):
            recycler.revision(OLD, NEW)
        recycler.fill(OLD, progress=False)
        revision = recycler.revision(OLD, NEW)
        assert {name: cut[name] for name in vars(revision)} == vars(revision)
        report = recycler.fill(NEW, progress=False)
        assert (cut["new_passages"], cut["new_tokens"]) == (report.new_passages, report.tokens)
        assert cut["tokens"] == report.tokens + report.reused_tokens
        assert cut["new_nbytes"] == report.tokens * (32 * 4 + 4)
    assert (whole["documents"], whole["unchanged"], cut["unchanged"]) == (5, 4, 4)
    assert whole["reused"] < 0.85 < cut["reused"]
    stored = ["--layer", 1, "--store", tmp_path / "s"]
    shown = cachectl("diff", *corpora, *common, *CUT, *stored, "--dtype", "float32").out
    assert "5 documents, 4 of them unchanged" in shown
    assert f"passages of 34 tokens: {cut['reused']:.1%} of {cut['tokens']:,} tokens are used again" in shown
    planned = cachectl(
        *("plan", corpora[1], *common, *CUT, "--layer", 1, "--revision-of", corpora[0], "--dtype", "float32"),
        *("--read", "1GB", "--write", "1GB", "--json"),
    ).json()
    assert planned["revision"]["new_tokens"] == cut["new_tokens"]
    assert planned["corpus"]["passed"] == cut["tokens"]
    assert planned["corpus"]["places"] == cut["passages"]


def test_a_plan_for_machines_takes_repeats_and_revisions_into_account(common, corpora, loaded, tmp_path):
    given = ["plan", corpora[1], *common, *CUT, "--layer", 1, "--revision-of", corpora[0], "--nodes", 2, "--devices", 4]
    planned = cachectl(*given, "--json").json()
    with _recycler(loaded, tmp_path / "s") as recycler:
        outline, revision = recycler.outline(NEW), recycler.revision(OLD, NEW, stored=False)
    distinct = outline.distinct
    expected = {"documents": len(distinct), "tokens": int(outline.lengths[distinct].sum())}
    expected |= {"passed": int(outline.lengths.sum()), "places": len(outline)}
    assert planned["corpus"] == expected
    assert planned["replay_gets"] == len(outline)
    assert planned["revision"]["new_tokens"] == revision.new_tokens
    lower = planned["model"]["full"] - planned["model"]["upper"]
    assert planned["revision"]["seconds"] == pytest.approx(
        max(revision.new_tokens * lower / 8, revision.new_nbytes / 25e9)
    )


def test_a_revision_of_what_is_not_stored_is_refused(common, corpora, tmp_path):
    stored = ["--layer", 1, "--store", tmp_path / "s"]
    nothing = cachectl("diff", *corpora, *common, *CUT, *stored)
    assert "the documents that were revised are not stored" in nothing.refused(3)
    cachectl("fill", tmp_path / "s", corpora[1], *common, "--passages", 20, "--layer", 1, "-q")
    other = cachectl("diff", *corpora, *common, *CUT, *stored)
    assert "documents that were revised are not in the space" in other.refused(3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fill", "s", "c", "--context", 4], "--context is for passages"),
        (["fill", "s", "c", *CUT, "--too-long", "truncate"], "cut in one of these ways"),
        (["fill", "s", "c", "--passages", 34, "--context", 17], "a context of 17 tokens on either side leaves no room"),
        (["fill", "s", "c", "--passages", 513], "passages of 513 tokens are longer than the 512 possible"),
        (["diff", "c", "c", *CUT, "--store", "s"], "say which --layer"),
        (["diff", "c", "c", "--passages", 513], "passages of 513 tokens are longer than the 512 possible"),
        (["diff", "c", "c", "--passages", 34, "--context", 17], "a context of 17 tokens on either side leaves no room"),
        (["plan", "c", "--passages", 34, "--context", 17], "a context of 17 tokens on either side leaves no room"),
        (["plan", *CUT], "give its file"),
        (["prune", "s", *CUT], "are for --keep-only FILE"),
        (["repair", "s", *CUT], "--corpus FILE"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(arguments, said, common, corpora, tmp_path):
    names = {"s": tmp_path / "s", "c": corpora[0]}
    given = [names.get(one, one) for one in arguments]
    command = given[0]
    more = [*common, "--layer", 1] if command == "fill" else common if command == "diff" else []
    assert said in cachectl(*given, *more).refused(2)


@each(everyday=("hdf5",))
def test_a_store_is_pruned_and_verified_by_its_passages(kind, common, corpora, tiny, loaded, tmp_path):
    url = kind.url(tmp_path / "s")
    options = [*common, *CUT, "--layer", 1, "-q"]
    for source in corpora:
        cachectl("fill", url, source, *options, "--dtype", "float32", "--json").json()
    keep = ["prune", url, "--keep-only", corpora[1], "--field", "text", "--idle", 0, "--yes", "-q"]
    asked = cachectl(*keep)
    assert "say how they were cut (--passages 128)" in asked.out
    done = cachectl(*keep, *CUT, "--json").json()
    gone = json.loads(cachectl("diff", *corpora, *common, *CUT, "--json").out)["passages"]["old_passages"]
    assert gone > 0
    assert [one["entries"] for one in done["done"]["spaces"]] == [gone]
    with _recycler(loaded, url, dtype="float32") as recycler:
        assert recycler.missing(NEW) == []
        assert recycler.missing(OLD) == [3]
        assert len(recycler.space) == len(recycler.outline(NEW).distinct)
    assert cachectl("verify", url, "--recompute", 50, "-q").code == 0


def test_damaged_passages_are_computed_again(common, corpora, tiny, loaded, tmp_path):
    with _recycler(loaded, tmp_path / "s", dtype="float32") as recycler:
        recycler.fill(OLD, progress=False)
        keys = recycler.keys(OLD)
        rows = [entry.activations for entry in recycler.space.get(keys)]
    for arguments in ([], ["--corpus", corpora[0], "--field", "text", *CUT]):  # by the entry's own ids; by the texts
        _damage(tmp_path / "s")
        done = cachectl("repair", tmp_path / "s", "--model", tiny, *arguments, "--json", "-q").json()
        (space,) = done["spaces"]
        assert len(space["recomputed"]) == len(space["quarantined"]) == 1
        assert space["missing"] == []
        with _recycler(loaded, tmp_path / "s", dtype="float32") as recycler:
            for before, entry in zip(rows, recycler.space.get(keys), strict=True):
                np.testing.assert_allclose(entry.activations, before, atol=1e-6)


@pytest.mark.long
def test_several_devices_store_a_passage_once(common, corpora, loaded, tmp_path):
    options = [*common, *CUT, "--layer", 1, "-q", "--dtype", "float32", "--collection", "c", "--json"]
    report = cachectl("fill", tmp_path / "s", corpora[1], *options, "--devices", "cpu,cpu").json()
    assert (report["documents"], report["computed"]) == (5, 5)
    with _recycler(loaded, tmp_path / "s", dtype="float32") as recycler:
        assert recycler.missing(NEW) == []
        assert len(recycler.space) == len(recycler.outline(NEW).distinct)
    with actcache.open(tmp_path / "s") as store:
        assert store.collection("c").document_count == 5

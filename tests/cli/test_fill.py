"""``cachectl fill``: several layers, a bound on the bytes, forecasts, and what cannot be."""

from __future__ import annotations

import functools
import gzip
import json
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers

import actcache
from actcache import Recycler, Recyclers
from actcache.backend import Block
from actcache.errors import UsageError
from actcache.models.budget import taken
from actcache.models.error_budget import SAMPLE
from actcache.models.pretrained import load_pretrained
from actcache.segments.catalog import Catalog
from actcache.store.store import Store
from actcache.store.stored_errors import StoredErrors
from tests.cli.running import by_space, cachectl
from tests.support.backends import each
from tests.support.tiny import save_tiny

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

TEXTS = [f"document {i} says " + "la " * (i % 23) for i in range(200)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of four layers with a tokenizer that knows the words of TEXTS and digits, as a folder."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", words=["document", "says", "la"], hidden_size=64)


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Any:
    return load_pretrained(tiny, [1, 3], "cpu", None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Parquet file, some of whose documents stand twice."""
    path = tmp_path_factory.mktemp("corpora") / "corpus.parquet"
    names = [f"n{i}" for i in range(len(TEXTS) + 3)]
    pq.write_table(pa.table({"name": names, "body": [*TEXTS, *TEXTS[:3]]}), path, row_group_size=50)
    return path


# --- several layers ---------------------------------------------------------------------------------------------------


def test_several_layers_of_a_parquet_file_in_one_pass(tiny, corpus, loaded, tmp_path):
    options = ["--model", tiny, "--field", "body", "--dtype", "float32", "--json", "--quiet"]
    some = cachectl("fill", tmp_path / "s", corpus, *options, "--layer", 3).json()
    assert (some["documents"], some["computed"], [one["layer"] for one in some["spaces"]]) == (203, 200, [3])
    both = ["--layer", 1, "--layer", 3, "--collection", "all", "--id-field", "name"]
    ahead = cachectl("fill", tmp_path / "s", corpus, *options, *both, "--dry-run").json()
    assert (ahead["documents"], ahead["present"], ahead["tokens"]) == (200, 0, some["tokens"])
    assert ahead["nbytes"] == pytest.approx(some["tokens"] * (64 * 4 + 4), rel=0.3)  # at layer 1 alone
    done = cachectl("fill", tmp_path / "s", corpus, *options, *both).json()
    assert (done["computed"], done["left_out"], done["collection"]) == (200, 0, "all")
    assert [one["layer"] for one in done["spaces"]] == [1, 3]
    assert done["spaces"][1]["space"] == some["spaces"][0]["space"]
    with (
        actcache.open(tmp_path / "s", "r") as store,
        Recyclers(*loaded, layers=[1, 3], store=store, dtype="float32") as recyclers,
        Recyclers(*loaded, layers=[1, 3], store=tmp_path / "again", dtype="float32") as again,
    ):
        again.fill(TEXTS, progress=False)
        for layer in (1, 3):
            assert recyclers[layer].recipe.fingerprint == {one["layer"]: one["space"] for one in done["spaces"]}[layer]
            same(recyclers[layer], again[layer])
        held = store.collection("all")
        keys = [actcache.document_key(text) for text in TEXTS]
        assert [key.tobytes() for key in held.keys] == [*keys, *keys[:3]]
        assert held.ids == [f"n{i}" for i in range(203)]


@pytest.mark.parametrize("budget", [[], ["--max-error", "0.1"]])
def test_a_corpus_that_streams_by_loses_nothing_to_the_measured_sample(budget, tiny, corpus, tmp_path):
    options = ["--model", tiny, "--field", "body", "--layer", 1, "--dtype", "int8", "--json", "--quiet"]
    made = ["--collection", "all", "--id-field", "name"]
    report = cachectl("fill", tmp_path / "s", corpus, *options, *budget, *made).json()
    assert (report["documents"], report["computed"], report["present"]) == (203, 200, 3)
    with actcache.open(tmp_path / "s") as store, store.space(store.recipes()[0]) as space:
        assert len(space) == 200
        assert StoredErrors.read(space).documents == SAMPLE


def same(one: Recycler, other: Recycler, texts: list[str] = TEXTS) -> None:
    """Compare the entries of two recyclers; kernels may sum in another order in batches of other shapes."""
    keys = one.keys(texts)
    assert set(one.space.keys()) == set(other.space.keys()) == set(keys)
    for mine, theirs in zip(one.space.get(keys), other.space.get(keys), strict=True):
        np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)
        np.testing.assert_allclose(mine.activations, theirs.activations, rtol=1e-4, atol=1e-5)


# --- a bound on the bytes ---------------------------------------------------------------------------------------------


def used(store: Store, recyclers: Recyclers) -> int:
    return taken(store, [recycler.recipe.fingerprint for recycler in recyclers.values()])


@each(everyday=("hdf5", "lmdb"))
def test_a_fill_stays_within_its_bytes_and_goes_on_with_more(kind, loaded, tmp_path):
    """What is stored is what stands before the first document that has no room, and nearly all that fits."""
    keys = [actcache.document_key(text) for text in TEXTS]
    stored = [0]
    with actcache.open(kind.url(tmp_path / "store")) as store:

        def fill(recyclers: Recyclers, limit: int) -> None:
            report = recyclers.fill([*TEXTS, TEXTS[-1]], token_budget=1000, progress=False, max_bytes=limit)
            there = recyclers[1].space.contains(keys)
            assert (there == recyclers[3].space.contains(keys)).all()
            count = int(there.sum())
            assert there[:count].all()
            assert (report.computed, report.left_out) == (count - stored[-1], 0 if count == 200 else 201 - count)
            assert report.present == (stored[-1] if report.left_out else stored[-1] + 1)
            assert count == 200 or limit - 300_000 < used(store, recyclers) <= limit
            stored.append(count)

        with Recyclers(*loaded, layers=[1, 3], store=store, dtype="float32") as recyclers:
            fill(recyclers, 800_000)
            fill(recyclers, 1_200_000)
            fill(recyclers, 10_000_000)
            assert recyclers[3].space.verify().intact
    assert 0 < stored[1] < stored[2] < stored[3] == 200


def test_many_small_segments_never_take_more(loaded, tmp_path, monkeypatch):
    """Not while it works either: small ones are not merged, which would have them there twice."""
    most = 0

    def publish(catalog: Catalog, block: Block, *options: Any) -> str:
        nonlocal most
        name = published(catalog, block, *options)
        most = max(most, used(store, recyclers))
        return name

    published = Catalog.publish
    monkeypatch.setattr(Catalog, "publish", publish)
    with actcache.open(tmp_path / "s") as store:
        store.space = functools.partial(store.space, segment_bytes=1 << 16)
        recyclers = Recyclers(*loaded, layers=[1], store=store, dtype="float32")
        texts = [f"{text} {i}" for i in range(4) for text in TEXTS]
        report = recyclers.fill(texts, token_budget=1000, progress=False, max_bytes=3_000_000)
        assert report.left_out > 0
        assert recyclers[1].space.usage().segments > 20
        assert 2_700_000 < most <= 3_000_000


def test_nothing_fits_where_more_is_there_already(loaded, tmp_path):
    with Recycler(*loaded, layer=1, store=tmp_path / "s") as recycler:
        recycler.fill(TEXTS[:50], progress=False)
        report = recycler.fill(TEXTS, progress=False, max_bytes="1KiB")
        assert (report.present, report.computed, report.left_out) == (50, 0, 150)
        assert recycler.fill(TEXTS[:50], progress=False, max_bytes=0).left_out == 0
        with pytest.raises(UsageError, match="max_bytes"):
            recycler.fill(TEXTS, progress=False, max_bytes="much")


def test_windows_are_left_out_by_whole_documents(loaded, tmp_path):
    cut = actcache.windows(16, 4)
    with Recycler(*loaded, layer=1, store=tmp_path / "s", too_long=cut) as recycler:
        report = recycler.fill(TEXTS, progress=False, max_bytes=700_000)
        assert 0 < report.computed < 200
        assert report.computed + report.left_out == 200
        assert len(recycler.keys(TEXTS[: report.computed])) == len(recycler.space) > report.computed


def test_the_command_says_what_is_left_out_and_keeps_no_half_collection(tiny, corpus, tmp_path):
    base = [tmp_path / "s", corpus, "--model", tiny, "--field", "body", "--layer", 1, "--quiet"]
    options = ["fill", *base, "--collection", "all"]
    ahead = cachectl(*options, "--dry-run", "--max-bytes", "700KB", "--json").json()
    some = cachectl(*options, "--max-bytes", "700KB", "--json")
    line = some.refused(3)
    report = json.loads(some.out)
    assert report["collection"] is None
    assert f"{report['left_out']} documents of 203 left out" in line
    assert "--max-bytes 700KB" in line
    assert "'all' was not written" in line
    assert 0 < report["computed"] < 200
    assert report["computed"] <= ahead["fits"] <= 200
    assert by_space(cachectl("du", tmp_path / "s", "--json").json())[report["spaces"][0]["space"]]["nbytes"] <= 700_000
    with actcache.open(tmp_path / "s", "r") as store:
        assert store.collections() == []
    shown = cachectl(*options, "--dry-run", "--max-bytes", "100GB").out
    assert f"{report['computed']} are there" in shown
    assert "all of it fits" in shown
    rest = cachectl(*options, "--max-bytes", "100GB", "--json").json()
    assert (rest["computed"], rest["left_out"], rest["collection"]) == (200 - report["computed"], 0, "all")
    assert cachectl(*options, "--dry-run", "--max-bytes", "1KB", "--json").json()["fits"] == 0


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--layer", 1, "--layer", 1], 2, "different numbers"),
        (["--layer", 1, "--layer", 5], 2, "has layers 1..4"),
        (["--layer", "x"], 2, "a module is a --site"),
        (["--layers", "all,1"], 2, "leave the others out"),
        (["--site", "nowhere"], 2, "no module 'nowhere'"),
        ([], 2, "which --layer"),
        (["--layer", 1, "--max-bytes", "much"], 2, "--max-bytes"),
        (["--layer", 1, "--devices", "nowhere"], 5, "nowhere"),
        (["--layer", 1, "--devices", "cpu,nowhere"], 2, "'nowhere' is no device"),
        (["--layer", 1, "--devices", "cpu,"], 2, "'' is no device"),
        (["--layer", 1, "--devices", "cpu,nowhere", "--dry-run"], 2, "'nowhere' is no device"),
        (["--layer", 1, "--layer", 1, "--devices", "cpu,cpu"], 2, "different numbers"),
        (["--layer", 1, "--field", "none"], 2, "no column 'none'"),
        (["--layer", 1, "--id-field", "none"], 2, "no column 'none'"),
        (["--layer", 1, "--stride", 3], 2, "--too-long windows"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(tiny, corpus, tmp_path, options, code, said):
    given = [] if "--field" in options else ["--field", "body"]
    line = cachectl("fill", tmp_path / "s", corpus, "--model", tiny, *given, *options).refused(code)
    assert said in line
    assert not (tmp_path / "s" / "spaces").exists() or not any((tmp_path / "s" / "spaces").iterdir())


def test_a_damaged_corpus_ends_the_fill_and_what_was_before_is_kept(tiny, tmp_path):
    lines = [json.dumps({"t": text}) for text in TEXTS[:20]]
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join([*lines, "{"]))
    options = ["fill", tmp_path / "s", path, "--model", tiny, "--layer", 1, "--field", "t", "--quiet"]
    assert "line 21" in cachectl(*options).refused(2)
    assert "line 21" in cachectl(*options, "--dry-run").refused(2)
    path.write_text("\n".join(lines))
    assert "20 documents: 20 computed" in cachectl(*options).out


def test_folders_that_are_no_dataset(tiny, tmp_path):
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "empty").mkdir()
    options = ["--model", tiny, "--layer", 1, "--field", "t"]
    assert "train, test" in cachectl("fill", tmp_path / "s", tmp_path / "splits", *options).refused(2)
    assert "no state.json" in cachectl("fill", tmp_path / "s", tmp_path / "empty", *options).refused(2)
    assert not (tmp_path / "s").exists()


def test_compressed_shards_and_one_that_is_cut_off(tiny, tmp_path):
    """What was computed before the damage stays; mended, the rest is computed, in the shards' order."""
    many = [f"document {number} says la" for number in range(2100)]  # more than is looked at in one go
    parts = many[:2090], many[2090:]
    for number, texts in enumerate(parts):
        lines = "".join(json.dumps({"n": text[9:13], "t": text}) + "\n" for text in texts)
        (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    whole = (tmp_path / "0.jsonl.gz").read_bytes()
    (tmp_path / "0.jsonl.gz").write_bytes(whole[:-9])
    options = ["fill", tmp_path / "s", f"{tmp_path}/*.jsonl.gz", "--model", tiny, "--layer", 1, "--quiet", "--json"]
    options += ["--field", "t", "--id-field", "n", "--collection", "all"]
    assert "0.jsonl.gz is damaged or cut off" in cachectl(*options).refused(2)
    (tmp_path / "0.jsonl.gz").write_bytes(whole)
    done = cachectl(*options).json()
    assert (done["documents"], done["present"], done["computed"]) == (2100, 2048, 52)
    with actcache.open(tmp_path / "s", "r") as store:
        held = store.collection("all")
    assert [key.tobytes() for key in held.keys] == [actcache.document_key(text) for text in many]
    assert held.ids == [text[9:13] for text in many]


def test_a_corpus_of_no_documents(tiny, tmp_path):
    """It is told of, and no iterator's fault."""
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.jsonl").write_text("\n\n")
    options = ["--model", tiny, "--layer", 1, "--quiet"]
    for source, field in (("empty.txt", []), ("empty.jsonl", ["--field", "t"])):
        for more in ([], ["--dry-run"]):
            done = cachectl("fill", tmp_path / "s", tmp_path / source, *options, *field, *more)
            assert (done.code, done.out[:12]) == (0, "0 documents:"), done.err


def test_sites_are_filled_shown_verified_exported_and_pruned(tiny, corpus, tmp_path):
    store, wide = tmp_path / "s", "encoder.layer.1.intermediate"
    where = ["--model", tiny, "--field", "body", "--layers", "0,last", "--site", wide]
    report = cachectl("fill", store, corpus, *where, "--json").json()
    assert [one["site"] or one["layer"] for one in report["spaces"]] == [0, 4, wide]
    assert cachectl("fill", store, corpus, *where, "--json").json()["computed"] == 0
    spaces = {one["site"] or one["layer"]: one for one in cachectl("ls", store, "--json").json()["spaces"]}
    assert set(spaces) == {0, 4, wide}
    assert wide in cachectl("ls", store).out
    assert cachectl("verify", store, "--recompute", 20, "--model", tiny).code == 0
    assert cachectl("export", store, tmp_path / "out.safetensors", "--space", spaces[wide]["space"]).code == 0
    plan = cachectl("prune", store, "--where", f"site={wide}", "--dry-run", "--idle", "0", "--json").json()["plan"]
    assert [one["space"] for one in plan["spaces"]] == [spaces[wide]["space"]]

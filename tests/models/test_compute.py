"""``on_missing="compute"``: the first epoch fills, later ones replay, and both see the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, PreTrainedModel

import actcache
from actcache import Recycler
from actcache.errors import CanaryError, NonFiniteError, ReadOnlyError
from actcache.models.lower_half import LowerHalf

TEXTS = [f"document {i} says " + "la " * (i % 13) + "." for i in range(40)]


@pytest.fixture
def model(make_model: Any) -> PreTrainedModel:
    return make_model(AutoModel)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[actcache.Store]:
    with actcache.open(tmp_path / "store") as store:
        yield store


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents each call of a lower half computes."""
    counts: list[int] = []
    run = LowerHalf.run

    def counting(self: LowerHalf, ids: Any, *args: Any, **options: Any) -> Any:
        counts.append(len(ids))
        return run(self, ids, *args, **options)

    monkeypatch.setattr(LowerHalf, "run", counting)
    return counts


def rows(batches: Any) -> dict[int, np.ndarray]:
    return {
        int(n): batch.activations[i, : int(batch.lengths[i])].float().numpy().copy()
        for batch in batches
        for i, n in enumerate(batch.documents)
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_first_epoch_equals_the_second(store, model, tokenizer, computed, dtype):
    recycler = Recycler(model, tokenizer, layer=2, store=store, dtype=dtype)
    reader = recycler.reader(TEXTS, batch_size=7, shuffle=True, on_missing="compute", labels=np.arange(40))
    first = rows(reader)
    canaries = sum(computed)
    assert canaries >= 40
    computed.clear()
    second = rows(reader)
    assert computed == []
    assert first.keys() == second.keys() == set(range(40))
    for n in first:
        np.testing.assert_array_equal(first[n], second[n])
    # What a fill stores is the same to the storage's precision: other companions in a batch change the last bits.
    other = Recycler(model, tokenizer, layer=2, store=actcache.open(f"{store.url}-filled"), dtype=dtype)
    other.fill(TEXTS, progress=False)
    for n, filled in rows(other.reader(TEXTS)).items():
        np.testing.assert_allclose(first[n], filled, rtol=2e-2 if dtype == "bfloat16" else 2e-3, atol=1e-2)


def test_it_is_durable_at_the_end_of_the_epoch(tmp_path, model, tokenizer, store):
    recycler = Recycler(model, tokenizer, layer=2, store=store)
    for _ in recycler.reader(TEXTS, on_missing="compute"):
        pass
    with actcache.open(tmp_path / "store", "r") as other:
        assert len(other.space(recycler.recipe)) == 40


def test_only_what_is_missing_is_computed(store, model, tokenizer, computed):
    recycler = Recycler(model, tokenizer, layer=2, store=store)
    recycler.fill(TEXTS[:30], progress=False)
    computed.clear()
    reader = recycler.reader(TEXTS + TEXTS[:3], batch_size=5, on_missing="compute")
    found = rows(reader)
    assert len(found) == 43
    compared = sum(computed)  # the canaries are computed once, before the first document
    computed.clear()
    list(reader)
    assert computed == []
    assert 10 <= compared < 30
    np.testing.assert_array_equal(found[0], found[40])


@pytest.mark.parametrize("options", [{"max_tokens": 60}, {"bucket": True, "shuffle": True}, {"layout": "packed"}])
def test_other_orders_and_layouts(store, model, tokenizer, options):
    recycler = Recycler(model, tokenizer, layer=2, store=store)
    batches = list(recycler.reader(TEXTS, batch_size=6, on_missing="compute", **options))
    assert sorted(int(n) for batch in batches for n in batch.documents) == list(range(40))
    if "max_tokens" in options:
        assert all(batch.attention_mask.numel() <= 60 for batch in batches)


def test_a_corrupt_entry_is_computed_anew(tmp_path, store, model, tokenizer):
    recycler = Recycler(model, tokenizer, layer=2, store=store, dtype="float32")
    recycler.fill(TEXTS, progress=False)
    before = rows(recycler.reader(TEXTS))
    recycler.close()
    needle = before[11][0].tobytes()
    found = 0
    for file in (tmp_path / "store").glob("spaces/*/segments/*"):
        data = bytearray(file.read_bytes())
        if needle in data:
            data[data.index(needle)] ^= 4
            file.write_bytes(data)
            found += 1
    assert found == 1
    with actcache.open(tmp_path / "store") as again:
        recycler = Recycler(model, tokenizer, layer=2, store=again, dtype="float32")
        after = rows(recycler.reader(TEXTS, batch_size=8, on_missing="compute"))
        for n in before:
            np.testing.assert_allclose(after[n], before[n], atol=1e-5)
        assert recycler.space.verify().intact


def test_what_cannot_be_computed_is_refused(tmp_path, store, model, tokenizer):
    recycler = Recycler(model, tokenizer, layer=2, store=store)
    recycler.fill(TEXTS[:3], progress=False)
    with actcache.open(tmp_path / "store", "r") as reading, pytest.raises(ReadOnlyError):
        Recycler(model, tokenizer, layer=2, store=reading).reader(TEXTS, on_missing="compute")


@pytest.mark.parametrize("options", [{}, {"bucket": True, "max_tokens": 40}])
def test_windows(store, model, tokenizer, computed, options):
    """A document's windows come in batches of their own, and are computed together when the first one's turn comes."""
    spec = actcache.windows(16, 4)
    texts = [f"document {i} says " + "la " * (7 * i) + "." for i in range(12)]
    recycler = Recycler(model, tokenizer, layer=2, store=store, max_length=16, too_long=spec, dtype="float32")
    recycler.fill(texts[:3], progress=False)
    options = {"batch_size": 4, "shuffle": True, "labels": [[i, 1] for i in range(12)], **options}
    reader = recycler.reader(texts, on_missing="compute", **options)
    first = [windows_of(reader) for _ in range(2)]
    computed.clear()
    again = windows_of(recycler.reader(texts, **options))
    assert computed == [1, 4, 1, 3]  # the check of the numbers, and nothing else
    other = Recycler(
        model,
        tokenizer,
        layer=2,
        store=actcache.open(f"{store.url}-filled"),
        max_length=16,
        too_long=spec,
        dtype="float32",
    )
    other.fill(texts, progress=False)
    expected = windows_of(other.reader(texts, **options))
    assert len(expected) > 40
    for found in (*first, again):
        assert found.keys() == expected.keys()
        for key, array in found.items():
            np.testing.assert_allclose(array, expected[key], atol=1e-5)
    for key in expected:
        np.testing.assert_array_equal(first[0][key], first[1][key])


def windows_of(batches: Any) -> dict[bytes, np.ndarray]:
    found = {}
    for batch in batches:
        assert batch.labels[:, 0].tolist() == batch.documents.tolist()
        for i, key in enumerate(batch.keys):
            found[key] = batch.activations[i, : int(batch.lengths[i])].numpy().copy()
    return found


def test_labels_of_tokens(store, model, tokenizer):
    recycler = Recycler(model, tokenizer, layer=2, store=store)
    labels = [np.arange(len(tokenizer(text)["input_ids"])) for text in TEXTS]
    for on_missing in ("compute", "raise"):
        for batch in recycler.reader(TEXTS, labels=labels, batch_size=6, shuffle=True, on_missing=on_missing):
            for row, n in zip(batch.labels, batch.documents.tolist(), strict=True):
                assert row[: len(labels[n])].tolist() == labels[n].tolist()
                assert (row[len(labels[n]) :] == -100).all()


def test_a_lower_half_that_was_trained_meanwhile_is_refused(store, model, tokenizer):
    recycler = Recycler(model, tokenizer, layer=2, store=store)
    recycler.fill(TEXTS[:20], progress=False)
    reader = recycler.reader(TEXTS, batch_size=10, on_missing="compute")
    with torch.no_grad():
        next(iter(model.encoder.layer[0].parameters())).add_(0.5)
    with pytest.raises((actcache.errors.LowerHalfMismatchError, CanaryError)):
        list(reader)
    assert len(recycler.space) <= 20 + 8  # documents and canaries, nothing of the changed model


def test_an_error_names_the_document(store, model, tokenizer, monkeypatch):
    """By its position in the texts that the reader was given, not in the batch."""
    run = LowerHalf.run

    def spoiled(self: LowerHalf, ids: Any, *args: Any, **options: Any) -> Any:
        found: Any = run(self, ids, *args, **options)
        return [array * np.nan if len(one) == longest else array for one, array in zip(ids, found, strict=True)]

    recycler = Recycler(model, tokenizer, layer=2, store=store)
    texts = [*TEXTS[:20], "la " * 30]
    longest = len(tokenizer(texts[20])["input_ids"])
    monkeypatch.setattr(LowerHalf, "run", spoiled)
    with pytest.raises(NonFiniteError, match="position 20 of the texts"):
        list(recycler.reader(texts, batch_size=7, on_missing="compute"))

"""Recording and replaying with pruned models: the space is that of the whole model."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

import actcache
from actcache.errors import LowerHalfMismatchError, ModelError, UnseenTokenError
from actcache.models import base_model_of, family_of, lower_digest, reduce, weights
from actcache.models.partial_vocabulary import Whole, vocabulary_size
from actcache.models.recycler import Recycler
from actcache.models.vocabulary import count_stored, count_vocabulary, load_pruned, prune_vocabulary

LAYER = 2


@pytest.fixture
def texts(docstrings) -> list[str]:
    return docstrings[:8]


def recycler(model: Any, tokenizer: Any, store: Path, **options: Any) -> Recycler:
    return Recycler(model, tokenizer, layer=LAYER, store=store, max_length=24, too_long="truncate", **options)


def rows(recycler: Recycler, texts: list[str]) -> list[np.ndarray]:
    return [entry.activations for entry in recycler.space.get(recycler.keys(texts))]


@pytest.mark.parametrize("first", ["pruned", "full"])
def test_one_fills_and_the_other_reads(first, tmp_path: Path, minilm, tokenizer, texts):
    """With the real MiniLM: nothing is computed twice, and what is computed is the same to the bit."""
    small = copy.deepcopy(minilm)
    pruned = prune_vocabulary(small, count_vocabulary(texts, tokenizer))
    assert len(pruned.ids) < 3000
    models = {"pruned": small, "full": minilm}
    other = "full" if first == "pruned" else "pruned"
    with recycler(models[first], tokenizer, tmp_path / "store") as filling:
        assert filling.fill(texts, progress=False).computed == len(texts)
        fingerprint = filling.recipe.fingerprint
    with recycler(models[other], tokenizer, tmp_path / "store") as reading:
        assert reading.recipe.fingerprint == fingerprint
        assert not reading.space.created
        assert reading.fill(texts, progress=False).computed == 0
        stored = rows(reading, texts)
    with recycler(models[other], tokenizer, tmp_path / "again") as again:
        again.fill(texts, progress=False)
        assert all(np.array_equal(a, b) for a, b in zip(rows(again, texts), stored, strict=True))


@pytest.mark.parametrize("full_matrix", ["memory", "checkpoint"])
def test_the_digest_is_that_of_the_whole_as_it_would_be_restored(full_matrix, tmp_path, make_model, monkeypatch):
    monkeypatch.setattr(weights, "_CHUNK", 1000)  # no multiple of a row
    make_model(AutoModel, vocab_size=500).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    family = family_of(model)

    def digest(model: Any) -> str:
        weights._digests.clear()
        return lower_digest(model, family, LAYER)

    before = digest(model)
    pruned = prune_vocabulary(model, range(10, 60), full_matrix=full_matrix)
    assert digest(model) == before
    pruned.grow([7, 400])
    assert digest(model) == before
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 0] += 1
    trained = digest(model)
    assert trained != before
    pruned.restore()
    assert digest(model) == trained


def test_half_precision_over_a_checkpoint_of_another(tmp_path, make_model):
    make_model(AutoModel, vocab_size=500).save_pretrained(tmp_path)
    full, model = (AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16) for _ in range(2))
    prune_vocabulary(model, range(10, 60), full_matrix="checkpoint")
    assert lower_digest(model, family_of(model), LAYER) == lower_digest(full, family_of(full), LAYER)


def test_a_trained_lower_half_is_refused(tmp_path: Path, minilm, tokenizer, texts):
    model = copy.deepcopy(minilm)
    with recycler(minilm, tokenizer, tmp_path / "store") as full:
        full.fill(texts[:3], progress=False)
        task = AutoModelForSequenceClassification.from_config(minilm.config).eval()
        base_model_of(task).load_state_dict(model.state_dict())
        prune_vocabulary(task, count_stored(full.space, tokenizer=tokenizer))
        reduced = full.reduce(task)
        with torch.no_grad():
            task.get_input_embeddings().weight[5] += 0.5
        with pytest.raises(LowerHalfMismatchError, match="fine-tuned"):
            full.reduce(task)
    assert reduced.num_labels == 2


def test_a_pruned_task_model_is_reduced(tmp_path: Path, minilm, tokenizer, texts, caplog):
    """Its logits are over the rows, from stored activations too, and training it does not touch the embeddings."""
    torch.manual_seed(0)
    task = AutoModelForMaskedLM.from_config(minilm.config).eval()
    base_model_of(task).load_state_dict(minilm.state_dict(), strict=False)
    with recycler(task, tokenizer, tmp_path / "store", dtype="float32") as full:
        full.fill(texts, progress=False)
        ids = tokenizer(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
        pruned = prune_vocabulary(task, count_stored(full.space, tokenizer=tokenizer))
        labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
        with torch.no_grad():
            expected = task(**ids, labels=labels)
        with caplog.at_level(logging.WARNING):
            reduced = full.reduce(task)
        assert "its own copy" in caplog.text
        held = sum(p.numel() for p in reduced.parameters())
        assert held < sum(p.numel() for p in task.parameters())
        (batch,) = full.reader(texts, batch_size=len(texts))
        inputs = batch.model_inputs()
        with torch.no_grad():
            out = reduced(**inputs, labels=labels)
        assert out.logits.shape[-1] == len(pruned.ids)
        torch.testing.assert_close(out.loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_a_reduced_copy_grows_its_logits_on_its_own(make_model):
    task = make_model(AutoModelForMaskedLM, vocab_size=500)
    pruned = prune_vocabulary(task, range(50), on_unseen="grow")
    reduced = reduce(task, 2)
    rows, ids = torch.randn(1, 4, 32), torch.tensor([[1, 2, 3, 4]])
    labels = torch.tensor([[1, 499, -100, 4]])
    out = reduced(activations=rows, token_ids=ids, labels=labels)
    assert out.logits.shape[-1] == reduced.config.vocab_size == 51
    assert len(pruned.ids) == task.config.vocab_size == 50
    pruned.restore()
    whole = reduce(task, 2)(activations=rows, token_ids=ids)
    torch.testing.assert_close(out.logits, whole.logits[..., [*range(50), 499]])


def test_tokens_that_are_not_kept_stop_a_fill(tmp_path: Path, minilm, tokenizer):
    model = copy.deepcopy(minilm)
    pruned = prune_vocabulary(model, count_vocabulary(["one two three"], tokenizer))
    with recycler(model, tokenizer, tmp_path / "store") as small:
        with pytest.raises(UnseenTokenError, match="'zebra'"):
            small.fill(["one zebra"], progress=False)
        pruned.grow(count_vocabulary(["one zebra"], tokenizer))
        assert small.fill(["one zebra"], progress=False).computed == 1
    growing = copy.deepcopy(minilm)
    prune_vocabulary(growing, [0], on_unseen="grow")
    with recycler(growing, tokenizer, tmp_path / "store") as again:
        assert again.fill(["one zebra", "two yaks"], progress=False).computed == 1
        assert again.recipe.fingerprint == small.recipe.fingerprint


def test_a_small_checkpoint_alone_has_no_digest(tmp_path: Path, minilm, minilm_path, tokenizer):
    model = AutoModel.from_pretrained(minilm_path)
    prune_vocabulary(model, count_vocabulary(["one two three"], tokenizer), full_matrix="checkpoint")
    model.save_pretrained(tmp_path / "small")
    alone = load_pruned(AutoModel, tmp_path / "small").model.eval()
    with pytest.raises(ModelError, match="not at hand"):
        recycler(alone, tokenizer, tmp_path / "store")
    with_rest = load_pruned(AutoModel, tmp_path / "small", full_matrix=minilm_path).model.eval()
    with (
        recycler(with_rest, tokenizer, tmp_path / "store") as small,
        recycler(minilm, tokenizer, tmp_path / "store") as full,
    ):
        assert small.recipe.fingerprint == full.recipe.fingerprint


def test_reading_a_part_as_a_whole():
    whole = torch.arange(70, dtype=torch.float32).reshape(10, 7)
    ids = torch.tensor([8, 2, 5])
    part = Whole("w", -whole[ids], ids, whole, 10)
    expected = whole.clone()
    expected[ids] *= -1
    assert torch.equal(part.rows(0, 10), expected)
    assert torch.equal(part.rows(2, 6), expected[2:6])
    data = expected.numpy().tobytes()
    assert part.nbytes == len(data)
    for start in range(0, len(data), 33):
        assert bytes(part.read(start, start + 33)) == data[start : start + 33]
    meta = Whole("w", part.rows(0, 3).to("meta"), ids, whole, 10)
    with pytest.raises(ModelError, match="meta"):
        meta.rows(0, 10)


def test_the_vocabulary_of_a_model(make_model):
    model = make_model(AutoModel, vocab_size=500)
    assert vocabulary_size(model) == 500
    prune_vocabulary(model, range(9))
    assert model.config.vocab_size == 9
    assert vocabulary_size(model) == 500
    assert reduce(make_model(AutoModelForSequenceClassification, vocab_size=300), 1).config.vocab_size == 300
    assert actcache.errors.UnseenTokenError.__mro__[1] is ModelError

"""Reduced outputs equal the full model's, on real weights and real documents, at every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

import actcache
from actcache.models import LowerHalf, family_of, reduce
from actcache.models.recycler import Recycler
from tests.models.zoo import padded

LAYERS = range(1, 6)


@pytest.fixture(scope="module")
def task(minilm_path: str) -> PreTrainedModel:
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_path, num_labels=3)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)  # logits of a size that differences would show in
    return model.eval()


@pytest.fixture(scope="module", params=[24, pytest.param(520, marks=pytest.mark.long)])
def texts(request: pytest.FixtureRequest, docstrings: list[str]) -> list[str]:
    """Docstrings from all over."""
    count: int = request.param
    return docstrings[:: len(docstrings) // count][:count]


@pytest.fixture(scope="module")
def full(task: PreTrainedModel, tokenizer: Any, texts: list[str]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The oracle: logits and last hidden states of the full model, in batches of the documents as they come."""
    logits, states = [], []
    with torch.no_grad():
        for start in range(0, len(texts), 40):
            inputs = tokenizer(
                texts[start : start + 40], truncation=True, max_length=48, padding=True, return_tensors="pt"
            )
            outputs = task(**inputs, output_hidden_states=True)
            logits.append(outputs.logits)
            lengths = inputs["attention_mask"].sum(1)
            states += [rows[:n] for rows, n in zip(outputs.hidden_states[-1], lengths, strict=True)]
    return torch.cat(logits), states


@pytest.mark.parametrize(
    ("layer", "dtype", "tolerance"),
    [
        *(pytest.param(i, "float32", 1e-5, marks=[] if i in (1, 5) else pytest.mark.long) for i in LAYERS),
        # what rounding does to the last layers, whichever it begins at
        *(pytest.param(i, "float16", 1e-2, marks=[] if i == 3 else pytest.mark.long) for i in LAYERS),
    ],
)
def test_reduced_equals_full(
    layer: int,
    dtype: str,
    tolerance: float,
    minilm: PreTrainedModel,
    tokenizer: Any,
    task: PreTrainedModel,
    full: tuple[torch.Tensor, list[torch.Tensor]],
    texts: list[str],
    tmp_path: Path,
) -> None:
    want_logits, want_states = full
    options: dict[str, Any] = {"layer": layer, "dtype": dtype, "max_length": 48, "too_long": "truncate"}
    with Recycler(minilm, tokenizer, store=tmp_path / "store", **options) as recycler:
        report = recycler.fill(texts, progress=False)
        assert (report.documents, report.computed) == (len(texts), len(texts))
        reduced = recycler.reduce(task)
        logit_error = state_error = 0.0
        seen = []
        with torch.no_grad():
            for batch in recycler.reader(texts, batch_size=23, shuffle=True, seed=layer):
                outputs = reduced(**batch.model_inputs(), output_hidden_states=True)
                positions = batch.documents.tolist()
                seen += positions
                logit_error = max(logit_error, float((outputs.logits - want_logits[positions]).abs().max()))
                for rows, n, i in zip(outputs.hidden_states[-1], batch.lengths.tolist(), positions, strict=True):
                    state_error = max(state_error, float((rows[:n] - want_states[i]).abs().max()))
        assert sorted(seen) == list(range(len(texts)))
        assert seen != sorted(seen)
        assert logit_error <= tolerance
        if dtype == "float32":
            assert state_error <= tolerance
        else:
            assert logit_error > 0  # the entries really are rounded


def test_recorded_rows_are_the_models_own_hidden_states(
    minilm: PreTrainedModel, tokenizer: Any, docstrings: list[str], tmp_path: Path
) -> None:
    texts = docstrings[:12]
    with Recycler(
        minilm, tokenizer, layer=2, store=tmp_path, dtype="float32", max_length=128, too_long="truncate"
    ) as r:
        r.fill(texts, progress=False)
        for text, entry in zip(texts, r.space.get(r.keys(texts)), strict=True):
            inputs = tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
            with torch.no_grad():
                alone = minilm(**inputs, output_hidden_states=True).hidden_states[2][0]
            assert entry is not None
            np.testing.assert_allclose(entry.activations, alone.numpy(), atol=2e-5)
            np.testing.assert_array_equal(entry.token_ids, inputs["input_ids"][0].numpy())


@pytest.mark.parametrize("count", [24, pytest.param(192, marks=pytest.mark.long)])
def test_training_gives_the_frozen_full_models_losses(
    count: int, minilm: PreTrainedModel, minilm_path: str, tokenizer: Any, docstrings: list[str], tmp_path: Path
) -> None:
    texts = docstrings[:count]
    labels = [len(text) % 3 for text in texts]
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    torch.manual_seed(0)
    full = AutoModelForSequenceClassification.from_pretrained(minilm_path, num_labels=3, **no_dropout)
    with Recycler(minilm, tokenizer, layer=3, store=tmp_path, dtype="float32", max_length=24, too_long="truncate") as r:
        r.fill(texts, progress=False)
        reduced = r.reduce(full).train()
        full.train()
        for part in (full.bert.embeddings, *full.bert.encoder.layer[:3]):
            part.requires_grad_(False)
        optimizers = [
            torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4) for model in (full, reduced)
        ]
        losses = []
        for _ in range(2):
            for batch in r.reader(texts, labels=labels, batch_size=8, shuffle=True):
                rows = [texts[i] for i in batch.documents.tolist()]
                inputs = tokenizer(rows, truncation=True, max_length=24, padding=True, return_tensors="pt")
                pair = [full(**inputs, labels=batch.labels).loss, reduced(**batch.model_inputs()).loss]
                for loss, optimizer in zip(pair, optimizers, strict=True):
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                losses.append([loss.item() for loss in pair])
    assert len(losses) == count // 4
    np.testing.assert_allclose(*np.array(losses).T, atol=1e-4)
    assert losses[-1][0] < losses[0][0] - 0.05  # it did train


def test_another_library_release_finds_the_same_space(
    minilm: PreTrainedModel, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["one", "two words"]
    with Recycler(minilm, tokenizer, layer=3, store=tmp_path) as recycler:
        recycler.fill(texts, progress=False)
        fingerprint = recycler.recipe.fingerprint
    monkeypatch.setattr("actcache.models.provenance._version", lambda library: "99.0")
    with Recycler(minilm, tokenizer, layer=3, store=tmp_path) as recycler:
        assert recycler.recipe.fingerprint == fingerprint
        assert recycler.fill(texts, progress=False).computed == 0
        assert recycler.space.recipe.provenance["torch"] == torch.__version__
    assert actcache.Recycler is Recycler


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("head", [AutoModelForTokenClassification, AutoModelForQuestionAnswering])
def test_heads_that_look_at_all_tokens(
    head: Any, side: str, minilm: PreTrainedModel, minilm_path: str, tokenizer: Any, docstrings: list[str]
) -> None:
    """Each document alone is the reference, and what its tokens lose."""
    torch.manual_seed(2)
    task = head.from_pretrained(minilm_path, num_labels=2).eval()
    torch.nn.init.normal_((task.classifier if hasattr(task, "classifier") else task.qa_outputs).weight, std=0.5)
    ids = [np.array(tokenizer(text, truncation=True, max_length=32)["input_ids"]) for text in docstrings[:8]]
    rows = LowerHalf(minilm, family_of(minilm), 3).run(ids)
    mask = padded([np.ones(len(one), np.int64) for one in ids], side)
    batch = {"activations": padded(rows, side), "token_ids": padded(ids, side), "attention_mask": mask}
    with torch.no_grad():
        alone = [task(input_ids=torch.tensor(one)[None]) for one in ids]
        if head is AutoModelForQuestionAnswering:
            places = mask.argmax(-1) + 1
            got = reduce(task, 3)(**batch, start_positions=places, end_positions=places)
            mine = torch.stack([got.start_logits, got.end_logits], -1)[mask.bool()]
            theirs = torch.cat([torch.stack([one.start_logits, one.end_logits], -1)[0] for one in alone])
            losses = [
                torch.nn.functional.cross_entropy(logits, torch.tensor([1]))
                for one in alone
                for logits in (one.start_logits, one.end_logits)
            ]
            torch.testing.assert_close(got.loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
        else:
            mine = reduce(task, 3)(**batch).logits[mask.bool()]
            theirs = torch.cat([one.logits[0] for one in alone])
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)

"""The real MiniLM over real text, and the arithmetic of the benchmark against published figures."""

from __future__ import annotations

import copy

import pytest
import torch

from actcache.models.vocabulary import count_vocabulary, prune_vocabulary
from bench.vocabulary import MODELS, Shape


def test_real_text_gives_the_same_embeddings(minilm, tokenizer, docstrings):
    model, texts = copy.deepcopy(minilm), docstrings[::26]
    pruned = prune_vocabulary(model, count_vocabulary(docstrings, tokenizer))
    assert 2000 < len(pruned.ids) < 6000
    before, after = (sum(p.numel() for p in m.parameters()) for m in (minilm, model))
    assert pruned.saved_bytes == 4 * (before - after) == 4 * 384 * (30522 - len(pruned.ids))
    batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        ours, theirs = model(**batch), minilm(**batch)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    assert torch.equal(ours.pooler_output, theirs.pooler_output)


@pytest.mark.parametrize(
    ("name", "parameters", "share"),
    [
        ("BERT-base uncased", 109_482_240, 0.2141),  # torch's count of bert-base-uncased with its pooler
        ("XLM-R-large", 559_890_432, 0.4573),  # 45.72 % in transformer-smaller-training-vocab's README, with a head
    ],
)
def test_the_benchmarks_shapes_are_the_published_ones(name, parameters, share):
    shape = Shape.of(MODELS[name])
    assert shape.parameters == parameters
    assert shape.share == pytest.approx(share, abs=1e-4)
    assert shape.saved(shape.rows) == 0
    assert shape.saved(22) == (shape.rows - 22) * shape.hidden * 4

"""Every family: the same outputs with fewer rows, in memory and from a small checkpoint, and everything back."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel, T5EncoderModel

from actcache.errors import ModelError
from actcache.models.vocabulary import load_pruned, prune_vocabulary
from tests.models.vocabulary.families import FAMILIES, SIZE, USED, inputs, language_model, make

CASES = [
    *itertools.product(FAMILIES, ["language"]),
    # Heads that look for the padding or the end of text, and one that does not.
    *itertools.product(["bert", "modernbert", "t5", "gpt2", "llama"], ["classification"]),
    *itertools.product(["roberta", "deberta-v2", "t5"], ["base"]),
    ("t5", "encoder"),
]
HEADS: dict[str, Any] = {"base": AutoModel, "classification": AutoModelForSequenceClassification}


def head_of(family: str, head: str) -> Any:
    if head == "language":
        return language_model(family)
    return T5EncoderModel if head == "encoder" else HEADS[head]


@torch.no_grad()
def run(model: PreTrainedModel) -> torch.Tensor:
    out = model(**inputs(model))
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def parameters(model: PreTrainedModel) -> dict[str, tuple[int, torch.Size]]:
    """Names of all parameters, tied ones with the same number."""
    numbers: dict[int, int] = {}
    return {
        name: (numbers.setdefault(id(p), len(numbers)), p.shape)
        for name, p in model.named_parameters(remove_duplicate=False)
    }


@pytest.mark.parametrize(("family", "head"), CASES)
def test_a_pruned_model_computes_the_same(family, head, tmp_path: Path):
    model = make(head_of(family, head), family)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, expected = parameters(model), run(model)
    model.save_pretrained(tmp_path / "full")  # which notes class and dtype in the configuration
    config = copy.deepcopy(model.config.to_dict())

    pruned = prune_vocabulary(model, USED)
    kept, rows = pruned.ids, len(pruned.ids)
    assert set(USED) | {0, model.config.pad_token_id} <= set(kept.tolist())
    assert rows < 60

    def check(model: PreTrainedModel) -> None:
        out = run(model)
        assert torch.equal(out, expected[..., kept] if head == "language" else expected)
        embedding = model.get_input_embeddings()
        assert embedding.num_embeddings == model.config.vocab_size == len(embedding.weight) == rows
        output = model.get_output_embeddings()
        if head == "language" and family != "deberta-v3":  # whose head takes the embeddings' matrix
            assert output.out_features == len(output.weight) == rows
        # The same parameters are tied, and those that had a row per token are smaller.
        now = parameters(model)
        assert {name: number for name, (number, _) in now.items()} == {n: number for n, (number, _) in before.items()}
        for name, (_, shape) in now.items():
            old = before[name][1]
            assert shape == ((rows, *old[1:]) if old[0] == SIZE else old), name

    check(model)
    model.save_pretrained(tmp_path / "small")
    loaded = load_pruned(head_of(family, head), tmp_path / "small")
    assert np.array_equal(loaded.ids, kept)
    check(loaded.model.eval())
    with pytest.raises(ModelError, match="not at hand"):
        loaded.restore()

    pruned.restore()
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == SIZE
    assert parameters(model) == before
    restored = model.state_dict()
    assert list(restored) == list(state)
    assert all(torch.equal(restored[name], tensor) for name, tensor in state.items())
    assert torch.equal(run(model), expected)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_models_loss_is_over_the_kept_rows(family):
    model = make(language_model(family), family)
    batch = inputs(model)
    labels = batch.get("labels", batch["input_ids"]).clone()
    labels[:, 0] = -100
    batch["labels"] = labels
    with torch.no_grad():
        logits = model(**batch).logits
    pruned = prune_vocabulary(model, USED)
    rows = {token: row for row, token in enumerate(pruned.ids.tolist())}
    targets = labels.clone().apply_(lambda token: rows.get(token, -100))
    logits = logits[..., pruned.ids]
    if (family != "t5" and "ForCausalLM" in type(model).__name__) or family == "gpt2":
        logits, targets = logits[:, :-1], targets[:, 1:]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    with torch.no_grad():
        out = model(**batch)
    torch.testing.assert_close(out.loss, expected)
    assert torch.equal(batch["labels"], labels)  # the caller's own tensor is not changed

    # Over the whole vocabulary, tokens without a row have no part in it.
    with pruned.whole_logits(), torch.no_grad():
        whole = model(**batch)
    assert whole.logits.shape[-1] == SIZE
    assert torch.equal(whole.logits[..., pruned.ids], out.logits)
    assert whole.logits.isinf().sum() == whole.logits[..., 0].numel() * (SIZE - len(pruned.ids))
    torch.testing.assert_close(whole.loss, expected)
    assert model.config.vocab_size == len(pruned.ids)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_generating_gives_the_tokenizers_ids(family):
    model = make(language_model(family), family)
    ids = inputs(model)["input_ids"][1:]
    kept = prune_vocabulary(make(language_model(family), family), USED).ids
    others = sorted(set(range(SIZE)) - set(kept.tolist()))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, suppress_tokens=others, **options)
    prune_vocabulary(model, USED)
    assert torch.equal(model.generate(ids, **options), expected)
    assert set(expected.flatten().tolist()) <= set(kept.tolist())
    beams = model.generate(ids, num_beams=3, **options)
    assert set(beams.flatten().tolist()) <= set(kept.tolist())  # of scores that are normalized over the rows


def test_the_scale_of_embeddings_and_max_norm_stay():
    model = make(AutoModel, "gemma3")
    embedding = model.get_input_embeddings()
    assert float(embedding.embed_scale) != 1
    embedding.max_norm = 0.5
    ids = torch.tensor([USED[:5]])
    expected = embedding(ids)
    model = make(AutoModel, "gemma3")
    model.get_input_embeddings().max_norm = 0.5
    prune_vocabulary(model, USED)
    assert torch.equal(model.get_input_embeddings()(ids), expected)


def test_padding_gets_no_gradient():
    model = make(AutoModel, "roberta").train()
    pruned = prune_vocabulary(model, USED)
    embedding = model.get_input_embeddings()
    row = int(pruned.rows_of(torch.tensor(model.config.pad_token_id)))
    assert embedding.padding_idx == row
    model(**inputs(model)).last_hidden_state.sum().backward()
    assert not embedding.weight.grad[row].any()
    pruned.restore()
    assert embedding.padding_idx == model.config.pad_token_id


def test_another_model_of_the_same_configuration_keeps_its_size():
    first = make(AutoModel, "t5")
    second = AutoModel.from_config(first.config)
    prune_vocabulary(first, USED)
    assert second.config.vocab_size == second.encoder.config.vocab_size == SIZE
    assert first.config.vocab_size == first.encoder.config.vocab_size == first.get_input_embeddings().num_embeddings

"""Checkpoints, small and full, and where the rows are meanwhile."""

from __future__ import annotations

import gc
import json
import pickle
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, PreTrainedModel

from actcache.errors import ModelError, UsageError
from actcache.models.vocabulary import Pruned, load_pruned, prune_vocabulary, save_full
from tests.models.vocabulary.families import SIZE, USED, inputs, language_model, make


def train(model: PreTrainedModel, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for number in range(steps):
        model(**inputs(model, seed=number)).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.fixture
def pretrained(tmp_path: Path) -> str:
    make(AutoModelForMaskedLM, "roberta").save_pretrained(tmp_path / "pretrained")
    return str(tmp_path / "pretrained")


@pytest.mark.parametrize("where", ["memory", "checkpoint", "file"])
def test_the_other_rows_come_back_from_where_they_are(where, tmp_path: Path, pretrained):
    full = AutoModelForSequenceClassification.from_pretrained(pretrained)
    full.save_pretrained(tmp_path / "task")  # the same new head for both
    full, model = (AutoModelForSequenceClassification.from_pretrained(tmp_path / "task") for _ in range(2))
    # A task model's names have a prefix that a base model's checkpoint may lack.
    AutoModel.from_pretrained(pretrained).save_pretrained(tmp_path / "base")
    model.config.name_or_path = str(tmp_path / "base")
    pruned = prune_vocabulary(model, USED, full_matrix=tmp_path / "kept.safetensors" if where == "file" else where)
    train(full)
    train(model)

    save_full(pruned, tmp_path / "full")
    assert len(pruned.ids) == model.config.vocab_size < 60  # it stays pruned
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "full")
    assert_same(saved, full)
    assert saved.config.vocab_size == SIZE
    assert not hasattr(saved.config, "actcache_vocabulary")
    pruned.restore()
    assert_same(model, full)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_a_small_checkpoint_becomes_full_again(family, tmp_path: Path):
    """With the pretrained model's files; what was trained since pruning is in the small checkpoint."""
    auto = language_model(family)
    full = make(auto, family)
    full.save_pretrained(tmp_path / "pretrained")
    model = auto.from_pretrained(tmp_path / "pretrained")
    prune_vocabulary(model, USED).grow([3])
    with torch.no_grad():  # as training would
        for each, row in ((model, 1), (full, int(Pruned(model).ids[1]))):
            each.get_output_embeddings().weight[row] += 1
    model.save_pretrained(tmp_path / "small")
    weights = load_file(tmp_path / "small" / "model.safetensors")
    assert not any(tensor.shape[:1] == (SIZE,) for tensor in weights.values())
    assert sum(name.endswith("row_ids") for name in weights) == 1
    loaded = load_pruned(auto, tmp_path / "small", full_matrix=tmp_path / "pretrained")
    assert loaded.ids[-1] == 3
    assert loaded.size == SIZE
    assert loaded.model.config.pad_token_id == full.config.pad_token_id
    loaded.grow([4])
    assert_same(loaded.restore().eval(), full)


def test_a_base_model_is_loaded_from_a_task_models_checkpoint(tmp_path: Path):
    model = make(AutoModelForSequenceClassification, "modernbert")
    prune_vocabulary(model, USED)
    model.save_pretrained(tmp_path)
    loaded = load_pruned(AutoModel, tmp_path, dtype=torch.float64)
    assert loaded.model.dtype == torch.float64
    batch = inputs(model)
    with torch.no_grad():
        expected = model.base_model(**batch).last_hidden_state
        torch.testing.assert_close(
            loaded.model.eval()(**batch).last_hidden_state.float(), expected, atol=1e-4, rtol=1e-4
        )


def test_another_models_matrix_is_refused(tmp_path: Path, pretrained):
    make(AutoModelForMaskedLM, "roberta", seed=1).save_pretrained(tmp_path / "other")
    model = AutoModelForMaskedLM.from_pretrained(pretrained)
    model.config.name_or_path = str(tmp_path / "other")
    with pytest.raises(ModelError, match="is not what the checkpoint"):
        prune_vocabulary(model, USED, full_matrix="checkpoint")
    model.config.name_or_path = str(tmp_path / "nothing")
    with pytest.raises(ModelError, match="has no safetensors file"):
        prune_vocabulary(model, USED, full_matrix="checkpoint")
    assert model.config.vocab_size == SIZE
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(UsageError, match="there already"):
        prune_vocabulary(model, USED, full_matrix=tmp_path / "there.safetensors")
    prune_vocabulary(model, USED)
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match="other embeddings"):
        load_pruned(AutoModelForMaskedLM, tmp_path / "small", full_matrix=tmp_path / "other")
    with pytest.raises(ModelError, match="no safetensors file"):
        load_pruned(AutoModelForMaskedLM, tmp_path / "small", full_matrix=tmp_path / "nothing")


_empty_like = torch.empty_like


def _like_ids(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
    made = _empty_like(tensor, **options)
    if made.dtype == torch.int32 and not made.is_meta:
        made.copy_(torch.arange(made.numel(), dtype=made.dtype).view(made.shape))
    return made


def test_what_is_no_pruned_checkpoint(tmp_path: Path, pretrained, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ModelError, match="no pruned model"):
        load_pruned(AutoModelForMaskedLM, pretrained)
    config = Path(pretrained, "config.json")
    described = json.loads(config.read_text())
    config.write_text(json.dumps({**described, "actcache_vocabulary": {"size": 200, "rows": 200}}))
    for found in (torch.empty_like, _like_ids):  # what lies in the memory that is left as it was found
        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty_like", found)
            with pytest.raises(ModelError, match="do not say which tokens"):
                load_pruned(AutoModelForMaskedLM, pretrained)
    for size, rows in ((300, 50), (200, 201), (200, 0)):
        config.write_text(json.dumps({**described, "actcache_vocabulary": {"size": size, "rows": rows}}))
        with pytest.raises(ModelError, match="contradicts itself"):
            load_pruned(AutoModelForMaskedLM, pretrained)


def test_nothing_takes_a_small_checkpoint_for_a_full_one(tmp_path: Path):
    """Its rows would be taken for those of other tokens."""
    model = make(AutoModelForMaskedLM, "modernbert")
    prune_vocabulary(model, USED)
    model.save_pretrained(tmp_path / "task")
    model.base_model.save_pretrained(tmp_path / "base")
    assert model.config.vocab_size == len(Pruned(model).ids)
    for folder in ("task", "base"):
        with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
            AutoModel.from_pretrained(tmp_path / folder)
        assert np.array_equal(load_pruned(AutoModel, tmp_path / folder).ids, Pruned(model).ids)
    with pytest.raises(RuntimeError, match="size mismatch"):
        make(AutoModelForMaskedLM, "modernbert").load_state_dict(model.state_dict())


def test_a_plain_state_dict_carries_the_rows_ids():
    model = make(AutoModel, "t5")
    state = model.state_dict()
    pruned = prune_vocabulary(model, USED)
    names = set(model.state_dict()) - set(state)
    assert names == {"shared.row_ids"}
    assert model.state_dict()["shared.row_ids"].tolist() == pruned.ids.tolist()
    pruned.grow([3])
    assert model.state_dict()["shared.row_ids"].tolist() == pruned.ids.tolist()


def test_a_pickled_model_is_as_it_was(tmp_path: Path):
    """As when it is sent to another process."""
    model = make(language_model("gpt2"), "gpt2")
    pruned = prune_vocabulary(model, USED, on_unseen="grow")
    again = pickle.loads(pickle.dumps(model))  # noqa: S301  our own bytes
    batch = inputs(model)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert torch.equal(again.generate(**batch, max_new_tokens=3), model.generate(**batch, max_new_tokens=3))
    again.save_pretrained(tmp_path)
    assert np.array_equal(load_pruned(language_model("gpt2"), tmp_path).ids, pruned.ids)
    again(torch.tensor([[3, 4]]))
    assert len(Pruned(again).ids) == len(pruned.ids) + 2
    assert_same(Pruned(again).restore(), make(language_model("gpt2"), "gpt2"))


@pytest.mark.parametrize("where", ["memory", "checkpoint"])
def test_the_whole_matrix_is_not_held_twice(where, pretrained):
    model = AutoModelForMaskedLM.from_pretrained(pretrained)
    weight = model.get_input_embeddings().weight
    address, old = weight.data_ptr(), weakref.ref(weight)
    del weight
    pruned = prune_vocabulary(model, USED, full_matrix=where)
    gc.collect()
    assert old() is None
    rest = pruned._kept.rest["roberta.embeddings.word_embeddings.weight"]
    assert rest is not None
    assert (rest.data_ptr() == address) == (where == "memory")

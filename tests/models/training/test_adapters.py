"""Bottleneck adapters and PEFT's LoRA on full and reduced models; several tasks over one pass of reading."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import gelu
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedModel
from transformers.models.bert.modeling_bert import BertOutput, BertSelfOutput

from actcache import Recycler
from actcache.errors import LayerError, ModelError, UnsupportedModelError, UsageError
from actcache.models import (
    LowerHalf,
    add_adapters,
    base_model_of,
    copy_sharing_frozen,
    family_of,
    load_adapters,
    reduce,
    save_adapters,
)
from actcache.models.training.adapters import Bottleneck, spec_of, trained_names
from tests.models.zoo import CLASSIFY, KINDS, documents, full_inputs, mask_of, padded

LAYER = 2
TEXTS = [f"document {i} says " + "la " * (i % 13) + "." for i in range(32)]
LABELS = np.stack([np.arange(32) % 2, np.arange(32) % 3 == 0], 1)

Make = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def _one_quiet_thread() -> Iterator[None]:
    """Tiny models are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.getLogger("actcache").setLevel(logging.ERROR)
    yield
    logging.getLogger("actcache").setLevel(logging.NOTSET)
    torch.set_num_threads(before)


def shake(model: nn.Module) -> None:
    """Change all that trains, far from its start."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def batch_of(model: PreTrainedModel, layer: int = LAYER) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same documents for the full and for a reduced model."""
    base, ids = base_model_of(model), documents()
    rows = LowerHalf(base, family_of(base), layer).run(ids)
    mask = mask_of(ids, "right")
    return full_inputs(model, ids, "right"), {
        "activations": padded(rows, "right"),
        "token_ids": padded(ids, "right"),
        "attention_mask": mask,
    }


@pytest.mark.parametrize("name", KINDS)
def test_half_adapters_of_a_reduced_model_are_those_of_the_full_one(name: str, tmp_path: Path) -> None:
    full = KINDS[name].make(CLASSIFY)
    whole, stored = batch_of(full)
    reduced = add_adapters(reduce(full, LAYER), 8)
    width = full.config.hidden_size
    adapters = [module for module in reduced.modules() if isinstance(module, Bottleneck)]
    assert len(adapters) == 2 * LAYER  # of the four layers, two are left
    assert all(sum(p.numel() for p in one.parameters()) == 2 * 8 * width + 8 + width for one in adapters)
    frozen = {name for name, p in base_model_of(reduced).named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in base_model_of(reduced).named_parameters() if ".adapter." not in name}
    with torch.no_grad():
        plain, near = reduce(full, LAYER)(**stored).logits, reduced(**stored).logits
        assert 0 < float((near - plain).norm() / plain.norm()) < 0.05  # nearly the identity
    shake(reduced)
    with torch.no_grad():
        want = reduced(**stored).logits
    assert float((want - plain).norm() / plain.norm()) > 0.05
    save_adapters(reduced, tmp_path / "adapters.safetensors")
    assert set(load_file(tmp_path / "adapters.safetensors")) == set(trained_names(reduced))
    load_adapters(full, tmp_path / "adapters.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(full(**whole).logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bottleneck", [24, 64, 256])
def test_the_formula(make_model: Make, bottleneck: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against Houlsby et al.'s formula, put into transformers' own code of both sublayers."""
    model = make_model(AutoModelForSequenceClassification)
    ids = torch.tensor([[101, 2023, 2003, 102]])
    add_adapters(model, bottleneck)
    shake(model)
    with torch.no_grad():
        got = model(input_ids=ids).logits

    def formula(self: Any, hidden_states: Any, input_tensor: Any) -> Any:
        h = hidden_states @ self.dense.weight.T + self.dense.bias
        inside = gelu(h @ self.dense.adapter.down.weight.T + self.dense.adapter.down.bias)
        h = h + inside @ self.dense.adapter.up.weight.T + self.dense.adapter.up.bias
        return self.LayerNorm(h + input_tensor)

    monkeypatch.setattr(BertSelfOutput, "forward", formula)
    monkeypatch.setattr(BertOutput, "forward", formula)
    with torch.no_grad():
        torch.testing.assert_close(got, model(input_ids=ids).logits)


@pytest.fixture
def recycler(make_model: Make, tokenizer: Any, tmp_path: Path) -> Iterator[Recycler]:
    task = make_model(AutoModelForSequenceClassification)
    with Recycler(task.base_model, tokenizer, layer=LAYER, store=tmp_path / "store", dtype="float32") as made:
        made.fill(TEXTS, progress=False)
        yield made


def steps(model: Any, batches: Any, column: int = 0) -> list[float]:
    """Train without dropout on one column of the labels; return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for batch in batches:
        inputs = batch.model_inputs()
        loss = model(**{**inputs, "labels": inputs["labels"][:, column]}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("options", [{}, {"layer_norms": True, "also_train": ("bert.pooler",)}])
def test_only_what_is_to_train_trains(recycler: Recycler, make_model: Make, options: Any) -> None:
    reduced = add_adapters(recycler.reduce(make_model(AutoModelForSequenceClassification)), 8, **options)
    before = {name: parameter.clone() for name, parameter in reduced.named_parameters()}
    steps(reduced, recycler.reader(TEXTS, labels=LABELS, batch_size=8))
    changed = {name for name, parameter in reduced.named_parameters() if not torch.equal(parameter, before[name])}
    kinds = {"adapter", "classifier"} | ({"LayerNorm", "pooler"} if options else set())
    assert all(any(kind in name for kind in kinds) for name in changed)
    assert all(any(kind in name for name in changed) for kind in kinds)
    assert changed == set(trained_names(reduced))


def test_gradient_checkpointing_changes_no_gradient(recycler: Recycler, make_model: Make) -> None:
    batch = next(iter(recycler.reader(TEXTS, labels=LABELS[:, 0]))).model_inputs()
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    plain = add_adapters(recycler.reduce(make_model(AutoModelForSequenceClassification, **no_dropout)), 8).train()
    saving = copy.deepcopy(plain)
    saving.activation_checkpointing_enable({"use_reentrant": False})
    for model in (plain, saving):
        model(**batch).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None) == (not one.requires_grad), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


def test_adapters_are_copied_saved_and_merged_with_the_model(
    recycler: Recycler, make_model: Make, tmp_path: Path
) -> None:
    task = make_model(AutoModelForSequenceClassification)
    reduced = add_adapters(recycler.reduce(task), 8)
    shake(reduced)
    batch = next(iter(recycler.reader(TEXTS))).model_inputs()
    with torch.no_grad():
        want = reduced(**batch).logits
        torch.testing.assert_close(copy.deepcopy(reduced)(**batch).logits, want)
        reduced.save_pretrained(tmp_path / "saved")
        loaded = recycler.load_reduced(tmp_path / "saved")
        torch.testing.assert_close(loaded(**batch).logits, want)
        assert spec_of(loaded) == spec_of(reduced)
        full = reduced.merge_into(copy.deepcopy(task))
        inputs = {"input_ids": batch["token_ids"], "attention_mask": batch["attention_mask"]}
        torch.testing.assert_close(full(**inputs).logits, want, atol=1e-5, rtol=1e-5)
        assert {n for n, p in full.named_parameters() if p.requires_grad} == set(trained_names(reduced))


def test_several_tasks_over_one_pass_of_reading(recycler: Recycler, make_model: Make) -> None:
    task = make_model(AutoModelForSequenceClassification)
    alone = []
    for column in (0, 1):
        torch.manual_seed(column)
        model = add_adapters(recycler.reduce(task), 8)
        reader = recycler.reader(TEXTS, labels=LABELS, batch_size=8, shuffle=True, seed=5)
        alone.append(steps(model, reader, column))

    models = []
    for column in (0, 1):
        torch.manual_seed(column)
        models.append(add_adapters(recycler.reduce(task), 8) if not models else copy_sharing_frozen(models[0]))
        if column:
            fresh = add_adapters(recycler.reduce(task), 8)
            models[1].load_state_dict(fresh.state_dict())
    shared = {id(p) for p in models[0].parameters()} & {id(p) for p in models[1].parameters()}
    frozen = {id(p) for p in models[0].parameters() if not p.requires_grad}
    assert shared == frozen
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2) for m in models]
    together: list[list[float]] = [[], []]
    reader = recycler.reader(TEXTS, labels=LABELS, batch_size=8, shuffle=True, seed=5)
    for batch in reader:
        inputs = batch.model_inputs()
        labels = inputs.pop("labels")
        for column, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            loss = model(**inputs, labels=labels[:, column]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            together[column].append(loss.item())
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert reader.stats().documents == len(TEXTS)  # each was read once


def test_what_does_not_fit_is_refused(make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_model(AutoModelForSequenceClassification)
    reduced, path = reduce(task, LAYER), tmp_path / "adapters.safetensors"
    with pytest.raises(ModelError, match="no adapters"):
        save_adapters(reduced, path)
    for layers in ([2, 3], [5], []):
        with pytest.raises(LayerError, match=r"layers 3\.\.4"):
            add_adapters(reduced, 8, layers=layers)
    for options in ({"bottleneck": 0}, {"activation": "nothing"}):
        with pytest.raises(UsageError):
            add_adapters(reduced, **options)
    with pytest.raises(ModelError, match=r"no part 'nothing\.here'"):
        add_adapters(reduced, places=["nothing.here"])
    with pytest.raises(ModelError, match=r"no part 'bert\.nothing'"):
        add_adapters(reduced, also_train=["bert.nothing"])
    assert spec_of(reduced) is None
    add_adapters(reduced, 8, layers=[4])
    with pytest.raises(ModelError, match="already"):
        add_adapters(reduced, 8)
    save_adapters(reduced, path)

    full = add_adapters(make_model(AutoModelForSequenceClassification), 8)
    with pytest.raises(ModelError, match="other adapters"):
        load_adapters(full, path)
    with pytest.raises(ModelError, match="BertForSequenceClassification of bert, and this is BertForTokenClass"):
        load_adapters(make_model(AutoModelForTokenClassification), path)
    with pytest.raises(ModelError, match="classifier"):
        load_adapters(make_model(AutoModelForSequenceClassification, num_labels=5), path)
    save_adapters(full, path)
    with pytest.raises(LayerError, match="begins at 3"):
        load_adapters(reduce(make_model(AutoModelForSequenceClassification), LAYER), path)
    save_file({"a": torch.ones(1)}, path)
    for bad in (path, tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelError, match="no adapters that save_adapters wrote"):
            load_adapters(reduce(task, LAYER), bad)
    monkeypatch.setattr("actcache.models.training.adapters._PLACES", {})
    with pytest.raises(UnsupportedModelError, match="places="):
        add_adapters(make_model(AutoModel), 8)
    assert spec_of(add_adapters(make_model(AutoModel), 8, places=["output.dense"])).places == ("output.dense",)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_lora_on_the_upper_layers(recycler: Recycler, make_model: Make, tmp_path: Path) -> None:
    task = make_model(AutoModelForSequenceClassification)
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"], lora_dropout=0.0)
    model = peft.get_peft_model(recycler.reduce(task), config)
    layers = {int(name.split(".layer.")[1].split(".")[0]) for name, _ in model.named_parameters() if "lora_" in name}
    assert layers == {2, 3}  # of 0..3: the full model's own numbers
    losses = steps(model, recycler.reader(TEXTS, labels=LABELS, batch_size=8))
    assert losses[-1] < losses[0]
    shake(model)
    model.eval()
    batch = next(iter(recycler.reader(TEXTS))).model_inputs()
    inputs = {"input_ids": batch["token_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        want = model(**batch).logits
    model.save_pretrained(tmp_path / "lora")
    # PEFT itself puts what was trained on stored activations into the full model
    full = peft.PeftModel.from_pretrained(copy.deepcopy(task), tmp_path / "lora").eval()
    with torch.no_grad():
        torch.testing.assert_close(full(**inputs).logits, want, atol=1e-5, rtol=1e-5)
    inner = model.get_base_model()
    for refused in (lambda: inner.save_pretrained(tmp_path / "no"), lambda: inner.merge_into(copy.deepcopy(task))):
        with pytest.raises(ModelError, match="merge_and_unload"):
            refused()
    merged = model.merge_and_unload().merge_into(copy.deepcopy(task))
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, want, atol=1e-5, rtol=1e-5)

"""Reduced models merged into full ones, saved and loaded: the same outputs, and nothing made up."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    PreTrainedModel,
)

import actcache
from actcache import Recycler
from actcache.errors import LowerHalfMismatchError, ModelError, UsageError
from actcache.models import LowerHalf, base_model_of, family_of, load_reduced, merge, reduce
from tests.models.zoo import KINDS, documents, full_inputs, mask_of, padded

TOLERANCE = 1e-5
LAYER = 2
TEXTS = ["one", "two words", "and here are a few words more, so that lengths differ"]
CASES = [
    pytest.param(name, head, id=f"{name}-{head.__name__.removeprefix('AutoModelFor')}")
    for name, kind in KINDS.items()
    for head in (kind.heads[1:] if name in ("bert", "t5") else kind.heads[-1:])
]

Make = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("actcache")
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(model: PreTrainedModel) -> None:
    """Change all that trains."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def outputs(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        named = model(**inputs).items()
    return {name: value for name, value in named if isinstance(value, torch.Tensor)}


def compare(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], mask: torch.Tensor) -> None:
    assert set(got) == set(want)
    for name, value in got.items():
        pair = (value, want[name])
        if value.shape[:2] == mask.shape:
            pair = (value[mask.bool()], want[name][mask.bool()])
        torch.testing.assert_close(*pair, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_merged_and_loaded_models_are_the_reduced_one(name: str, head: Any, tmp_path: Path) -> None:
    kind = KINDS[name]
    full, ids = kind.make(head), documents()
    base = base_model_of(full)
    lower = LowerHalf(base, family_of(base), LAYER)
    rows, mask = lower.run(ids), mask_of(ids, "right")
    batch = {"activations": padded(rows, "right"), "token_ids": padded(ids, "right"), "attention_mask": mask}
    given = full_inputs(full, ids, "right")
    if full.config.is_encoder_decoder and "ForConditional" in type(full).__name__:
        batch["decoder_input_ids"] = given["decoder_input_ids"] = torch.tensor([[0, 7, 9]] * len(ids))
    reduced = reduce(full, LAYER)
    before = outputs(reduced, batch)
    train(reduced)
    want = outputs(reduced, batch)
    assert any(not torch.allclose(before[name], want[name], atol=1e-3) for name in want)
    assert reduced.merge_into(full) is full
    compare(outputs(full, given), want, mask)
    assert all(np.array_equal(a, b) for a, b in zip(lower.run(ids), rows, strict=True))  # a tied head was untied

    full.save_pretrained(tmp_path / "full")
    compare(outputs(type(full).from_pretrained(tmp_path / "full").eval(), given), want, mask)
    reduced.save_pretrained(tmp_path / "reduced")
    with pytest.raises(RuntimeError, match="mismatch"):
        type(full).from_pretrained(tmp_path / "reduced", config=full.config)
    loaded = load_reduced(tmp_path / "reduced")
    assert type(loaded) is type(reduced)
    compare(outputs(loaded, batch), want, mask)


def test_what_does_not_belong_together_is_not_merged(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    task = make_model(AutoModelForSequenceClassification)
    with Recycler(copy.deepcopy(task.base_model), tokenizer, layer=LAYER, store=tmp_path) as recycler:
        reduced = recycler.reduce(task)
    train(reduced)

    def refused(full: Any, error: type[Exception], match: str) -> None:
        before = copy.deepcopy(full.state_dict())
        with pytest.raises(error, match=match):
            reduced.merge_into(full)
        assert all(torch.equal(value, before[name]) for name, value in full.state_dict().items())

    refused(make_model(AutoModelForSequenceClassification, seed=1), LowerHalfMismatchError, "other weights")
    refused(make_model(AutoModelForMaskedLM), ModelError, "BertForSequenceClassification, not a BertForMaskedLM")
    deeper = make_model(AutoModelForSequenceClassification, num_hidden_layers=5)
    deeper.bert.embeddings.load_state_dict(task.bert.embeddings.state_dict())
    for mine, theirs in zip(deeper.bert.encoder.layer, task.bert.encoder.layer, strict=False):
        mine.load_state_dict(theirs.state_dict())
    refused(deeper, ModelError, r"layer\.4")
    wider = make_model(AutoModelForSequenceClassification, num_labels=7)
    wider.bert.load_state_dict(task.bert.state_dict())
    refused(wider, ModelError, "classifier")
    refused(reduced, ModelError, "not a Reduced")
    with pytest.raises(ModelError, match="no reduced model"):
        merge(task, task)


@pytest.fixture
def saved(make_model: Make, tokenizer: Any, tmp_path: Path) -> Iterator[tuple[Recycler, PreTrainedModel, Path]]:
    task = make_model(AutoModelForSequenceClassification)
    with actcache.open(tmp_path / "store") as store:
        recycler = Recycler(copy.deepcopy(task.base_model), tokenizer, layer=LAYER, store=store, dtype="float32")
        recycler.fill(TEXTS, progress=False)
        reduced = recycler.reduce(task)
        train(reduced)
        reduced.save_pretrained(tmp_path / "saved")
        yield recycler, reduced, tmp_path / "saved"


def test_saved_with_its_recipe_and_without_a_lower_half(saved: Any) -> None:
    recycler, reduced, folder = saved
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "reduced.json"}
    weights = (folder / "model.safetensors").stat().st_size
    assert weights < 4 * sum(p.numel() for p in reduced.parameters()) + 10_000
    loaded = recycler.load_reduced(folder)
    assert not loaded.training
    batch = next(iter(recycler.reader(TEXTS))).model_inputs()
    got, want = outputs(loaded, batch), outputs(reduced, batch)
    assert all(torch.equal(got[name], want[name]) for name in want)
    loaded.save_pretrained(folder / "again")  # it knows its recipe
    assert (folder / "again" / "reduced.json").read_text() == (folder / "reduced.json").read_text()


def test_transformers_cannot_make_up_the_lower_half(saved: Any) -> None:
    _, reduced, folder = saved
    for loads in (AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match=r"config\.json"):
            loads.from_pretrained(folder)
    with pytest.raises(RuntimeError, match="mismatch"):
        BertForSequenceClassification.from_pretrained(folder)  # of its default configuration
    with pytest.raises(ModelError, match="load_reduced"):
        type(reduced).from_pretrained(folder)
    with pytest.raises(ModelError, match="merge_into"):
        reduced.push_to_hub("somebody/something")
    with pytest.raises(UsageError, match="push_to_hub"):
        reduced.save_pretrained(folder, push_to_hub=True)


def test_loading_against_another_recipe_is_refused(
    saved: Any, make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    recycler, _, folder = saved
    with actcache.open(tmp_path / "others") as store:

        def other(seed: int = 0, **options: Any) -> Recycler:
            model = make_model(AutoModel, seed=seed) if seed else recycler.agreement.lower.base_model
            return Recycler(model, tokenizer, store=store, **{"layer": LAYER, "dtype": "float32", **options})

        with pytest.raises(LowerHalfMismatchError, match="weights"):
            other(seed=1).load_reduced(folder)
        with pytest.raises(LowerHalfMismatchError, match="layer: 2, here 3"):
            other(layer=3).load_reduced(folder)
        with pytest.raises(ModelError, match=r"dtype: 'float32', here 'float16'.*allow=\['dtype'\]"):
            other(dtype="float16").load_reduced(folder)
        other(dtype="float16").load_reduced(folder, allow=["dtype"])
        with pytest.raises(UsageError, match="not in weights"):
            other(seed=1).load_reduced(folder, allow=["weights"])
    unknown = reduce(make_model(AutoModelForSequenceClassification), LAYER)
    unknown.save_pretrained(tmp_path / "unknown")
    with pytest.raises(ModelError, match="without a recycler"):
        recycler.load_reduced(tmp_path / "unknown")


def test_damaged_folders_are_refused(saved: Any, tmp_path: Path) -> None:
    recycler, _, folder = saved
    with pytest.raises(ModelError, match="no reduced model"):
        recycler.load_reduced(tmp_path)
    description = folder / "reduced.json"
    good = json.loads(description.read_text())
    for change, match in (
        ({"version": 2}, "newer release"),
        ({"task_class": "os.system"}, "task_class="),
        ({"task_class": "AutoModel"}, "task_class="),
        ({"recipe": {"identity": 1}}, "not a recipe"),
        ({"tied": [["classifier.weight", "nothing.here"]]}, "cannot be loaded"),
        ({"layer": 9}, "layer 9"),
        ({"adapters": {"bottleneck": 2}}, "adapters"),
    ):
        description.write_text(json.dumps({**good, **change}))
        with pytest.raises(actcache.errors.ActcacheError, match=match):
            recycler.load_reduced(folder)
    description.write_text(json.dumps({name: value for name, value in good.items() if name != "config"}))
    with pytest.raises(ModelError, match="lacks config"):
        recycler.load_reduced(folder)
    description.write_text(json.dumps(good))
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be loaded"):
        recycler.load_reduced(folder)


def test_ties_of_the_upper_half_stay(make_model: Make, tmp_path: Path) -> None:
    reduced = reduce(make_model(AutoModelForMaskedLM), LAYER)
    assert reduced.cls.predictions.decoder.bias is reduced.cls.predictions.bias
    reduced.save_pretrained(tmp_path)
    loaded = load_reduced(tmp_path)
    assert loaded.cls.predictions.decoder.bias is loaded.cls.predictions.bias

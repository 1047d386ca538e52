"""What a reduced model was saved in, it is loaded in: each weight, the tables beside them, and so its numbers."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

from actcache.errors import ModelError, UsageError
from actcache.models import add_adapters, load_reduced, reduce
from actcache.models.vocabulary import load_pruned, prune_vocabulary
from tests.models.zoo import CLASSIFY, KINDS

LAYER = 2
HEADS = {"bert": "classifier", "llama": "score", "t5": "classification_head"}


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 90, (3, 9), generator=generator)
    ids[:, -1] = 2
    rows = torch.randn(3, 9, 32, generator=generator).to(dtype)
    return {"activations": rows, "token_ids": ids, "attention_mask": torch.ones_like(ids)}


def dtypes(model: torch.nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_model_is_loaded_as_it_was_saved(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Rotary frequencies, too, which are in no file: cast with the model, they are rounded."""
    reduced = reduce(KINDS[name].make(CLASSIFY), LAYER).to(dtype)
    reduced.save_pretrained(tmp_path / "saved")
    loaded = load_reduced(tmp_path / "saved", attn_implementation="eager")
    assert dtypes(loaded) == dtypes(reduced)
    assert loaded.dtype == loaded.config.dtype == dtype
    with torch.no_grad():
        assert torch.equal(loaded(**inputs()).logits, reduced(**inputs()).logits)
    loaded.save_pretrained(tmp_path / "again")
    texts = [(tmp_path / folder / "reduced.json").read_text() for folder in ("saved", "again")]
    assert texts[0] == texts[1]


def test_frequencies_that_were_not_rounded_stay_exact(tmp_path: Path) -> None:
    """As transformers loads a model in bfloat16: its frequencies are in float32."""
    KINDS["llama"].make(CLASSIFY).to(torch.bfloat16).save_pretrained(tmp_path / "full")
    full = KINDS["llama"].make(CLASSIFY).from_pretrained(tmp_path / "full")
    reduced = reduce(full, LAYER)
    assert torch.float32 in dtypes(reduced).values()
    reduced.save_pretrained(tmp_path / "saved")
    loaded = load_reduced(tmp_path / "saved")
    assert dtypes(loaded) == dtypes(reduced)
    assert torch.equal(loaded(**inputs()).logits, reduced(**inputs()).logits)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_weights_of_several_dtypes(name: str, tmp_path: Path) -> None:
    reduced = reduce(KINDS[name].make(CLASSIFY).to(torch.bfloat16), LAYER)
    reduced.get_submodule(HEADS[name]).float()
    reduced.save_pretrained(tmp_path)
    loaded = load_reduced(tmp_path, attn_implementation="eager")
    assert dtypes(loaded) == dtypes(reduced)
    assert set(dtypes(loaded).values()) == {torch.bfloat16, torch.float32}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loaded(**inputs()).logits, reduced(**inputs()).logits)


def test_a_stale_configuration_does_not_decide(tmp_path: Path) -> None:
    """Loaded in bfloat16, trained in float32: no bit of it is lost."""
    task = KINDS["bert"].make(CLASSIFY)
    task.config.dtype = torch.bfloat16
    reduced = reduce(task, LAYER)
    reduced.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "reduced.json").read_text())["config"]["dtype"] == "float32"
    for written in ("bfloat16", None):  # as earlier releases wrote it
        description = json.loads((tmp_path / "reduced.json").read_text())
        description["config"]["dtype"] = written
        description.pop("buffers", None)
        (tmp_path / "reduced.json").write_text(json.dumps(description))
        loaded = load_reduced(tmp_path, attn_implementation="eager")
        assert dtypes(loaded) == dtypes(reduced)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), reduced.parameters(), strict=True))


def test_another_dtype_can_be_asked_for(tmp_path: Path) -> None:
    reduced = reduce(KINDS["bert"].make(CLASSIFY).to(torch.bfloat16), LAYER)
    reduced.classifier.float()
    reduced.save_pretrained(tmp_path)
    for asked, dtype in ((torch.float32, torch.float32), ("float16", torch.float16)):
        loaded = load_reduced(tmp_path, dtype=asked)
        assert set(dtypes(loaded).values()) == {dtype}
        want = copy.deepcopy(reduced).to(dtype)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), want.parameters(), strict=True))
    assert dtypes(load_reduced(tmp_path, dtype="auto")) == dtypes(reduced)
    for wrong in ("half a float", torch.int8, 16, None):
        with pytest.raises(UsageError, match="auto"):
            load_reduced(tmp_path, dtype=wrong)  # type: ignore[arg-type]


def test_adapters_ties_and_names_of_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = KINDS["bert"].make(CLASSIFY, id2label={0: "no", 1: "yes"}, problem_type="single_label_classification")
    reduced = add_adapters(reduce(task.to(torch.bfloat16), LAYER), 4)
    reduced.save_pretrained(tmp_path / "adapters")
    loaded = load_reduced(tmp_path / "adapters", attn_implementation="eager")
    assert dtypes(loaded) == dtypes(reduced)
    assert loaded.config.id2label == {0: "no", 1: "yes"}
    assert loaded.config.problem_type == "single_label_classification"
    assert loaded.config._attn_implementation == "eager"
    caplog.set_level(logging.ERROR)
    masked = reduce(KINDS["bert"].make(AutoModelForMaskedLM).to(torch.float16), LAYER)
    masked.save_pretrained(tmp_path / "masked")
    again = load_reduced(tmp_path / "masked")
    assert dtypes(again) == dtypes(masked)
    assert again.cls.predictions.decoder.bias is again.cls.predictions.bias


def test_a_pruned_model(tmp_path: Path) -> None:
    task = KINDS["bert"].make(CLASSIFY).to(torch.bfloat16)
    prune_vocabulary(task, range(40)).model.save_pretrained(tmp_path)
    loaded = load_pruned(type(task), tmp_path).model
    assert {dtype for dtype in dtypes(loaded).values() if dtype.is_floating_point} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore")  # torch's own, of its quantization
def test_packed_weights_are_refused_by_name(tmp_path: Path) -> None:
    task: Any = torch.ao.quantization.quantize_dynamic(
        KINDS["bert"].make(CLASSIFY), {torch.nn.Linear}, dtype=torch.qint8
    )
    reduced = reduce(task, LAYER)
    with pytest.raises(ModelError, match=r"encoder\.layer\.2.*quantized"):
        reduced.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*"))

"""torchao's and bitsandbytes' quantized weights are part of the identity. Run by ``make test-quantized``.

The libraries are not in the everyday environment: transformers imports torchao into every process where it is there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from actcache.errors import ModelError, UnsupportedModelError
from actcache.models import family_of, lower_digest
from actcache.models.recycler import Recycler
from tests.models.test_identity import word_tokenizer
from tests.models.zoo import KINDS

pytestmark = pytest.mark.filterwarnings("ignore")


def model_of(factor: float) -> PreTrainedModel:
    model = KINDS["bert"].make(AutoModel, hidden_size=64, intermediate_size=128, max_position_embeddings=64)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= factor
    return model


def torchao_int8(factor: float) -> PreTrainedModel:
    quantization: Any = pytest.importorskip("torchao.quantization")
    model = model_of(factor)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def torchao_dynamic(factor: float) -> PreTrainedModel:
    quantization: Any = pytest.importorskip("torchao.quantization")
    model = model_of(factor)
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model


def _replaced(model: PreTrainedModel, make: Callable[[nn.Linear], nn.Module]) -> PreTrainedModel:
    for layer in model.encoder.layer:
        layer.output.dense = make(layer.output.dense).to("cpu").eval()
    return model


def bnb_4bit(factor: float) -> PreTrainedModel:
    bnb: Any = pytest.importorskip("bitsandbytes")

    def make(old: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, compute_dtype=torch.float32, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        new.bias = old.bias
        return new

    return _replaced(model_of(factor), make)


def bnb_8bit(factor: float) -> PreTrainedModel:
    bnb: Any = pytest.importorskip("bitsandbytes")

    def make(old: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
        new.bias = old.bias
        return new

    return _replaced(model_of(factor), make)


def digest(model: PreTrainedModel) -> str:
    return lower_digest(model, family_of(model), 2)


@pytest.mark.parametrize("make", [torchao_int8, torchao_dynamic, bnb_8bit])
def test_quantized_weights_count(make: Callable[[float], PreTrainedModel]) -> None:
    digests = [digest(make(factor)) for factor in (1.0, 1.0, 1.3)]
    assert digests[0] == digests[1] != digests[2]
    used = make(1.0)
    used(torch.arange(5)[None] + 3)
    assert digest(used) == digests[0]


@pytest.mark.parametrize("make", [torchao_int8, bnb_8bit])
def test_quantized_models_have_spaces_of_their_own(make: Callable[[float], PreTrainedModel], tmp_path: Path) -> None:
    spaces = set()
    for factor in (1.0, 1.3):
        with Recycler(make(factor), word_tokenizer(), layer=2, store=tmp_path / "store") as recycler:
            assert recycler.fill(["one text", "another"], progress=False).computed == 2
            spaces.add(recycler.recipe.fingerprint)
    assert len(spaces) == 2


def test_quantized_activations_are_refused(tmp_path: Path) -> None:
    """Rounding to eight bits makes a hundredth of the last digits that a batch of another shape changes."""
    with (
        Recycler(torchao_dynamic(1.0), word_tokenizer(), layer=2, store=tmp_path / "store") as recycler,
        pytest.raises(UnsupportedModelError, match="quantized"),
    ):
        recycler.fill(["one text", "another"], progress=False)


def test_weights_that_change_when_they_are_saved_are_refused(tmp_path: Path) -> None:
    model, ids = bnb_4bit(1.0), torch.arange(5)[None] + 3
    with torch.inference_mode():
        before = model(ids).last_hidden_state
        for _ in range(2):
            with pytest.raises(ModelError, match="4-bit weight of bitsandbytes on the CPU"):
                Recycler(model, word_tokenizer(), layer=2, store=tmp_path / "store")
        assert torch.equal(model(ids).last_hidden_state, before)  # it was not looked at
        model.state_dict()
        changed = model(ids).last_hidden_state
    assert not torch.allclose(changed, before, atol=1e-3)  # where this fails, the refusal can go

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

from actcache.models import family_of, lower_digest
from actcache.recycler import Recycler
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


@pytest.mark.parametrize("make", [torchao_int8, torchao_dynamic, bnb_4bit, bnb_8bit])
def test_quantized_weights_count(make: Callable[[float], PreTrainedModel], tmp_path: Path) -> None:
    digests = [lower_digest(model, family_of(model), 2) for model in (make(1.0), make(1.0), make(1.3))]
    assert digests[0] == digests[1] != digests[2]
    used = make(1.0)
    used(torch.arange(5)[None] + 3)
    assert lower_digest(used, family_of(used), 2) == digests[0]
    spaces = []
    for factor in (1.0, 1.3):
        model = make(factor)
        with Recycler(model, word_tokenizer(), layer=2, store=tmp_path / "store") as recycler:
            report = recycler.fill(["one text", "another"], progress=False)
            spaces.append(recycler.recipe.fingerprint)
            assert report.computed == 2
    assert len(set(spaces)) == 2

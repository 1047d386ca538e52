"""Models that bring code of their own: loaded by an explicit word, and told apart by their source."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, dynamic_module_utils

from actcache.errors import ModelError, UsageError
from actcache.models import family_of
from actcache.models.recycler import Recycler
from tests.models.test_identity import word_tokenizer

CONFIGURATION = """
from transformers import PretrainedConfig

class TinyConfig(PretrainedConfig):
    model_type = "{type}"

    def __init__(self, vocab_size=99, hidden_size=32, num_hidden_layers=4, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**kwargs)
"""
LAYER = """
import torch

class Layer(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)

    def forward(self, hidden):
        return hidden + {scale} * torch.tanh(self.linear(hidden))
"""
MODEL = """
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from .configuration_tiny import TinyConfig
from .layer_tiny import Layer

class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "tiny"

    def __init__(self, config):
        super().__init__(config)
        self.words = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = torch.nn.ModuleList(Layer(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.words(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return BaseModelOutput(last_hidden_state=hidden)
"""
NAMED = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}
TEXTS = ["some words", "of two lengths, and more"]

_SHAPES = {"weight": (32, 32), "bias": (32,)}


@pytest.fixture(autouse=True)
def _modules_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers copy code to a folder of the test's."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()


def folder_with_code(path: Path, model_type: str = "tiny-of-a-test", scale: str = "1.0") -> Path:
    """Write a model's folder: configuration, code in three files, weights that are always the same, and tokenizer."""
    path.mkdir()
    (path / "configuration_tiny.py").write_text(CONFIGURATION.format(type=model_type))
    (path / "layer_tiny.py").write_text(LAYER.format(scale=scale))
    (path / "modeling_tiny.py").write_text(MODEL)
    (path / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": NAMED}))
    generator = torch.Generator().manual_seed(0)
    state = {
        "words.weight": torch.randn(99, 32, generator=generator),
        **{
            f"layers.{i}.linear.{name}": torch.randn(shape, generator=generator)
            for i in range(4)
            for name, shape in _SHAPES.items()
        },
    }
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    word_tokenizer().save_pretrained(path)
    return path


def test_code_that_came_with_a_model_is_run_by_an_explicit_word(tmp_path: Path) -> None:
    folder = folder_with_code(tmp_path / "model")
    with pytest.raises(ModelError, match=r"brings code of its own.*trust_remote_code=True"):
        Recycler.from_pretrained(folder, layer=2, store="ram:no", device="cpu")
    assert not any(name.startswith("transformers_modules.model") for name in sys.modules)
    with pytest.raises(UsageError, match="trust_remote_code"):
        Recycler.from_pretrained(folder, layer=2, store="ram:no", device="cpu", trust_remote_code="yes")
    with Recycler.from_pretrained(
        folder, layer=2, store="ram:yes", device="cpu", dtype="float32", trust_remote_code=True
    ) as recycler:
        recycler.fill(TEXTS, progress=False)
        model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        reduced = recycler.reduce(model)
        for batch in recycler.reader(TEXTS):
            got = reduced(**batch.model_inputs()).last_hidden_state
            for i, where in enumerate(batch.documents.tolist()):
                ids = word_tokenizer()(TEXTS[where], return_tensors="pt").input_ids
                torch.testing.assert_close(got[i, : ids.shape[1]], model(ids).last_hidden_state[0])


def test_another_source_is_another_space(tmp_path: Path) -> None:
    """Weights and configuration are alike, and the layer is defined in a file beside the model's."""
    recipes = []
    for name, scale in (("one", "1.0"), ("same", "1.0"), ("other", "0.5")):
        folder = folder_with_code(tmp_path / name, scale=scale)
        with Recycler.from_pretrained(
            folder, layer=2, store="ram:code", device="cpu", trust_remote_code=True
        ) as recycler:
            recipes.append(recycler.recipe)
    assert recipes[0].fingerprint == recipes[1].fingerprint
    assert set(recipes[0].differences(recipes[2])) == {"config.code"}


def test_a_class_that_has_the_type_of_another_is_not_taken_for_it(tmp_path: Path) -> None:
    """Its type says BERT, of which the table knows where layers are, and which source is transformers' own."""
    folder = folder_with_code(tmp_path / "model", model_type="bert")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__name__ == "TinyModel"
    family = family_of(model)
    assert family.layers == "layers"
    assert family.code is not None

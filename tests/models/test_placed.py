"""Models that are spread over devices, wrapped, or patched: rows are right, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from actcache.errors import ActcacheError, CanaryError, DocumentError, ModelError, UnsupportedModelError
from actcache.models.recycler import Recycler
from actcache.store.store import Store, open_store
from tests.models.test_any import make
from tests.models.test_identity import word_tokenizer
from tests.models.zoo import KINDS

TEXTS = ["a few words", "of", "three lengths, all of them short"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def store() -> Iterator[Store]:
    with open_store("ram:placed") as opened:
        yield opened


def recycler_of(model: PreTrainedModel, store: Store, **options: Any) -> Recycler:
    return Recycler(model, word_tokenizer(), layer=2, store=store, dtype="float32", **options)


def check_rows(recycler: Recycler, plain: PreTrainedModel) -> None:
    """Compare what a recycler stores with the hidden states of a model that nobody has moved or wrapped."""
    recycler.fill(TEXTS, progress=False)
    for text, entry in zip(TEXTS, recycler.space.get(recycler.keys(TEXTS)), strict=True):
        ids = word_tokenizer()(text, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = plain(ids, output_hidden_states=True).hidden_states[2][0]
        np.testing.assert_allclose(entry.activations, expected, rtol=1e-5, atol=1e-5)


def on_disk(model: PreTrainedModel, layers: range, folder: Path) -> PreTrainedModel:
    """Leave the weights of some layers on a disk, as ``device_map="auto"`` does where memory is short."""
    places = {name: "cpu" for name, module in model.named_children() if name != "layers"}
    places |= {f"layers.{i}": "disk" if i in layers else "cpu" for i in range(4)}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)
    return model


@pytest.mark.parametrize("kind", ["bert", "gpt_neox"])
def test_hooks_that_move_tensors_change_no_rows_and_no_identity(kind: str, store: Store) -> None:
    def of_kind() -> PreTrainedModel:
        return KINDS["bert"].make(AutoModel) if kind == "bert" else make(AutoModel, kind)

    model = of_kind()
    attach_align_device_hook_on_blocks(model, execution_device={"": "cpu"})
    assert any("forward" in vars(module) for module in model.modules())
    with recycler_of(model, store) as spread, recycler_of(of_kind(), store) as plain:
        assert spread.recipe.fingerprint == plain.recipe.fingerprint
        check_rows(spread, of_kind())
        with pytest.raises(ModelError, match=r"spread over devices.*load the task model on one device"):
            spread.reduce(model)
        spread.reduce(of_kind())


def test_weights_on_a_disk_are_refused_below_and_stay_there_above(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"weight .*layers.* meta device.*device_map.*into memory"):
        recycler_of(on_disk(make(AutoModel, "gpt_neox"), range(2), tmp_path / "below"), store)
    with pytest.raises(ModelError, match=r"weight .*layers.* meta device"):  # but for layer 1
        recycler_of(on_disk(make(AutoModel, "gpt_neox"), range(1, 2), tmp_path / "second"), store)
    offloaded = make(AutoModel, "gpt_neox")
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match="meta device"):
        recycler_of(offloaded, store)
    above = on_disk(make(AutoModel, "gpt_neox"), range(2, 4), tmp_path / "above")
    with recycler_of(above, store) as recycler:
        check_rows(recycler, make(AutoModel, "gpt_neox"))
        assert above.layers[3].mlp.dense_h_to_4h.weight.is_meta


def test_a_forward_that_was_replaced_on_the_model_is_refused() -> None:
    model = make(AutoModelForCausalLM, "gpt_neox")
    original = model.forward
    with open_store("ram:replaced") as store, recycler_of(model, store) as recycler:
        model.forward = lambda *args, **kwargs: original(*args, **kwargs)
        with pytest.raises(ModelError, match=r"forward of this GPTNeoXForCausalLM was replaced"):
            recycler.reduce(model)
        del model.forward
        recycler.reduce(model)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_adapters_of_peft_in_the_lower_half_are_part_of_it(store: Store) -> None:
    def adapted() -> Any:
        model = make(AutoModel, "gpt_neox")
        return get_peft_model(model, LoraConfig(target_modules=["query_key_value"], init_lora_weights=False)).eval()

    torch.manual_seed(1)
    wrapped = adapted()
    with pytest.raises(UnsupportedModelError, match=r"PeftModel is no transformers model.*get_base_model"):
        recycler_of(wrapped, store)
    with (
        recycler_of(wrapped.get_base_model(), store) as recycler,
        recycler_of(make(AutoModel, "gpt_neox"), store) as bare,
    ):
        assert recycler.recipe.fingerprint != bare.recipe.fingerprint
        check_rows(recycler, wrapped)
        with pytest.raises(CanaryError), wrapped.disable_adapter():  # which changes no weight
            recycler.reader(TEXTS)
        layer = wrapped.get_base_model().layers
        with torch.no_grad():
            layer[3].attention.query_key_value.lora_A["default"].weight.add_(0.1)
        with recycler_of(wrapped.get_base_model(), store) as above:
            assert above.recipe.fingerprint == recycler.recipe.fingerprint
        with torch.no_grad():
            layer[0].attention.query_key_value.lora_A["default"].weight.add_(0.1)
        with recycler_of(wrapped.get_base_model(), store) as below:
            assert below.recipe.fingerprint != recycler.recipe.fingerprint


def test_dynamic_rope_of_a_type_in_no_table_is_held_off_by_the_limit_on_length(store: Store) -> None:
    """Beyond the positions that it was trained for, it computes a document by the longest of its batch."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with recycler_of(make(AutoModel, "mistral", rope_parameters=rope), store) as recycler:
        check_rows(recycler, make(AutoModel, "mistral", rope_parameters=rope))
        assert recycler.recipe.max_length == 64
        with pytest.raises(DocumentError):
            recycler.fill(["x" * 65], progress=False)
    with pytest.raises(ActcacheError, match="64"):
        recycler_of(make(AutoModel, "mistral", rope_parameters=rope), store, max_length=65)


class Counting(nn.Module):
    """A layer that counts its calls in a buffer, and adds what it counted."""

    def __init__(self, layer: nn.Module, share: float) -> None:
        super().__init__()
        self.layer, self.share = layer, share
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.layer(*args, **kwargs) + self.share * self.calls


@pytest.mark.parametrize(("share", "says"), [(0.1, "computed twice"), (0.0, "buffer calls of Counting from 0 to")])
def test_a_buffer_that_running_changes_is_caught(share: float, says: str, store: Store) -> None:
    model = make(AutoModel, "gpt_neox")
    model.layers[0] = Counting(model.layers[0], share)
    with pytest.raises(UnsupportedModelError, match=says):
        recycler_of(model, store)

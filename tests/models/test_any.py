"""Models that no table names: proved by running, recorded, read, and reduced, equal to the full model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from actcache.models.recycler import Recycler
from tests.models.test_identity import word_tokenizer

#: Sizes that every text model is made with; what a configuration does not know it keeps and nobody reads.
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
TEXTS = ["a few words", "of", "different lengths, and some padding", "in a batch"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(head: Any, model_type: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = head.from_config(AutoConfig.for_model(model_type, **{**SIZES, **options}))
    return model.eval()


@pytest.mark.parametrize(
    ("model_type", "head"),
    [
        ("gpt_neox", AutoModelForCausalLM),
        ("mistral", AutoModelForCausalLM),
        ("olmo", AutoModelForCausalLM),
        ("phi", AutoModelForCausalLM),
        ("roformer", AutoModelForMaskedLM),
        ("fnet", AutoModelForMaskedLM),
    ],
)
def test_a_model_that_no_table_names_from_fill_to_gradients(tmp_path: Path, model_type: str, head: Any) -> None:
    full = make(head, model_type, is_decoder=False) if head is AutoModelForMaskedLM else make(head, model_type)
    tokenizer = word_tokenizer()
    with Recycler(full, tokenizer, layer=2, store=f"hdf5:{tmp_path / 'store'}", dtype="float32") as recycler:
        recycler.fill(TEXTS, progress=False)
        reduced = recycler.reduce(full)
        alone_only = reduced.actcache_family.equal_lengths
        assert alone_only == (model_type == "fnet")
        parameters = [name for name, p in reduced.named_parameters() if p.requires_grad and ".3." in name]
        assert parameters
        for batch in recycler.reader(TEXTS, batch_size=1 if alone_only else 4):
            got = reduced(**batch.model_inputs()).logits
            got.sum().backward()
            for i, where in enumerate(batch.documents.tolist()):
                ids = tokenizer(TEXTS[where], return_tensors="pt").input_ids
                want = full(input_ids=ids).logits
                torch.testing.assert_close(got[i, : ids.shape[1]], want[0], atol=1e-5, rtol=1e-5)
        assert all(reduced.get_parameter(name).grad is not None for name in parameters)


def test_a_space_is_found_again_and_another_weight_is_another_space(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    first = make(AutoModel, "gpt_neox")
    with Recycler(first, tokenizer, layer=2, store=f"hdf5:{tmp_path / 'store'}") as recycler:
        fingerprint = recycler.recipe.fingerprint
    task = make(AutoModelForCausalLM, "gpt_neox")
    task.gpt_neox.load_state_dict(first.state_dict())
    with Recycler(task, tokenizer, layer=2, store=f"hdf5:{tmp_path / 'store'}") as recycler:
        assert recycler.recipe.fingerprint == fingerprint
    for parameter, same in (
        (task.gpt_neox.layers[3].mlp.dense_h_to_4h.bias, True),
        (task.gpt_neox.layers[1].mlp.dense_h_to_4h.bias, False),
    ):
        with torch.no_grad():
            parameter.add_(1.0)
        with Recycler(task, tokenizer, layer=2, store=f"hdf5:{tmp_path / 'store'}") as recycler:
            assert (recycler.recipe.fingerprint == fingerprint) is same

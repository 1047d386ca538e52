"""What a proof catches: each of these models passes a proof of short documents alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BigBirdConfig, BigBirdModel

from actcache.errors import UnsupportedModelError
from actcache.models import LowerHalf, family_of, lower_digest, proof, reduce
from actcache.models.families import Family
from actcache.models.recycler import Recycler
from actcache.models.recyclers import Recyclers
from tests.models.test_any import make
from tests.models.test_identity import word_tokenizer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lower_of(model: Any, layer: int = 2) -> LowerHalf:
    return LowerHalf(model, family_of(model), layer)


def short_documents_agree(model: Any) -> bool:
    lower = lower_of(model)
    documents = [np.arange(5, 5 + n) for n in (5, 11, 3, 8)]
    alone = [lower.run([one])[0] for one in documents]
    return all(
        np.linalg.norm(a - b) < 1e-6 * np.linalg.norm(a) for a, b in zip(alone, lower.run(documents), strict=True)
    )


def test_longrope_is_caught_by_a_document_at_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Family, "check_alone", lambda self, config: None)  # which knows it by its name
    rope = {"rope_type": "longrope", "long_factor": [4.0] * 4, "short_factor": [1.0] * 4, "rope_theta": 1e4}
    model = make(AutoModel, "mistral", rope_parameters={**rope, "original_max_position_embeddings": 16})
    assert short_documents_agree(model)
    with pytest.raises(UnsupportedModelError, match=r"64 tokens beside one of 5.*max_length"):
        proof.of_rows(lower_of(model))
    assert proof.of_rows(lower_of(model), longest=16).equal_lengths is False  # below the length where it changes


def test_steering_that_looks_at_the_length_is_caught(tmp_path: Path) -> None:
    model = make(AutoModel, "gpt_neox")

    def steer(layer: nn.Module, args: Any, output: Any) -> Any:
        return output + 1.0 if output.shape[1] > 20 else output

    model.layers[0].register_forward_hook(steer)
    assert short_documents_agree(model)
    with pytest.raises(UnsupportedModelError, match="no function of a document"):
        proof.of_rows(lower_of(model))
    with pytest.raises(UnsupportedModelError, match="no function of a document"):
        Recycler(model, word_tokenizer(), layer=2, store=f"hdf5:{tmp_path / 'store'}")


class Capacity:
    """Tokens beyond so many of a batch get nothing, as from experts with room for a few."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> Any:
        flat = output.reshape(-1, output.shape[-1]).clone()
        flat[self.room :] = 0
        return flat.reshape(output.shape)


def test_room_for_so_many_tokens_is_caught_by_many_documents() -> None:
    model = make(AutoModel, "mistral")
    model.layers[0].register_forward_hook(Capacity(400))
    assert short_documents_agree(model)
    with pytest.raises(UnsupportedModelError, match=r"a document among 96.*experts"):
        proof.of_rows(lower_of(model))


def test_room_that_only_a_real_batch_uses_up_is_caught_before_anything_is_stored(tmp_path: Path) -> None:
    model = make(AutoModel, "mistral")
    model.layers[0].register_forward_hook(Capacity(2000))
    texts = [f"text {i:06}" for i in range(400)]  # of eleven tokens
    with Recycler(model, word_tokenizer(), layer=2, store=f"hdf5:{tmp_path / 'store'}") as recycler:
        with pytest.raises(UnsupportedModelError, match="looks at its batch"):
            recycler.fill(texts, progress=False)
        assert len(recycler.space) == 0


def test_a_model_that_fails_on_padded_batches_is_refused_by_name() -> None:
    model = make(AutoModel, "gpt_neox")

    def fail(layer: nn.Module, args: Any, output: Any) -> None:
        if output.shape[0] > 2:
            raise RuntimeError("the size of tensor a must match the size of tensor b")

    model.layers[0].register_forward_hook(fail)
    with pytest.raises(UnsupportedModelError, match=r"does not run on documents alone.*size of tensor a"):
        proof.of_rows(lower_of(model))


def test_block_sparse_attention_is_refused_and_the_model_left_as_it_was() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    model = BigBirdModel(BigBirdConfig(vocab_size=99, max_position_embeddings=512, block_size=16, **sizes)).eval()
    assert model.attention_type == "block_sparse"
    kinds = [type(layer.attention.self) for layer in model.encoder.layer]
    with pytest.raises(UnsupportedModelError, match=r"512 tokens beside one of 5"):
        proof.of_rows(lower_of(model))
    with pytest.raises(UnsupportedModelError, match="attention_type from 'block_sparse' to 'original_full'"):
        proof.of_rows(lower_of(model), longest=11)
    assert model.attention_type == "block_sparse"
    assert [type(layer.attention.self) for layer in model.encoder.layer] == kinds
    full = BigBirdModel(
        BigBirdConfig(vocab_size=99, max_position_embeddings=64, attention_type="original_full", **sizes)
    )
    proof.of_rows(lower_of(full.eval()))


def test_lsh_attention_is_caught_where_documents_are_long_enough_for_it() -> None:
    options = {"axial_pos_embds": False, "attn_layers": ["lsh"] * 4, "num_buckets": 4, "hash_seed": 1}
    options |= {"lsh_attn_chunk_length": 16, "attention_head_size": 8, "feed_forward_size": 48, "is_decoder": False}
    model = make(AutoModel, "reformer", **options)
    assert short_documents_agree(model)
    with pytest.raises(UnsupportedModelError, match="Reformer"):
        proof.of_rows(lower_of(model))
    with pytest.raises(UnsupportedModelError, match="cannot be replayed"):
        reduce(model, 2)


def test_what_a_hook_reads_of_the_upper_half_is_in_the_digest() -> None:
    model = make(AutoModel, "gpt_neox")
    beyond: Any = model.layers[3].mlp.dense_h_to_4h.bias

    def add(layer: nn.Module, args: Any, output: Any) -> Any:
        return output + beyond.mean()

    model.layers[0].register_forward_hook(add)
    proof.of_rows(lower_of(model))
    digest = lower_digest(model, family_of(model), 2)
    with torch.no_grad():
        beyond.add_(1.0)
    assert lower_digest(model, family_of(model), 2) != digest


def test_a_proof_leaves_weights_modes_and_gradients_alone() -> None:
    model = make(AutoModelForCausalLM, "phi").train()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    model.eval()
    proof.of_rows(lower_of(model.model))
    reduce(model, 2)
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is None
        assert parameter.requires_grad


def test_a_proof_is_remembered_but_not_of_a_model_with_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    original = proof._rows_proved
    monkeypatch.setattr(proof, "_proofs", {})
    monkeypatch.setattr(proof, "_rows_proved", lambda *args: runs.append(1) or original(*args))
    model = make(AutoModel, "olmo")
    proof.of_rows(lower_of(model))
    proof.of_rows(lower_of(make(AutoModel, "olmo", seed=1)))
    monkeypatch.setattr(proof, "_proofs", {})  # another process, which finds it in the cache folder
    proof.of_rows(lower_of(model))
    assert len(runs) == 1
    proof.of_rows(lower_of(model, 1))
    model.layers[0].register_forward_hook(lambda *args: None)
    proof.of_rows(lower_of(model))
    proof.of_rows(lower_of(model))
    assert len(runs) == 4


def test_a_loss_that_reads_the_lower_half_keeps_it_or_is_refused() -> None:
    """All outputs of a reduced model without lower weights are the full one's, but its loss is not."""
    cls: Any = type(make(AutoModelForCausalLM, "olmo"))

    class Regularized(cls):  # type: ignore[misc]
        what = "embed_tokens.weight"

        def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **more: Any) -> Any:
            output = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **more)
            if output.loss is not None:
                output.loss = output.loss + self.model.get_parameter(self.what).square().mean()
            return output

    model = make(AutoModelForCausalLM, "olmo")
    model.__class__ = Regularized
    reduced = reduce(model, 2)
    assert "embed_tokens" in reduced.actcache_family.shared
    ids = torch.tensor([[5, 6, 7, 8]])
    rows = torch.from_numpy(lower_of(model.model).run([ids[0].numpy()])[0])[None]
    got = reduced(activations=rows, token_ids=ids, labels=ids).loss
    torch.testing.assert_close(got, model(input_ids=ids, labels=ids).loss)
    Regularized.what = "layers.0.mlp.down_proj.weight"
    model.config.initializer_range = 0.1  # or the proof would be remembered
    with pytest.raises(UnsupportedModelError, match="the loss: AttributeError"):
        reduce(model, 2)


def test_gradients_that_depend_on_what_lies_below_are_refused() -> None:
    """The last layer learns by half where nothing below it learns: losses are alike, gradients are not."""
    model = make(AutoModelForCausalLM, "olmo")
    layer: Any = model.model.layers[2]

    def halve(module: nn.Module, args: Any, output: Any) -> Any:
        return output if args[0].requires_grad else 0.5 * output + 0.5 * output.detach()

    reduce(model, 2)
    layer.register_forward_hook(halve)
    with pytest.raises(UnsupportedModelError, match=r"gradient of model\.layers\.2"):
        reduce(model, 2)


def test_several_sites_are_proved_by_the_same_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "_proofs", {})
    monkeypatch.setattr(proof, "_key", lambda what, model, where, more: f"several {where}")
    monkeypatch.setattr(proof.memo, "read", lambda name: {})
    proved, forwards = [], []
    original = proof._rows_proved
    monkeypatch.setattr(proof, "_rows_proved", lambda *args: proved.append(args[2]) or original(*args))
    model = make(AutoModel, "olmo")
    handle = model.layers[0].register_forward_pre_hook(lambda *args: forwards.append(1))
    with Recyclers(model, word_tokenizer(), layers=[0, 2, "last"], sites=["layers.1.mlp"], store="ram:several"):
        assert [len(sites) for sites in proved] == [4]
    together = len(forwards)
    forwards.clear()
    monkeypatch.setattr(proof, "_proofs", {})
    for layer in (2, "last"):
        with Recycler(model, word_tokenizer(), layer=layer, store="ram:one by one"):
            pass
    handle.remove()
    assert together < len(forwards)

"""Reduced models of many families under autocast, checkpointing, copies, DDP and ``torch.compile``; what is shared."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, PreTrainedModel

from actcache.errors import ModelError, UnsupportedModelError
from actcache.models import LowerHalf, base_model_of, family_of, reduce
from tests.models.zoo import (
    ANSWER,
    CAUSAL,
    CLASSIFY,
    DIFFERENT,
    KINDS,
    MASKED,
    TOKENS,
    documents,
    labels_for,
    mask_of,
    padded,
)

LAYER = 2
SOME = DIFFERENT
CHECKPOINTED = tuple(name for name in SOME if name != "mpnet")  # which transformers does not checkpoint


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prepared(
    name: str, head: Any = TOKENS, compute_dtype: str | None = None, layer: int = LAYER
) -> tuple[PreTrainedModel, Any, Any]:
    """A task model, its reduced model, and a batch with labels."""
    kind = KINDS[name]
    if head not in kind.heads:
        head = CLASSIFY
    model, ids = kind.make(head, kind.attention[0]), documents()
    base = base_model_of(model)
    rows = LowerHalf(base, family_of(base), layer, compute_dtype).run(ids)
    mask = mask_of(ids, "right")
    batch = {"activations": padded(rows, "right"), "token_ids": padded(ids, "right"), "attention_mask": mask}
    return model, reduce(model, layer), {**batch, **labels_for(model, mask)}


def gradients(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", SOME)
def test_autocast_gives_what_the_full_model_gives_under_it(name: str, dtype: torch.dtype) -> None:
    model, reduced, batch = prepared(name, compute_dtype=str(dtype).removeprefix("torch."))
    inputs = {"input_ids": batch["token_ids"], "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    exact = model(**inputs)
    with torch.autocast("cpu", dtype=dtype):
        want, got = model(**inputs), reduced(**batch)
    assert got.logits.dtype == want.logits.dtype
    valid = batch["attention_mask"].bool() if got.logits.ndim == 3 else slice(None)
    rounding = (want.logits - exact.logits)[valid].abs().max()
    assert rounding > 0  # autocast does something
    assert (got.logits - want.logits)[valid].abs().max() <= 2 * rounding
    got.loss.backward()
    for path, parameter in reduced.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), path


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SOME)
def test_stored_rows_are_cast_to_the_layers_dtype(name: str, stored: torch.dtype) -> None:
    _, reduced, batch = prepared(name)
    taken = []
    layers = reduced.actcache_family.layers_of(base_model_of(reduced))
    layers[LAYER].register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    rows = batch["activations"].to(stored)
    for dtype in (torch.float32, torch.bfloat16):
        reduced.to(dtype)(**{**batch, "activations": rows})
        assert taken[-1].dtype == dtype
        assert torch.equal(taken[-1], rows.to(dtype))


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_gives_the_same_gradients_or_is_refused(name: str) -> None:
    _, reduced, batch = prepared(name)
    want = gradients(reduced.train(), batch)
    reduced.activation_checkpointing_enable({"use_reentrant": False})
    got = gradients(reduced, batch)
    assert got.keys() == want.keys()
    for path in want:
        torch.testing.assert_close(got[path], want[path], atol=1e-6, rtol=1e-5)
    reduced.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ModelError, match="reentrant"):
        reduced(**batch)


@pytest.mark.parametrize("name", SOME)
def test_copies_and_pickles_have_rows_and_weights_of_their_own(name: str) -> None:
    _, reduced, batch = prepared(name, ANSWER)
    file = io.BytesIO()
    torch.save(reduced, file)
    file.seek(0)
    with torch.no_grad():
        want = reduced(**batch).loss
        for other in (copy.deepcopy(reduced), torch.load(file, weights_only=False)):
            assert torch.equal(other(**batch).loss, want)
            assert other.actcache_injected is not reduced.actcache_injected
            for parameter in other.parameters():
                parameter.zero_()
            assert not torch.equal(other(**batch).loss, want)
            assert torch.equal(reduced(**batch).loss, want)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", SOME)
@pytest.mark.usefixtures("one_process")
def test_ddp_trains_what_the_plain_model_trains(name: str) -> None:
    _, reduced, batch = prepared(name)
    want = gradients(reduced, batch)
    wrapped = DistributedDataParallel(copy.deepcopy(reduced))
    for _ in range(2):  # a parameter that got no gradient would be an error of the second round
        got = gradients(wrapped, batch)
    assert {path.removeprefix("module.") for path in got} == set(want)
    for path in want:
        torch.testing.assert_close(got[f"module.{path}"], want[path])


def check_compiled(reduced: PreTrainedModel, batch: Any, backend: str) -> None:
    want = gradients(reduced.train(), batch)
    other = {**batch, "activations": batch["activations"].flip(0)}
    torch._dynamo.reset()
    compiled = torch.compile(reduced, backend=backend)
    got = gradients(compiled, batch)
    for path in want:
        torch.testing.assert_close(got[f"_orig_mod.{path}"], want[path], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        for inputs in (other, batch):  # not the rows that it was compiled with
            torch.testing.assert_close(compiled(**inputs).loss, reduced(**inputs).loss, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # dynamo's own
@pytest.mark.parametrize(
    ("name", "head"), [("bert", ANSWER), pytest.param("deberta-v2", CLASSIFY, marks=pytest.mark.long)]
)  # the second breaks the graph
def test_a_compiled_model_gives_the_same(name: str, head: Any) -> None:
    _, reduced, batch = prepared(name, head, layer=3)  # one layer above: each takes seconds
    check_compiled(reduced, batch, "eager")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", [TOKENS, ANSWER, CLASSIFY])
@pytest.mark.parametrize("name", SOME)
def test_compiled_to_native_code(name: str, head: Any) -> None:
    _, reduced, batch = prepared(name, head)
    check_compiled(reduced, batch, "inductor")


def warned(caplog: pytest.LogCaptureFixture, name: str, head: Any) -> tuple[PreTrainedModel, str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "actcache"):
        _, reduced, _ = prepared(name, head)
    assert len(caplog.records) <= 1  # told once
    return reduced, caplog.text


@pytest.mark.parametrize(
    ("name", "head", "paths"),
    [
        ("mpnet", TOKENS, ["mpnet.encoder.relative_attention_bias.weight"]),
        ("deberta", TOKENS, ["deberta.encoder.rel_embeddings.weight"]),
        ("deberta-v2", TOKENS, ["deberta.encoder.rel_embeddings.weight", "deberta.encoder.LayerNorm.bias"]),
        ("deberta-v3", MASKED, ["deberta.embeddings.word_embeddings.weight", "deberta.encoder.rel_embeddings.weight"]),
        ("t5", TOKENS, ["transformer.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]),
    ],
)
def test_what_both_halves_use_is_frozen_and_told(
    name: str, head: Any, paths: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    reduced, text = warned(caplog, name, head)
    assert "frozen" in text
    frozen = {path for path, parameter in reduced.named_parameters() if not parameter.requires_grad}
    assert set(paths) <= frozen
    full = KINDS[name].make(head, seed=1)
    for path in paths:
        assert path.partition(".")[2] in text
        assert path in full.state_dict()  # under the full model's name
    assert all(path.partition(".")[2] in text or path in text for path in frozen)


@pytest.mark.parametrize(
    ("name", "head", "path"),
    [
        ("bert", MASKED, "cls.predictions.decoder.weight"),
        ("electra", MASKED, "generator_lm_head.weight"),
        ("distilbert", MASKED, "vocab_projector.weight"),
        ("modernbert", MASKED, "decoder.weight"),
        ("gpt2", CAUSAL, "lm_head.weight"),
        ("gemma", CAUSAL, "lm_head.weight"),
        ("t5", transformers.T5ForConditionalGeneration, "lm_head.weight"),
    ],
)
def test_tied_heads_get_their_own_copy_and_are_told(
    name: str, head: Any, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    reduced, text = warned(caplog, name, head)
    assert path in text
    assert "own copy" in text
    named = dict(reduced.named_parameters(remove_duplicate=False))
    assert named[path].requires_grad
    model = KINDS[name].make(head)
    assert torch.equal(named[path], dict(model.named_parameters(remove_duplicate=False))[path])
    weight = named[path]
    reduced.tie_weights()
    assert dict(reduced.named_parameters(remove_duplicate=False))[path] is weight
    if name == "t5":  # what its decoder and head share they go on sharing
        assert named["decoder.embed_tokens.weight"] is weight


def test_nothing_shared_is_nothing_told(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("bert", "roberta", "electra", "distilbert", "modernbert", "llama", "gpt2"):
        assert warned(caplog, name, CLASSIFY)[1] == ""


def test_the_embeddings_take_no_memory() -> None:
    for name, kind in KINDS.items():
        model = kind.make(kind.heads[0])
        words = {id(model.get_input_embeddings().weight)}
        kept = sum(p.numel() for p in reduce(model, 3).parameters())
        upper = {id(p) for p in family_of(model).layers_of(model)[3].parameters()}
        assert kept < sum(p.numel() for p in model.parameters() if id(p) not in words) / 2, name
        assert kept >= sum(p.numel() for p in model.parameters() if id(p) in upper), name


def test_what_cannot_be_is_refused() -> None:
    _, reduced, batch = prepared("llama", CAUSAL)
    with pytest.raises(ModelError, match="cannot generate"):
        reduced.generate(batch["token_ids"])
    with pytest.raises(ModelError, match="use_cache"):
        reduced(**batch, use_cache=True)
    reduced(**batch, use_cache=False)
    _, reduced, batch = prepared("t5", transformers.T5ForConditionalGeneration)
    with pytest.raises(ModelError, match="encoder_outputs"):
        reduced(**batch, encoder_outputs=(torch.zeros(1),))
    scaled = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    scaled |= {"original_max_position_embeddings": 20, "factor": 2.0}
    model = KINDS["llama"].make(AutoModel, rope_parameters=scaled)
    with pytest.raises(UnsupportedModelError, match="longrope"):
        LowerHalf(model, family_of(model), LAYER)
    model = KINDS["llama"].make(AutoModel)
    model.config._attn_implementation_internal = "paged|sdpa"
    with pytest.raises(UnsupportedModelError, match="paged"):
        LowerHalf(model, family_of(model), LAYER)


def test_hidden_states_keep_their_numbers_in_every_family() -> None:
    for name, kind in KINDS.items():
        model, ids = kind.make(kind.heads[0]), documents(lengths=(4, 4))
        rows = LowerHalf(model, family_of(model), LAYER).run(ids)
        inputs = {"activations": torch.tensor(np.stack(rows)), "token_ids": torch.tensor(np.stack(ids))}
        options = {"output_hidden_states": True, "output_attentions": True}
        with torch.no_grad():
            want, got = model(input_ids=inputs["token_ids"], **options), reduce(model, LAYER)(**inputs, **options)
        for field, first in (("hidden_states", LAYER), ("attentions", LAYER)):
            assert len(got[field]) == len(want[field]), name
            assert [one.numel() for one in got[field][:first]] == [0] * first, name
            assert all(len(one) == 2 for one in got[field][:first]), name
            for mine, theirs in zip(got[field][first:], want[field][first:], strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_a_trained_reduced_model_is_merged_into_the_full_one(name: str) -> None:
    kind = KINDS[name]
    head = kind.heads[-1]  # with tied weights, where the family has such a head
    model, ids = kind.make(head), documents()
    full, reduced = copy.deepcopy(model), reduce(model, LAYER)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reduced.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    assert reduced.merge_into(full) is full
    base = base_model_of(full)
    rows = LowerHalf(base, family_of(base), LAYER).run(ids)
    mask = mask_of(ids, "right")
    batch = {"activations": padded(rows, "right"), "token_ids": padded(ids, "right"), "attention_mask": mask}
    labels = labels_for(model, mask)
    with torch.no_grad():
        got = reduced(**batch, **labels)
        want = full(input_ids=batch["token_ids"], attention_mask=mask, **labels)
        before = model(input_ids=batch["token_ids"], attention_mask=mask, **labels)
    field = next(name for name in ("logits", "prediction_logits", "last_hidden_state") if name in got)
    torch.testing.assert_close(got[field][mask.bool()], want[field][mask.bool()], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(want[field], before[field], atol=1e-2)

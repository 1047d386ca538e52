"""Every family and head, cut at every layer: outputs, losses and gradients are the full model's."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from actcache.models import LowerHalf, base_model_of, family_of, reduce
from tests.models.zoo import (
    ANSWER,
    CAUSAL,
    CLASSIFY,
    KINDS,
    documents,
    full_inputs,
    labels_for,
    mask_of,
    padded,
)

TOLERANCE = 1e-5
CASES = [
    pytest.param(kind, head, attention, id=f"{name}-{head.__name__.removeprefix('AutoModelFor')}-{attention}")
    for name, kind in KINDS.items()
    for attention in kind.attention
    for head in kind.heads
]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Tiny models are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logger = logging.getLogger("actcache")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_alone(model: PreTrainedModel, ids: list[NDArray[np.int64]]) -> torch.Tensor:
    """The mean of what a question answering model loses on each document alone, answered by its first token."""
    losses = []
    for one in ids:
        inputs = {"input_ids": torch.tensor(one)[None], "attention_mask": torch.ones(1, len(one), dtype=torch.long)}
        losses.append(model(**inputs, start_positions=torch.tensor([0]), end_positions=torch.tensor([0])).loss)
    return torch.stack(losses).mean()


def compare(got: Any, want: Any, mask: torch.Tensor, ignored: set[str]) -> None:
    assert set(got.keys()) == set(want.keys()) - {"past_key_values"}
    for name in set(got.keys()) - ignored:
        mine, theirs = got[name], want[name]
        if mine.shape[:2] == mask.shape:
            mine, theirs = mine[mask.bool()], theirs[mask.bool()]
        torch.testing.assert_close(
            mine, theirs, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda text, name=name: name + text
        )


def compare_gradients(
    got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], model: PreTrainedModel, layer: int
) -> None:
    """Those of all upper parameters are there and equal; a copy of a tied weight is the only one more."""
    base = base_model_of(model)
    lower = {id(p) for part in family_of(base).lower_of(base, layer).values() for p in part.parameters()}
    named = dict(model.named_parameters(remove_duplicate=False))
    upper = {name for name in want if id(named[name]) not in lower}
    assert upper
    assert upper <= set(got)
    assert all(id(named[name]) in lower and "layer" not in name for name in set(got) - upper)
    for name in upper:
        torch.testing.assert_close(got[name], want[name], atol=TOLERANCE, rtol=1e-4, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize(("kind", "head", "attention"), CASES)
def test_reduced_equals_full(kind: Any, head: Any, attention: str) -> None:
    model, ids = kind.make(head, attention), documents()
    base, family = base_model_of(model), family_of(base_model_of(model))
    layers = range(1, len(family.layers_of(base)))
    assert len(layers) == 3
    reduced = {layer: reduce(model, layer) for layer in layers}
    rows = {layer: LowerHalf(base, family, layer).run(ids) for layer in layers}
    for side in ("right", "left"):
        # The full model's own answers are no reference where its head looks at the first column, which is padding.
        ignored = {"pooler_output"} if side == "left" else set()
        if side == "left" and kind.first_token and (head is CLASSIFY or "PreTraining" in head.__name__):
            continue
        mask = mask_of(ids, side)
        labels = labels_for(model, mask)
        if head is CAUSAL and side == "left":  # a document's first token has nothing before it to be predicted from
            labels["labels"][torch.arange(len(ids)), mask.argmax(-1)] = -100
        want = model(**full_inputs(model, ids, side), **labels)
        loss = want.loss if labels else None
        if head is ANSWER:
            ignored = {"loss"}  # which sums over padding; each document's alone is the reference
            # but for decoders that see padding on the left
            loss = None if kind.config.model_type == "t5" and side == "left" else loss_alone(model, ids)
        expected = gradients(model, loss) if loss is not None else {}
        for layer in layers:
            batch = {"activations": padded(rows[layer], side), "token_ids": padded(ids, side), "attention_mask": mask}
            got = reduced[layer](**batch, **labels)
            compare(got, want, mask, ignored)
            if loss is not None:
                torch.testing.assert_close(got.loss, loss, atol=TOLERANCE, rtol=TOLERANCE)
                compare_gradients(gradients(reduced[layer], got.loss), expected, model, layer)


@pytest.mark.parametrize(
    ("name", "attention"), [(name, attention) for name, kind in KINDS.items() for attention in kind.attention]
)
def test_a_batch_gives_each_document_what_it_is_alone(name: str, attention: str) -> None:
    kind = KINDS[name]
    model, ids, layer = kind.make(kind.heads[0], attention), documents(seed=5), 2
    rows = LowerHalf(model, family_of(model), layer).run(ids)
    reduced = reduce(model, layer)
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor(one)[None]).last_hidden_state[0] for one in ids])
        for side in ("right", "left"):
            mask = mask_of(ids, side)
            batch = {"activations": padded(rows, side), "token_ids": padded(ids, side), "attention_mask": mask}
            got = reduced(**batch).last_hidden_state[mask.bool()]
            torch.testing.assert_close(got, alone, atol=TOLERANCE, rtol=TOLERANCE)

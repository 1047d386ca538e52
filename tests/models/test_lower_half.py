"""Recording: batches that do not change the numbers, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from actcache.errors import LayerError, ModelError, UsageError
from actcache.models import LowerHalf, family_of, plan_batches

Make = Callable[..., PreTrainedModel]

LENGTHS = (3, 17, 1, 40, 8)


def documents(pad: int | None = None) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 900, n) for n in LENGTHS]
    if pad is not None:
        ids[1][4] = ids[3][0] = ids[4][-1] = pad  # a document may hold the padding token
    return ids


def alone(model: PreTrainedModel, ids: np.ndarray, layer: int, **inputs: Any) -> np.ndarray:
    with torch.no_grad():
        outputs = model(input_ids=torch.tensor(ids)[None], output_hidden_states=True, **inputs)
    return outputs.hidden_states[layer][0].numpy()


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("with_padding_tokens", [False, True])
def test_rows_are_those_of_each_document_alone(family: str, with_padding_tokens: bool, make_model: Make) -> None:
    model = make_model(AutoModel, family)
    ids = documents(model.config.pad_token_id if with_padding_tokens else None)
    lower = LowerHalf(model, family_of(model), 2)
    for rows, one in zip(lower.run(ids), ids, strict=True):
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows, alone(model, one, 2), atol=1e-5)
    assert lower.run([]) == []


def test_type_ids_count(make_model: Make) -> None:
    model = make_model(AutoModel)
    ids, types = documents(), [np.arange(n) % 2 for n in LENGTHS]
    lower = LowerHalf(model, family_of(model), 2)
    for rows, one, kind in zip(lower.run(ids, types), ids, types, strict=True):
        np.testing.assert_allclose(rows, alone(model, one, 2, token_type_ids=torch.tensor(kind)[None]), atol=1e-5)
    assert not np.allclose(lower.run(ids)[1], lower.run(ids, types)[1], atol=1e-3)


def test_only_the_lower_half_runs(make_model: Make) -> None:
    model = make_model(AutoModel)
    ran = []
    for i, layer in enumerate(model.encoder.layer):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    lower = LowerHalf(model, family_of(model), 2)
    lower.run(documents())
    assert ran == [0, 1]
    assert not model.encoder.layer[2]._forward_pre_hooks


def test_ambient_modes_do_not_change_the_numbers(make_model: Make) -> None:
    model = make_model(AutoModel)
    lower = LowerHalf(model, family_of(model), 2)
    want = lower.run(documents())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = lower.run(documents())
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_default_device_does_not_matter(make_model: Make) -> None:
    model = make_model(AutoModel)
    lower = LowerHalf(model, family_of(model), 2)
    want = lower.run(documents())
    with torch.device("meta"):
        got = lower.run(documents())
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_compute_dtypes(make_model: Make) -> None:
    model = make_model(AutoModel)
    exact = np.concatenate(LowerHalf(model, family_of(model), 2).run(documents()))
    coarse = LowerHalf(model, family_of(model), 2, "bfloat16")
    rows = np.concatenate(coarse.run(documents()))
    error = np.linalg.norm(rows - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 3e-2
    with pytest.raises(ModelError, match="load the model with"):
        LowerHalf(model, family_of(model), 2, "float64")
    double = make_model(AutoModel).to(torch.float64)
    assert LowerHalf(double, family_of(double), 2).run(documents())[0].dtype == np.float64
    half = make_model(AutoModel).to(torch.bfloat16)
    lower = LowerHalf(half, family_of(half), 2)
    assert lower.compute_dtype == "bfloat16"
    assert lower.run(documents())[0].dtype == np.float32


def test_train_mode_is_refused(make_model: Make) -> None:
    model = make_model(AutoModel)
    lower = LowerHalf(model, family_of(model), 2)
    model.encoder.layer[1].attention.train()
    with pytest.raises(ModelError, match=r"encoder\.layer\.1.*model\.eval\(\)"):
        lower.run(documents())
    model.train()
    with pytest.raises(ModelError, match=r"model\.eval\(\)"):
        lower.run(documents())
    model.eval()
    model.encoder.layer[3].train()  # not part of it
    lower.run(documents())


@pytest.mark.parametrize("layer", [5, -6, 1.5])
def test_layers_outside_the_model(layer: Any, make_model: Make) -> None:
    model = make_model(AutoModelForSequenceClassification).base_model
    with pytest.raises(LayerError, match=r"1\.\.4"):
        LowerHalf(model, family_of(model), layer)


def test_batches_cover_each_document_once_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 500)
    batches = plan_batches(lengths, 512)
    assert sorted(np.concatenate(batches)) == list(range(500))
    assert all(len(batch) * lengths[batch].max() <= 512 for batch in batches)
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.1 * lengths.sum()
    assert lengths[batches[0]].max() == lengths.max()
    assert len(batches) < 1.3 * lengths.sum() / 512
    assert [list(batch) for batch in plan_batches([5, 1000, 5], 10)] == [[1], [0, 2]]
    assert plan_batches([], 10) == []
    with pytest.raises(UsageError, match="budget"):
        plan_batches([1], 0)

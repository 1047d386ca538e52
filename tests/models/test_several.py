"""Several layers recorded in one pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

import actcache
from actcache import Recycler, Recyclers
from actcache.errors import LayerError, LowerHalfMismatchError, NonFiniteError, ReadOnlyError, UsageError
from actcache.models.lower_half import LowerHalf

Make = Callable[..., PreTrainedModel]

TEXTS = [f"document {i} says " + "la " * (i % 13) + "." for i in range(40)]


@pytest.fixture
def model(make_model: Make) -> PreTrainedModel:
    return make_model(AutoModel)


@pytest.fixture
def ran(model: PreTrainedModel) -> list[int]:
    """The layers that run, in order."""
    layers: list[int] = []
    for number, layer in enumerate(model.encoder.layer, 1):
        layer.register_forward_hook(lambda *_, number=number: layers.append(number))
    return layers


def rows_of(recycler: Recycler, texts: list[str]) -> list[np.ndarray]:
    return [entry.activations for entry in recycler.space.get(recycler.keys(texts))]


def test_each_layer_gets_what_a_recycler_of_its_own_would_store(
    model: PreTrainedModel, tokenizer: Any, make_model: Make, tmp_path: Path
) -> None:
    with (
        Recyclers(model, tokenizer, layers=[3, 1], store=tmp_path / "together", dtype="float32") as together,
        actcache.open(tmp_path / "apart") as apart,
    ):
        assert list(together) == [3, 1]
        report = together.fill(TEXTS, progress=False)
        assert (report.documents, report.computed, report.present) == (40, 40, 0)
        task = make_model(AutoModelForSequenceClassification)
        for layer, recycler in together.items():
            alone = Recycler(model, tokenizer, layer=layer, store=apart, dtype="float32")
            alone.fill(TEXTS, progress=False)
            assert recycler.recipe.fingerprint == alone.recipe.fingerprint
            for mine, theirs in zip(rows_of(recycler, TEXTS), rows_of(alone, TEXTS), strict=True):
                np.testing.assert_array_equal(mine, theirs)
            reduced = recycler.reduce(task)
            batch = next(iter(recycler.reader(TEXTS, batch_size=40)))
            with torch.no_grad():
                inputs = {"input_ids": batch.token_ids, "attention_mask": batch.attention_mask}
                torch.testing.assert_close(
                    reduced(**batch.model_inputs()).logits, task(**inputs).logits, atol=1e-5, rtol=1e-5
                )
        assert together.fill(TEXTS, progress=False).computed == 0


def test_one_pass_goes_as_deep_as_it_must(
    model: PreTrainedModel, tokenizer: Any, ran: list[int], tmp_path: Path
) -> None:
    with actcache.open(tmp_path / "store") as store:
        recyclers = Recyclers(model, tokenizer, layers=[1, 3], store=store)
        recyclers.fill(TEXTS[:1], progress=False)  # makes the canaries
        ran.clear()
        recyclers.fill(TEXTS[:1], progress=False)  # checks the numbers, and computes nothing else
        canaries = list(ran)
        ran.clear()
        recyclers.fill(TEXTS[:20], progress=False, token_budget=1 << 20)
        assert ran == [*canaries, 1, 2, 3]  # not 1, 1, 2, 3
        recyclers[3].fill(TEXTS[20:30], progress=False)
        ran.clear()
        report = recyclers.fill(TEXTS[:30], progress=False, token_budget=1 << 20)
        assert report.computed == 10
        assert ran == [*canaries, 1]  # layer 3 has them
        assert len(recyclers[1].space) == len(recyclers[3].space) == 30


def test_windows_and_extras_at_each_layer(model: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"too_long": actcache.windows(16, 4), "extras": ["spans"]}
    with Recyclers(model, tokenizer, layers=[1, 2], store=tmp_path / "store", **options) as recyclers:
        recyclers.fill(["la " * 40, *TEXTS], progress=False)
        counts = [len(recycler.keys(["la " * 40])) for recycler in recyclers.values()]
        assert counts[0] == counts[1] > 2
        for recycler in recyclers.values():
            assert all("spans" in entry.extras for entry in recycler.space.get(recycler.keys(TEXTS)))


def test_what_is_refused(model: PreTrainedModel, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    for layers in ([], [2, 2]):
        with pytest.raises(UsageError, match="layers"):
            Recyclers(model, tokenizer, layers=layers, store=tmp_path / "store")
    with pytest.raises(LayerError, match=r"1\.\.4"):
        Recyclers(model, tokenizer, layers=[1, 5], store=tmp_path / "store")
    recyclers = Recyclers(model, tokenizer, layers=[1, 2], store=tmp_path / "store")
    recyclers.fill(TEXTS[:5], progress=False)
    original = LowerHalf.run_at

    def spoiled(self: LowerHalf, *args: Any) -> Any:
        found: Any = original(self, *args)
        if self._company is not None:  # the canaries
            return found
        return {site: [rows * np.nan for rows in found[site]] if len(found) > 1 else found[site] for site in found}

    with monkeypatch.context() as patch:
        patch.setattr(LowerHalf, "run_at", spoiled)
        with pytest.raises(NonFiniteError, match=r"position \d+ of the texts"):
            recyclers.fill(TEXTS, progress=False)
    assert recyclers.fill(TEXTS, progress=False).computed == 35
    weight = model.encoder.layer[1].output.dense.weight
    recorded = weight.detach().clone()
    weight.data.add_(1)
    with pytest.raises(LowerHalfMismatchError, match=r"1\.\.2"):
        recyclers.fill(["new"], progress=False)
    weight.data.copy_(recorded)
    recyclers.close()
    recyclers.close()
    with (
        actcache.open(tmp_path / "store", mode="r") as store,
        pytest.raises(ReadOnlyError),
        Recyclers(model, tokenizer, layers=[1, 2], store=store) as readonly,
    ):
        readonly.fill(TEXTS, progress=False)


def test_a_pretrained_model_is_loaded_once(minilm_path: str, tmp_path: Path) -> None:
    with Recyclers.from_pretrained(minilm_path, layers=[2, 4], store=tmp_path / "store", device="cpu") as recyclers:
        assert recyclers.fill(TEXTS[:3], progress=False).computed == 3
        assert recyclers[2].recipe.layer == 2
        assert recyclers[2].agreement.lower.base_model is recyclers[4].agreement.lower.base_model
        assert "2, 4" in repr(recyclers)
    with Recycler.from_pretrained(minilm_path, layer=4, store=tmp_path / "store", device="cpu") as recycler:
        assert recycler.fill(TEXTS[:3], progress=False).computed == 0


def test_rows_of_several_layers_are_aligned(model: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    with Recyclers(model, tokenizer, layers=[3, 1], store=tmp_path, dtype="float32") as recyclers:
        recyclers.fill(TEXTS, progress=False)
        stored = {layer: rows_of(recycler, TEXTS) for layer, recycler in recyclers.items()}
        seen = 0
        for batch in recyclers.rows(TEXTS, batch_size=64, beside=["documents", "positions"]):
            assert batch.rows.shape[1:] == (2, model.config.hidden_size)
            for row, document, position in zip(batch.rows, batch.documents, batch.positions, strict=True):
                for site, layer in enumerate((3, 1)):
                    np.testing.assert_array_equal(row[site], stored[layer][document][position])
            seen += len(batch)
        assert seen == sum(map(len, stored[1]))
        assert sum(map(len, recyclers[1].rows(exclude={"positions": [0]}))) == seen - len(TEXTS)


def test_one_row_a_document_and_layer(model: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    with Recyclers(model, tokenizer, layers=[3, 1], store=tmp_path, dtype="float32") as recyclers:
        recyclers.fill(TEXTS, progress=False)
        found = recyclers.pooled(TEXTS)
        assert found.shape == (len(TEXTS), 2, model.config.hidden_size)
        for site, layer in enumerate((3, 1)):
            wanted = np.stack([rows.mean(axis=0) for rows in rows_of(recyclers[layer], TEXTS)])
            np.testing.assert_allclose(found[:, site], wanted, rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(recyclers[layer].pooled(TEXTS), found[:, site])
        assert sorted(recyclers.pooled(how="last").sum(axis=(1, 2))) == sorted(
            recyclers.pooled(TEXTS, "last").sum(axis=(1, 2))
        )

"""The four regimes: one loop, one order, and the same numbers wherever the lower half does not train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import actcache
from actcache import Recycler
from actcache.errors import LowerHalfMismatchError, MissingEntryError, ShapeError, UsageError
from actcache.models import Regime

TEXTS = [f"document {i} says " + "la " * (i % 13) + "." for i in range(32)]
PAIRED = [(text, "and this") if i % 3 else text for i, text in enumerate(TEXTS)]
LABELS = np.arange(32) % 2
OPTIONS: dict[str, Any] = {"labels": LABELS, "batch_size": 8, "shuffle": True, "seed": 3}

Make = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def task(make_model: Make) -> PreTrainedModel:
    return make_model(AutoModelForSequenceClassification)


@pytest.fixture
def recycler(task: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> Iterator[Recycler]:
    with actcache.open(tmp_path / "store") as store:
        yield Recycler(task.base_model, tokenizer, layer=2, store=store, dtype="float32")


def losses(prepared: Any, epochs: int = 3) -> list[float]:
    """The one loop."""
    model, batches = prepared
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    seen = []
    for epoch in range(epochs):
        torch.manual_seed(epoch)  # the same dropout in every regime
        count = 0
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
            count += 1
        assert count == len(batches)
    return seen


@pytest.mark.parametrize("options", [{}, {"bucket": True, "max_tokens": 200}])
def test_one_loop_serves_all_four(recycler: Recycler, task: PreTrainedModel, options: Any) -> None:
    with pytest.raises(MissingEntryError, match="fill them"):
        recycler.regime("R", task, PAIRED, **OPTIONS)
    seen = {}
    lower = [p.clone() for p in task.bert.encoder.layer[:2].parameters()]
    for regime in (Regime.SAVE_AND_RECYCLE, "NR", "F", "R"):
        prepared = recycler.regime(regime, task, PAIRED, **OPTIONS, **options)
        seen[str(regime)] = losses(prepared)
        if regime == "SR":
            with actcache.open(recycler._store.url, mode="r") as other:  # durable after the first epoch
                assert len(other.space(recycler.recipe)) == len(PAIRED)
            assert prepared.batches.reader.stats().compute_seconds > 0
        if regime in ("NR", "F"):
            trained = prepared.model.bert.encoder.layer[:2].parameters()
            assert all(torch.equal(a, b) for a, b in zip(trained, lower, strict=True)) == (regime == "F")
    assert all(torch.equal(a, b) for a, b in zip(task.bert.encoder.layer[:2].parameters(), lower, strict=True))
    np.testing.assert_allclose(seen["SR"], seen["F"], rtol=1e-4)  # with dropout in the upper half
    np.testing.assert_allclose(seen["R"], seen["F"], rtol=1e-4)
    assert not np.allclose(seen["NR"], seen["F"], rtol=1e-4)
    assert seen["F"][-1] != seen["F"][0]


def train(prepared: Any, folder: Path, **options: Any) -> tuple[list[float], Trainer]:
    dataset = prepared.batches.dataset()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        num_train_epochs=2,
        logging_steps=1,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="steps",
        save_steps=6,
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    trainer = Trainer(prepared.model, arguments, train_dataset=dataset, data_collator=dataset.collate)
    trainer.train(**options)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


@pytest.mark.filterwarnings("ignore")  # the Trainer's own
def test_the_trainer_serves_all_four_and_goes_on_from_its_checkpoints(
    recycler: Recycler, make_model: Make, tmp_path: Path
) -> None:
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    task = make_model(AutoModelForSequenceClassification, **no_dropout)
    seen = {}
    for regime in ("SR", "NR", "F", "R"):
        prepared = recycler.regime(regime, task, TEXTS, labels=LABELS)
        seen[regime], trainer = train(prepared, tmp_path / regime)
        assert len(seen[regime]) == 8
    np.testing.assert_allclose(seen["SR"], seen["F"], atol=2e-4)
    np.testing.assert_allclose(seen["R"], seen["F"], atol=2e-4)
    assert not np.allclose(seen["NR"], seen["F"], atol=2e-4)
    again, _ = train(recycler.regime("R", task, TEXTS, labels=LABELS), tmp_path / "R", resume_from_checkpoint=True)
    np.testing.assert_allclose(again[-2:], seen["R"][-2:], atol=2e-4)  # the last two steps were run again
    trainer.save_model(str(tmp_path / "saved"))
    loaded = recycler.load_reduced(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trainer.model.parameters(), strict=True))


def test_windows_have_their_documents_labels(task: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    texts = ["many words " * n for n in (5, 40, 21)]
    labels = [0, 1, 1]
    windows = actcache.windows(32, stride=8)
    with Recycler(task.base_model, tokenizer, layer=2, store=tmp_path, dtype="float32", too_long=windows) as recycler:
        recycler.fill(texts, progress=False)
        text, stored = (
            next(iter(recycler.regime(regime, task, texts, labels=labels).batches)) for regime in ("F", "R")
        )
        assert text["labels"].tolist() == stored["labels"].tolist()
        assert text["input_ids"].tolist() == stored["token_ids"].tolist()
        assert len(text["labels"]) > 5


def test_missing_windows_are_tokenized_once(task, tokenizer, tmp_path, monkeypatch):
    """When the regime is prepared, to count and measure them; and each once more when its batch is computed."""
    texts = [" ".join([text] * (i % 5 + 1)) for i, text in enumerate(TEXTS)]
    calls: list[int] = []
    plain = type(tokenizer).__call__

    def counting(self: Any, some: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(some))
        return plain(self, some, *args, **options)

    windows = actcache.windows(32, stride=8)
    with Recycler(
        task.base_model, tokenizer, layer=2, store=tmp_path, too_long=windows, check_canaries=False
    ) as recycler:
        recycler.fill(texts[:1], progress=False)
        monkeypatch.setattr(type(tokenizer), "__call__", counting)
        batches = recycler.regime("SR", task, texts, bucket=True, batch_size=4).batches
        assert sum(calls) == len(texts) - 1
        for _ in batches:
            pass
        assert sum(calls) == 2 * (len(texts) - 1)


def test_labels_of_tokens(recycler: Recycler, make_model: Make, tokenizer: Any) -> None:
    task = make_model(AutoModelForTokenClassification)
    task.base_model.load_state_dict(recycler.agreement.lower.base_model.state_dict(), strict=False)
    labels = [np.arange(len(ids)) % 2 for ids in tokenizer(TEXTS)["input_ids"]]
    options = {**OPTIONS, "labels": labels}
    seen = {regime: losses(recycler.regime(regime, task, TEXTS, **options), 2) for regime in ("SR", "F", "R")}
    np.testing.assert_allclose(seen["SR"], seen["F"], rtol=1e-4)
    np.testing.assert_allclose(seen["R"], seen["F"], rtol=1e-4)
    for wrong in (labels[:-1], [*labels[:-1], labels[-1][:-1]]):
        for regime in ("F", "R"):
            with pytest.raises(ShapeError):
                recycler.regime(regime, task, TEXTS, labels=wrong)


def test_bad_input_is_refused(recycler: Recycler, task: PreTrainedModel, make_model: Make) -> None:
    with pytest.raises(UsageError, match="NR, F, SR, R"):
        recycler.regime("frozen", task, TEXTS)
    with pytest.raises(LowerHalfMismatchError):
        recycler.regime("NR", make_model(AutoModelForSequenceClassification, seed=1), TEXTS)
    for labels in ([0, 1], ["a"] * len(TEXTS)):
        with pytest.raises(ShapeError):
            recycler.regime("F", task, TEXTS, labels=labels)

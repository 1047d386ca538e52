"""The Hugging Face Trainer on a reduced model and the entries of a store: the losses of the frozen full model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import actcache
from actcache import Recycler

TEXTS = [f"document {i} says " + "la " * (i % 13) + "." for i in range(32)]
LABELS = np.arange(32) % 2


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def train(model: Any, dataset: Any, collate: Any, folder: Path) -> list[float]:
    seen = Losses()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        num_train_epochs=2,
        logging_steps=1,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        dataloader_num_workers=0,
    )
    Trainer(model, arguments, train_dataset=dataset, data_collator=collate, callbacks=[seen]).train()
    return seen.losses


@pytest.mark.filterwarnings("ignore")  # the Trainer's own
def test_losses_equal_the_frozen_full_models(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    full = make_model(AutoModelForSequenceClassification).eval()
    for module in full.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with actcache.open(tmp_path / "store") as store:
        recycler = Recycler(copy.deepcopy(full.base_model), tokenizer, layer=2, store=store, dtype="float32")
        recycler.fill(TEXTS, progress=False)
        reduced = recycler.reduce(full)
        dataset = recycler.reader(TEXTS, labels=LABELS).dataset()
        losses = train(reduced, dataset, dataset.collate, tmp_path / "reduced")

    for name, parameter in full.named_parameters():
        if "embeddings" in name or "layer.0." in name or "layer.1." in name:
            parameter.requires_grad_(False)
    examples = [{**tokenizer(text), "labels": int(label)} for text, label in zip(TEXTS, LABELS, strict=True)]

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        labels = torch.tensor([example["labels"] for example in batch])
        inputs = tokenizer.pad([{"input_ids": e["input_ids"]} for e in batch], return_tensors="pt")
        return {**inputs, "labels": labels}

    expected = train(full, examples, collate, tmp_path / "full")
    assert len(losses) == len(expected) == 8
    np.testing.assert_allclose(losses, expected, atol=2e-4)


@pytest.mark.filterwarnings("ignore")  # the Trainer's own
@pytest.mark.parametrize("wanted", ["output_hidden_states", "output_attentions"])
def test_it_gathers_hidden_states_and_attentions(wanted: str, make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Those of the upper half are the full model's, under the same numbers; those of the lower half have no tokens."""
    texts = [f"document {i} says la." for i in range(7)]  # of one length: the Trainer joins no other attentions
    task = make_model(AutoModelForSequenceClassification, **NO_DROPOUT, **{wanted: True})
    task.set_attn_implementation("eager")
    with torch.no_grad():
        full = task(**tokenizer(texts, return_tensors="pt"))
    with Recycler(
        copy.deepcopy(task.base_model), tokenizer, layer=2, store=tmp_path / "s", dtype="float32"
    ) as recycler:
        recycler.fill(texts, progress=False)
        data = recycler.reader(texts, labels=LABELS[:7]).dataset()
        arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=3, report_to=[], use_cpu=True)
        trainer = Trainer(recycler.reduce(task), arguments, eval_dataset=data, data_collator=data.collate)
        assert trainer.evaluate()["eval_loss"] > 0
        logits, captured = trainer.predict(data).predictions
    np.testing.assert_allclose(logits, full.logits, atol=1e-5)
    want = full[wanted.removeprefix("output_")]
    assert len(captured) == len(want)
    for layer, (mine, theirs) in enumerate(zip(captured, want, strict=True)):
        if layer < 2:
            assert mine.shape == ((7, 0, 32) if theirs.ndim == 3 else (7, 4, 0, 0))
        else:
            np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the Trainer's own
@pytest.mark.parametrize("regime", [None, "NR", "SR"])
def test_it_groups_documents_by_length(regime: str | None, make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    lengths = [len(ids) for ids in tokenizer(TEXTS)["input_ids"]]
    task = make_model(AutoModelForSequenceClassification, **NO_DROPOUT)
    with Recycler(copy.deepcopy(task.base_model), tokenizer, layer=2, store=tmp_path / "store") as recycler:
        if regime != "SR":
            recycler.fill(TEXTS, progress=False)
        if regime is None:
            model, data = recycler.reduce(task), recycler.reader(TEXTS, labels=LABELS).dataset()
        else:
            model, batches = recycler.regime(regime, task, TEXTS, labels=LABELS)
            data = batches.dataset()
        seen: list[int] = []

        def collate(items: list[Any]) -> Any:
            inputs = data.collate(items)
            seen.extend(inputs["attention_mask"].sum(1).tolist())
            return inputs

        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_train_epochs=1,
            train_sampling_strategy="group_by_length",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=5,
        )
        trainer = Trainer(model, arguments, train_dataset=data, data_collator=collate)
        assert list(trainer._get_train_sampler().lengths) == lengths
        trainer.train()
        assert sorted(seen) == sorted(lengths)
        padding = sum(max(seen[i : i + 4]) * 4 - sum(seen[i : i + 4]) for i in range(0, 32, 4))
        assert padding < sum(max(lengths[i : i + 4]) * 4 - sum(lengths[i : i + 4]) for i in range(0, 32, 4))
        assert len(recycler.space) == len(TEXTS)  # computed by the first epoch where it was not filled

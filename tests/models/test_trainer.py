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

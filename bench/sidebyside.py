"""One task, four ways to train: the full model, frozen, reduced, and reduced with adapters, side by side."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from actcache import Recycler
from actcache.format.keys import Document
from actcache.models import add_adapters
from actcache.models.training.sweep import Loss, evaluate, own_loss, train
from bench.report import Report

HELD_OUT = 0.25
#: regime (see ``actcache.models.training.regimes``), whether only adapters and head train, what it is called
WAYS = (
    ("NR", False, "full model"),
    ("F", False, "lower half frozen, no cache"),
    ("R", False, "reduced model, from the store"),
    ("R", True, "the same with adapters"),
)


@dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
        texts, labels: one label a text, as a reader takes them.
        make: returns the full task model with a new head.
        score: of a model in eval mode, and of batches of held-out texts in order: numbers by name, in percent.
    """

    title: str
    texts: list[Document]
    labels: Any
    make: Callable[[], PreTrainedModel]
    score: Callable[[nn.Module, Iterable[dict[str, torch.Tensor]]], dict[str, float]]
    loss: Loss = own_loss


def quietly() -> None:
    """Look for models on this machine only, and have transformers say nothing of its new heads."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("actcache").setLevel(logging.ERROR)


def parser_of(description: str | None, *, epochs: int, texts: int) -> argparse.ArgumentParser:
    """Return the options that all tasks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--texts", type=int, default=texts, help="at most; a random choice")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--adapter-epochs", type=int, default=2 * epochs)
    parser.add_argument("--adapter-rate", type=float, default=2e-3)
    parser.add_argument("--bottleneck", type=int, default=64)
    parser.add_argument("--json", type=Path)
    return parser


def compare(recycler: Recycler, task: Task, groups: np.ndarray, options: argparse.Namespace) -> None:
    """Train each way with each seed, and print the scores: mean and, of several seeds, standard deviation.

    Args:
        groups: [n], what each text belongs to; a group is held out as a whole, or not at all.
    """
    report = Report()
    rows: list[list[str]] = []
    for regime, adapters, name in WAYS:
        begin = time.perf_counter()
        scores = [_scores(recycler, task, groups, regime, adapters, seed, options) for seed in range(options.seeds)]
        seconds = (time.perf_counter() - begin) / options.seeds
        columns = list(scores[0])
        rows.append([name, *(_text([score[column] for score in scores]) for column in columns), f"{seconds:.0f}"])
        print(f"{name}: {', '.join(rows[-1][1:])} s", flush=True)
    title = f"{task.title}: {len(task.texts)} texts, {HELD_OUT:.0%} held out, cut after layer {options.layer}, "
    title += f"{options.epochs} epochs (adapters {options.adapter_epochs}), {options.seeds} seeds"
    report.table(title, ["", *columns, "s a seed"], rows)
    report.save(options.json)


def _scores(
    recycler: Recycler,
    task: Task,
    groups: np.ndarray,
    regime: str,
    adapters: bool,
    seed: int,
    options: argparse.Namespace,
) -> dict[str, float]:
    torch.manual_seed(seed)  # the same new head for every way
    full = task.make()
    names = np.random.default_rng(seed).permutation(np.unique(groups))
    out = np.isin(groups, names[: int(len(names) * HELD_OUT)])

    def prepared(which: np.ndarray, shuffle: bool) -> Any:
        some = [task.texts[i] for i in which]
        labels = [task.labels[i] for i in which]
        return recycler.regime(
            regime, full, some, labels=labels, batch_size=16, bucket=True, shuffle=shuffle, seed=seed
        )

    model, batches = prepared(np.flatnonzero(~out), shuffle=True)
    if adapters:
        add_adapters(model, options.bottleneck)
    torch.manual_seed(seed)  # the same dropout where the same layers have any
    rate = options.adapter_rate if adapters else options.rate
    train(model, batches, rate=rate, epochs=options.adapter_epochs if adapters else options.epochs, loss=task.loss)
    found: dict[str, float] = {}

    def scored(model: nn.Module, batches: Iterable[Any]) -> float:
        found.update(task.score(model, batches))
        return 0.0

    evaluate(model, prepared(np.flatnonzero(out), shuffle=False)[1], scored)
    return found


def _text(values: list[float]) -> str:
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")

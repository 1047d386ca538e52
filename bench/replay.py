"""Does loading hide behind an accelerator's real work: a model's upper half, replayed from the store?

    python -m bench.replay --model bert-base --device cuda --trace trace.json     # batches of 128 x 512, half precision
    python -m bench.replay --model minilm --device cpu --batch 16                 # the same loop where there is no GPU

Three loops of inference over the same batches take turns: all batches in the device's memory already; the reader with
its thread; the reader without (``depth=0``). A turn is as many epochs as ``--steps`` needs, and ends when the device
has ended. Beside the walls: GB/s from host to device by the device's own clock, the share of its time that the consumer
waited, and the reader's verdict. ``--trace`` records some steps with torch's profiler (for chrome://tracing or
Perfetto), and says during how much of the copies from the host a kernel ran.

On CUDA the model is in float16; the order of magnitude of its random weights does not matter to its time.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

import actcache
from actcache import Recycler
from actcache.admin.benchmark import rounds
from actcache.admin.benchmark.rounds import Spread
from actcache.models import base_model_of, family_of
from actcache.reader.reader import Reader
from bench.recycling_cases import CASES, tokenizer
from bench.report import Cell, Report
from bench.tracing import copies_and_kernels, profiled

TRACED = 12  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-base", help=f"of {', '.join(CASES)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=128, help="documents")
    parser.add_argument("--batches", type=int, default=12, help="of an epoch")
    parser.add_argument("--steps", type=int, default=200, help="of each loop in a round, at least")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--backend", default="hdf5")
    parser.add_argument("--trace", type=Path, help="where to write a trace of some steps")
    parser.add_argument("--dir", type=Path, help="where to make the store (removed afterwards)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device here; --device cpu runs the same loops")
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="actcache-bench-", dir=options.dir) as folder:
        replay = Replay(options, Path(folder))
        replay.compare(report)
        if options.trace:
            replay.trace(options.trace, report)
        replay.close()
    report.save(options.json)


class Replay:
    """A reduced model on a device, and a filled store that it is replayed from."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._device = options, torch.device(options.device)
        case = CASES[options.model]
        self._on_cuda = self._device.type == "cuda"
        task = case.make().to(self._device, torch.float16 if self._on_cuda else torch.float32)
        layers = len(family_of(base_model_of(task)).layers_of(base_model_of(task)))
        self._texts, _ = case.documents(options.batch * options.batches)
        self._recycler = Recycler(
            base_model_of(task),
            tokenizer(),
            layer=layers // 2,
            store=actcache.open(f"{options.backend}:{folder / 'store'}"),
            dtype="float16",
            max_length=case.max_length,
            too_long="truncate",
        )
        self._recycler.fill(self._texts, progress=False)
        self._model = self._recycler.reduce(task).eval()
        self.where = (
            f"{case.name}, layers {layers // 2 + 1} to {layers}, {options.batch} documents a batch, {self._device}"
        )

    def _reader(self, depth: int) -> Reader:
        return self._recycler.reader(
            self._texts, batch_size=self._options.batch, device=self._device, depth=depth, bucket=True
        )

    def _go(self, batches: Iterable[Any]) -> None:
        with torch.inference_mode():
            for batch in batches:
                self._model(**batch.model_inputs())
        if self._on_cuda:
            torch.cuda.synchronize(self._device)

    def compare(self, report: Report) -> None:
        """Print the three loops, and what the reader says of itself."""
        options = self._options
        readers = {"reader": self._reader(options.depth), "reader, no prefetch": self._reader(0)}
        kept = list(self._reader(0))
        epochs = -(-options.steps // len(kept))
        steps = epochs * len(kept)

        def loop(batches: Callable[[int], Iterable[Any]]) -> Callable[[int], float]:
            def turn(number: int) -> float:
                start = time.perf_counter()
                self._go(itertools.chain.from_iterable(batches(epoch) for epoch in range(epochs)))
                return time.perf_counter() - start

            return turn

        def epoch_of(reader: Reader) -> Callable[[int], Iterable[Any]]:
            def batches(epoch: int) -> Iterable[Any]:
                reader.set_epoch(0)
                return reader

            return batches

        contestants = {"in memory": loop(lambda epoch: kept)}
        contestants |= {name: loop(epoch_of(reader)) for name, reader in readers.items()}
        seconds = rounds.take_turns(contestants, options.rounds)
        rows: list[list[Cell]] = []
        for name, spent in seconds.items():
            stats = readers[name].stats() if name in readers else None
            told: Sequence[Cell] = [None, None, None]
            if stats is not None:
                bus = f"{stats.nbytes / stats.copy_seconds / 1e9:.1f}" if stats.copy_seconds else "no bus"
                told = [f"{stats.stall_fraction:.1%}", bus, f"{stats.read_gb_per_second:.2f}"]
            rows.append([name, Spread.of(spent / steps * 1e3), Spread.of(spent / seconds["in memory"]), *told])
        columns = ("", "ms a step", "of in memory", "waited", "GB/s to the device", "GB/s read")
        report.table(f"{self.where}: {steps} steps a round", columns, rows)
        report.say(readers["reader"].stats().verdict())
        for reader in readers.values():
            reader.close()

    def trace(self, path: Path, report: Report) -> None:
        """Write a trace, and say during how much of the copies a kernel ran."""
        with self._reader(self._options.depth) as reader, profiled(self._device) as profile:
            self._go(itertools.islice(reader, TRACED))
        profile.export_chrome_trace(str(path))
        found = copies_and_kernels(path)
        if found.share is None:
            report.say(f"{path}: no copies to a device in the trace")
            return
        report.say(f"{path}: {found.copies} copies from the host; kernels ran during {found.share:.1%} of their time")

    def close(self) -> None:
        self._recycler.close()


if __name__ == "__main__":
    main()

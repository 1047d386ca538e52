"""A model's upper half on a device, in half precision, within a number of seconds. A part of ``bench.cuda``.

    python -m bench.upper_halves bert-base --device cuda --seconds 60 --json bert-base.json

The model is cut in the middle. Inference: the full model, the reduced one from the store, the same from batches that
are in the device's memory already. Training: full, with the lower half frozen, reduced from the store, from memory.
Contestants take turns, round by round, as many as there is time for; figures are medians with their intervals, ratios
within a round. Then: during how much of the time of its copies from the host kernels ran (torch's profiler), and
recording, ``Recycler.fill`` against the lower half's own forward.

Where the device's memory does not do for a batch in training, half of it is tried. What there was no time for is named.
The file is written after each of these, so that a process that is ended leaves what it has.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

import actcache
from actcache import Recycler
from actcache.admin.benchmark.rounds import Spread
from actcache.models import base_model_of, family_of
from bench import shapes
from bench.recording import computed_by, inputs, lower_half
from bench.sidebyside import quietly
from bench.tracing import copies_and_kernels, profiled
from bench.within import synchronize, turns

RATE = 1e-5
#: Up to which share of the time each part may go on; the last one may take what is left.
UNTIL = {"inference": 0.45, "trace": 0.5, "recording": 0.65, "training": 1.0}


@dataclass(frozen=True)
class Sizes:
    """Documents of a batch, tokens of a document, batches of an epoch of inference and of training, rounds at most.

    An epoch begins with a read that nothing hides, so there must be some batches in it.
    """

    batch: int = 128
    tokens: int = 512
    batches: int = 12
    trained: int = 4
    rounds: int = 15


TINY = Sizes(batch=4, tokens=16, batches=2, trained=2, rounds=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(shapes.SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tiny", action="store_true", help="four small layers, to try the program out")
    parser.add_argument("--trace", type=Path, help="where to write a trace of some steps (.json or .json.gz)")
    parser.add_argument("--dir", type=Path, help="where to make the stores (removed afterwards)")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    quietly()
    with tempfile.TemporaryDirectory(prefix="actcache-bench-", dir=options.dir) as folder:
        measure(
            options.model,
            torch.device(options.device),
            options.seconds,
            Path(folder),
            lambda found: options.json.write_text(json.dumps(found)),
            tiny=options.tiny,
            trace=options.trace,
        )


def measure(
    name: str,
    device: torch.device,
    seconds: float,
    folder: Path,
    keep: Callable[[dict[str, Any]], object],
    *,
    tiny: bool = False,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Measure a model of ``shapes.SHAPES``; ``keep`` is given what there is after each part."""
    begin = time.monotonic()
    bench = UpperHalf(name, device, folder, tiny=tiny)
    found = bench.found
    parts: dict[str, Callable[[float], Any]] = {
        "inference": bench.inference,
        "trace": lambda until: bench.trace(trace),
        "recording": bench.recording,
        "training": bench.training,
    }
    found["left_out"] = []
    for part, run in parts.items():
        until = begin + UNTIL[part] * seconds
        if part != "inference" and time.monotonic() > begin + seconds:
            found["left_out"].append(f"{part}: there was no time left")
            continue
        try:
            found[part] = run(until)
        except torch.OutOfMemoryError:  # its traceback holds tensors until this block ends
            found["left_out"].append(f"{part}: the device's memory does not do for it")
        found["seconds"] = time.monotonic() - begin
        keep(found)
        gc.collect()
        _free()
    bench.close()
    keep(found)
    return found


class UpperHalf:
    """A task model cut in the middle, and a store with its lower half's activations."""

    def __init__(self, name: str, device: torch.device, folder: Path, *, tiny: bool) -> None:
        self._sizes = TINY if tiny else Sizes()
        self._device, self._folder = device, folder
        dtype = computing_dtype(device)
        self._task = shapes.task_model(name, tiny=tiny).to(device, dtype)
        layers = len(family_of(base_model_of(self._task)).layers_of(base_model_of(self._task)))
        self._layer = layers // 2
        self._stored = "bfloat16" if dtype == torch.bfloat16 else "float16"
        self._texts, self._labels = shapes.documents(self._sizes.batch * self._sizes.batches, self._sizes.tokens)
        self._recyclers: list[Recycler] = []
        self._recycler = self._open("replay")
        self.found: dict[str, Any] = {
            "model": name,
            "tiny": tiny,
            "device": str(device),
            "computed in": str(dtype).removeprefix("torch."),
            "stored in": self._stored,
            "cut": f"layers {self._layer + 1} to {layers} of {layers}",
            **asdict(self._sizes),
        }
        self._recycler.fill(self._texts, progress=False)

    def inference(self, until: float) -> dict[str, Any]:
        """Measure milliseconds a batch of inference, and what the reader says of itself."""
        batch = self._sizes.batch
        full, documents = self._prepared("NR", batch)
        reduced, batches = self._prepared("R", batch)
        kept = list(batches)
        contestants = {
            "full": self._inferring(full, lambda: _first_epoch(documents)),
            "store": self._inferring(reduced, lambda: _first_epoch(batches)),
            "memory": self._inferring(reduced, lambda: kept),
        }
        seconds = turns(contestants, until, self._sizes.rounds)
        stats = batches.reader.stats()
        return {
            "batch": batch,
            **_figures(seconds, self._sizes.batches, baseline="full"),
            "stall_fraction": stats.stall_fraction,
            "gb_per_second_to_device": stats.nbytes / stats.copy_seconds / 1e9 if stats.copy_seconds else None,
            "gb_per_second_read": stats.read_gb_per_second,
            "verdict": stats.verdict(),
        }

    def training(self, until: float) -> dict[str, Any]:
        """Measure milliseconds a step of training, with as large a batch as there is memory for."""
        batch = self._sizes.batch
        while True:
            try:
                return {"batch": batch, **self._training(batch, until)}
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
            batch //= 2
            gc.collect()
            _free()

    def _training(self, batch: int, until: float) -> dict[str, Any]:
        contestants = {}
        for name, regime in (("full", "NR"), ("frozen", "F"), ("store", "R"), ("memory", "R")):
            model, batches = self._prepared(regime, batch, self._sizes.batch * self._sizes.trained)
            contestants[name] = self._trained(model, batches, kept=name == "memory")
        seconds = turns(contestants, until, self._sizes.rounds)
        return _figures(seconds, -(-self._sizes.batch * self._sizes.trained // batch), baseline="full")

    def trace(self, path: Path | None) -> dict[str, Any]:
        """Look, by torch's profiler, whether kernels ran beside the copies; write the trace where there is a path."""
        model, batches = self._prepared("R", self._sizes.batch)
        steps = self._inferring(model, lambda: _first_epoch(batches))
        steps()
        with profiled(self._device) as profile:
            steps()
        written = self._folder / "trace.json.gz" if path is None else path
        profile.export_chrome_trace(str(written))
        found = copies_and_kernels(written)
        return {
            "file": None if path is None else path.name,
            "copies": found.copies,
            "kernels": found.kernels,
            "share of copies beside kernels": found.share,
        }

    def recording(self, until: float) -> dict[str, Any]:
        """Measure seconds of recording the documents, and of the lower half's own forward over them."""
        texts, recycler = self._texts, self._open("recording")
        given = [inputs(ids) for ids in computed_by(recycler, texts)]
        lower = lower_half(base_model_of(self._task), self._layer)

        def forward() -> None:
            with torch.inference_mode():
                for batch in given:
                    lower(**{name: tensor.to(self._device) for name, tensor in batch.items()})
            synchronize(self._device)

        def fill() -> None:
            recycler.space.delete(list(recycler.space.keys()))
            report = recycler.fill(texts, progress=False)
            if report.computed != len(texts):
                raise RuntimeError(f"{report.computed} of {len(texts)} documents were computed")

        seconds = turns({"fill": fill, "forward": forward}, until, self._sizes.rounds)
        return {
            "documents": len(texts),
            "rounds": len(seconds["fill"]),
            "seconds": {name: asdict(Spread.of(spent)) for name, spent in seconds.items()},
            "fill by forward": asdict(Spread.of(seconds["fill"] / seconds["forward"])),
        }

    def close(self) -> None:
        for recycler in self._recyclers:
            recycler.close()

    def _open(self, name: str) -> Recycler:
        recycler = Recycler(
            base_model_of(self._task),
            shapes.tokenizer(),
            layer=self._layer,
            store=actcache.open(self._folder / name),
            dtype=self._stored,
            max_length=self._sizes.tokens,
            too_long="truncate",
        )
        self._recyclers.append(recycler)
        return recycler

    def _prepared(self, regime: str, batch: int, count: int | None = None) -> Any:
        texts, labels = self._texts[:count], self._labels[:count]
        return self._recycler.regime(
            regime, self._task, texts, labels=labels, batch_size=batch, device=self._device, bucket=True
        )

    def _inferring(self, model: PreTrainedModel, batches: Callable[[], Iterable[dict[str, Any]]]) -> Callable[[], None]:
        def turn() -> None:
            model.eval()
            with torch.inference_mode():
                for batch in batches():
                    model(**batch)
            synchronize(self._device)

        return turn

    def _trained(self, model: nn.Module, batches: Any, *, kept: bool) -> Callable[[], None]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE)
        held = list(batches) if kept else None

        def turn() -> None:
            model.train()
            for batch in _first_epoch(batches) if held is None else held:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            synchronize(self._device)

        return turn


def computing_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16; float16 on a GPU that only emulates it; float32 on the processor."""
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def _first_epoch(batches: Any) -> Any:
    """Have the first epoch come again, so that all contestants compute the same batches."""
    batches.set_epoch(0)
    return batches


def _free() -> None:
    if torch.accelerator.is_available():
        torch.get_device_module().empty_cache()


def _figures(seconds: dict[str, np.ndarray], steps: int, baseline: str) -> dict[str, Any]:
    """Return milliseconds a step, how many times as fast as the baseline it is, and the store's share of the ideal."""
    slow = seconds[baseline]
    return {
        "rounds": len(slow),
        "ms": {name: asdict(Spread.of(spent / steps * 1e3)) for name, spent in seconds.items()},
        "times as fast": {name: asdict(Spread.of(slow / spent)) for name, spent in seconds.items() if name != baseline},
        "share of the ideal": asdict(Spread.of(seconds["memory"] / seconds["store"])),
    }


if __name__ == "__main__":
    main()

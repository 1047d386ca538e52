"""Does loading hide behind the accelerator's work?

    python -m bench.overlap --steps 5,50 --mode warm,cold

An accelerator is emulated by a sleep of T ms a batch, which frees the GIL and the processor, after the batch was
touched. Four loops over the same batches: everything in memory; the reader with its thread; the reader without
(``depth=0``); and the reading alone (I/O). ``bound`` is max(sum of the steps as measured, I/O alone) + the first read:
what a perfect pipeline would take. The paper's table A.5 has these lines for its own hardware: 334 ms a batch without
loading, 351 with prefetch, 374 without.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import actcache
from actcache.reader import Reader
from bench.caches import drop_caches
from bench.corpus import Corpus, Documents
from bench.rounds import Spread
from bench.shapes import SHAPES

console = Console(width=120)


class Loop:
    """One way to go over the batches, timed round by round."""

    def __init__(self, name: str, batches: Callable[[int], Iterable[Any]]) -> None:
        self.name = name
        self.batches = batches
        self.walls: list[float] = []
        self.steps: list[float] = []  # sum of a round
        self.firsts: list[float] = []

    def run(self, epoch: int, seconds: float) -> None:
        start = time.perf_counter()
        steps, first = 0.0, None
        for batch in self.batches(epoch):
            begun = time.perf_counter()
            first = begun - start if first is None else first
            _touch(batch)
            if seconds:
                time.sleep(seconds)
            steps += time.perf_counter() - begun
        self.walls.append(time.perf_counter() - start)
        self.steps.append(steps)
        self.firsts.append(first or 0.0)


def _touch(batch: Any) -> None:
    """What a copy to a device would at least do: look at a page here and there."""
    batch.activations.reshape(-1)[:: 1 << 20].sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="paper")
    parser.add_argument("--steps", default="5,20,50", help="milliseconds of an accelerator's step")
    parser.add_argument("--mode", default="warm,cold")
    parser.add_argument("--backend", default="hdf5")
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each loop; 200 steps at least are counted")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--dir", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=options.dir))
    try:
        documents = Documents(SHAPES[options.shape], int(options.gib * 2**30))
        corpus = Corpus(documents, {options.backend: f"{options.backend}:{folder}/store"}, {})
        del documents
        for mode in options.mode.split(","):
            for milliseconds in options.steps.split(","):
                measure(corpus, options, mode, float(milliseconds) / 1e3)
    finally:
        shutil.rmtree(folder)


def measure(corpus: Corpus, options: argparse.Namespace, mode: str, seconds: float) -> None:
    spaces: dict[str, actcache.Space] = {}
    readers: dict[str, Reader] = {}

    def renew() -> None:
        """Open everything anew, cold: what a mapping has touched is not dropped from the page cache."""
        for space in spaces.values():
            space.close()
        readers.clear()
        drop_caches()
        for name, depth in (("ahead", options.depth), ("plain", 0), ("io", options.depth)):
            spaces[name] = corpus.open(options.backend)
            readers[name] = spaces[name].reader(corpus.keys, batch_size=corpus.shape.batch, shuffle=True, depth=depth)

    def reading(name: str) -> Callable[[int], Iterable[Any]]:
        def batches(epoch: int) -> Iterable[Any]:
            readers[name].set_epoch(epoch)
            return readers[name]

        return batches

    renew()
    kept = [batch for _, batch in zip(range(8), readers["plain"], strict=False)]
    count = len(readers["plain"])
    verdicts: list[str] = []
    loops = {
        "memory": Loop("in memory", lambda epoch: (kept[i % len(kept)] for i in range(count))),
        "ahead": Loop("reader", reading("ahead")),
        "plain": Loop("reader, no prefetch", reading("plain")),
        "io": Loop("reading alone", reading("io")),
    }
    rounds = max(options.rounds, -(-200 // count))
    for number in range(-1, rounds):
        for name in np.random.default_rng(number + 1).permutation(list(loops)).tolist():
            if mode == "cold" and name != "memory":
                renew()
            loop = loops[name]
            loop.run(number + 1, 0.0 if name == "io" else seconds)
            if name == "ahead":
                verdicts.append(readers["ahead"].stats().verdict())
            if number < 0:  # the first round warms up
                loop.walls.clear(), loop.steps.clear(), loop.firsts.clear()
    bound = np.maximum(loops["ahead"].steps, loops["io"].walls) + np.array(loops["ahead"].firsts)
    table = Table(title=f"{mode}, steps of {seconds * 1e3:.0f} ms, {count} batches a round, {rounds} rounds")
    for column in ("", "ms a batch", "wall / bound", "wall / in memory"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("memory", "ahead", "plain", "io"):
        walls = np.array(loops[name].walls)
        table.add_row(
            loops[name].name,
            f"{np.median(walls) / count * 1e3:.1f}",
            str(Spread.of(walls / bound)) if name in ("ahead", "plain") else "",
            str(Spread.of(walls / np.array(loops["memory"].walls))) if name in ("ahead", "plain") else "",
        )
    console.print(table)
    console.print(verdicts[-1])
    for space in spaces.values():
        space.close()


if __name__ == "__main__":
    main()

"""Does loading hide behind the accelerator's work?

    python -m bench.overlap --steps 5,20,50,200 --mode warm,cold
    python -m bench.overlap --steps 5,10,20,50,100,200,334        # the paper's own step among them; half an hour

An accelerator is emulated by a sleep of T ms a batch, which frees the GIL and the processor, after the batch was
touched. Four loops over the same batches take turns: everything in memory; the reader with its thread; the reader
without (``depth=0``); and the reading alone (I/O), whose consumer does nothing. Each takes at least ``--least`` steps,
over as many epochs as that needs; the interval is over epochs.

``bound`` is the target's: max(sum of the steps as measured, I/O alone) + the first read. I/O alone has a first read of
its own, so ``strict`` leaves that one out: it is what a perfect pipeline would take, and no reader can do better. The
steps are measured in the reader's own loop; that it does not lengthen them shows against the loop in memory.

Warm: in the page cache. Cold: before every epoch the page cache is dropped and the space opened anew.

Appendix A.5 of the embedding recycling paper has these three loops for its own hardware (BERT-base, NVIDIA A10G):
334 ms a batch from memory, 351 from disk with prefetch, 374 without. The last table holds them beside what was
measured, and says whether the order is the same.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

import actcache
from actcache.admin.benchmark.caches import refuse_mappings
from actcache.admin.benchmark.corpus import SHAPES, Documents, StoredCorpus
from actcache.admin.benchmark.rounds import Spread
from actcache.reader.reader import Reader
from bench.caches import drop_caches
from bench.report import Cell, Report

#: Milliseconds a batch in the paper's table: from memory, with prefetch, without.
PAPER = {"memory": 334.0, "ahead": 351.0, "plain": 374.0}
NAMES = {"memory": "in memory", "ahead": "reader", "plain": "reader, no prefetch", "io": "reading alone"}


class Loop:
    """One way to go over the batches, timed epoch by epoch."""

    def __init__(self, batches: Callable[[int], Iterable[Any]]) -> None:
        self.batches = batches
        self.walls: list[float] = []
        self.steps: list[float] = []  # sum of an epoch
        self.firsts: list[float] = []

    def run(self, epoch: int, seconds: float, most: int | None = None) -> None:
        start = time.perf_counter()
        steps, first = 0.0, None
        for batch in itertools.islice(self.batches(epoch), most):
            begun = time.perf_counter()
            first = begun - start if first is None else first
            if seconds:
                _touch(batch)
                time.sleep(seconds)
            steps += time.perf_counter() - begun
        self.walls.append(time.perf_counter() - start)
        self.steps.append(steps)
        self.firsts.append(first or 0.0)

    def forget(self) -> None:
        for figures in (self.walls, self.steps, self.firsts):
            figures.clear()


def _touch(batch: Any) -> None:
    """What a copy to a device would at least do: look at a page here and there."""
    batch.activations.reshape(-1)[:: 1 << 20].sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="paper")
    parser.add_argument("--steps", default="5,20,50,200", help="milliseconds of an accelerator's step")
    parser.add_argument("--mode", default="warm,cold")
    parser.add_argument("--backend", default="hdf5")
    parser.add_argument("--layout", default="padded", choices=("padded", "packed"))
    parser.add_argument("--gib", type=float, default=1.0, help="size of the corpus")
    parser.add_argument("--least", type=int, default=200, help="steps of each loop")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each loop, at least")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--dir", type=Path, help="where to put the corpus (removed afterwards)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    report = Report()
    folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=options.dir))
    try:
        documents = Documents(SHAPES[options.shape], int(options.gib * 2**30))
        corpus = StoredCorpus(documents, {options.backend: f"{options.backend}:{folder}/store"}, {})
        del documents
        for mode in options.mode.split(","):
            runs = {
                milliseconds: Run(corpus, folder, options, mode).measure(float(milliseconds) / 1e3, report)
                for milliseconds in options.steps.split(",")
            }
            beside_the_paper(mode, runs, report)
    finally:
        shutil.rmtree(folder)
    report.save(options.json)


class Run:
    """The four loops over one corpus, at one temperature."""

    def __init__(self, corpus: StoredCorpus, folder: Path, options: argparse.Namespace, mode: str) -> None:
        self._corpus, self._folder, self._options, self._mode = corpus, folder, options, mode
        self._spaces: dict[str, actcache.Space] = {}
        self._readers: dict[str, Reader] = {}

    def _open(self) -> None:
        """Open everything anew: what a mapping has touched is not dropped from the page cache."""
        self._close()
        if self._mode == "cold":
            refuse_mappings([self._folder / "store"])
            drop_caches(self._folder)
        depth = self._options.depth
        for name, ahead in (("ahead", depth), ("plain", 0), ("io", depth)):
            self._spaces[name] = self._corpus.open(self._options.backend)
            self._readers[name] = self._spaces[name].reader(
                self._corpus.keys,
                batch_size=self._corpus.shape.batch,
                shuffle=True,
                depth=ahead,
                layout=self._options.layout,
            )

    def _close(self) -> None:
        for space in self._spaces.values():
            space.close()
        self._readers.clear()

    def _batches(self, name: str) -> Callable[[int], Iterable[Any]]:
        def batches(epoch: int) -> Iterable[Any]:
            self._readers[name].set_epoch(epoch)
            return self._readers[name]

        return batches

    def measure(self, seconds: float, report: Report) -> dict[str, float]:
        """Print the table of one length of steps; return the ms a batch of the loops."""
        self._open()
        kept = list(itertools.islice(self._readers["plain"], 8))
        count = len(self._readers["plain"])
        loops = {name: Loop(self._batches(name)) for name in ("ahead", "plain", "io")}
        loops["memory"] = Loop(lambda epoch: itertools.islice(itertools.cycle(kept), count))
        epochs = max(self._options.rounds, -(-self._options.least // count))
        verdict = ""
        for number in range(-1, epochs):
            for name in np.random.default_rng(number + 1).permutation(list(loops)).tolist():
                if self._mode == "cold" and name != "memory":
                    self._open()
                # The first round warms up: buffers and mappings, for which a few steps do where it is cold.
                most = 8 if number < 0 and (self._mode == "cold" or name == "memory") else None
                pause = 0.0 if name == "io" else min(seconds, 0.005) if number < 0 else seconds
                loops[name].run(max(number, 0), pause, most)
                if name == "ahead":
                    stats = self._readers["ahead"].stats()
                    verdict = f"{stats.verdict()}; stalled {stats.stall_fraction:.1%}"
                if number < 0:
                    loops[name].forget()
        self._close()
        return _print(self._mode, seconds, count, loops, verdict, report)


def _print(
    mode: str, seconds: float, count: int, loops: dict[str, Loop], verdict: str, report: Report
) -> dict[str, float]:
    walls = {name: np.array(loop.walls) for name, loop in loops.items()}
    steps, firsts, alone = (
        np.array(figures) for figures in (loops["ahead"].steps, loops["ahead"].firsts, loops["io"].walls)
    )
    bound = np.maximum(steps, alone) + firsts
    strict = np.maximum(steps, alone - np.array(loops["io"].firsts)) + firsts
    rows: list[list[Cell]] = []
    for name in ("memory", "ahead", "plain", "io"):
        each: Cell = Spread.of(walls[name] / count * 1e3)
        against = (bound, strict, walls["memory"]) if name in ("ahead", "plain") else ()
        ratios: list[Cell] = [Spread.of(walls[name] / other) for other in against] or [None, None, None]
        mean_step = None if name == "io" else float(np.median(loops[name].steps)) / count * 1e3
        rows.append([NAMES[name], each, mean_step, *ratios])
    total = count * len(steps)
    title = f"{mode}, steps of {seconds * 1e3:.0f} ms: {total} steps in {len(steps)} epochs of {count}"
    columns = ("", "ms a batch", "of which step", "wall / bound", "wall / strict", "wall / in memory")
    report.table(title, columns, rows)
    report.say(verdict)
    return {name: float(np.median(wall)) / count * 1e3 for name, wall in walls.items()}


def beside_the_paper(mode: str, runs: dict[str, dict[str, float]], report: Report) -> None:
    """Print the paper's three lines beside ours, in ms a batch and as ratios to everything in memory."""
    rows: list[list[Cell]] = []
    for name, paper in PAPER.items():
        ours = [f"{run[name]:.1f} ({run[name] / run['memory']:.2f})" for run in runs.values()]
        rows.append([NAMES[name], f"{paper:.0f} ({paper / PAPER['memory']:.2f})", *ours])
    same = ["yes" if run["memory"] <= run["ahead"] <= run["plain"] else "no" for run in runs.values()]
    rows.append(["in this order", "yes", *same])
    columns = ("ms a batch (of in memory)", "the paper", *(f"{milliseconds} ms" for milliseconds in runs))
    report.table(f"The paper's table A.5 beside ours, {mode}", columns, rows)


if __name__ == "__main__":
    main()

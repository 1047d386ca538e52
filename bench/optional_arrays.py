"""What do optional arrays (spans, word ids, type ids) cost who reads an entry with them?

    python -m bench.optional_arrays --backends hdf5,zarr,lmdb,ram

The same documents in two stores of one backend, one of them with character spans. ``space.get`` in shuffled batches
and ``space.verify`` of both, in turns, warm: the ratio of a turn with spans to the turn without of the same round, by
the clock, and by the time of the processors, which other work on the machine lengthens less. The target is 1.5 at most.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

import actcache
from actcache.admin.benchmark import rounds
from actcache.admin.benchmark.rounds import Spread
from actcache.store.space import Space
from bench.report import Cell, Report

TARGET = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="hdf5,zarr,lmdb,ram", help="schemes of stores, or whole s3:// URLs")
    parser.add_argument("--entries", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=30, help="of each entry")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--batch", type=int, default=0, help="entries of a get; 0 for all of them in one")
    parser.add_argument("--repeat", type=int, default=5, help="times that a turn does its work")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dir", type=Path, help="where to put the stores (removed afterwards)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    report = Report()
    for backend in options.backends.split(","):
        folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=options.dir))
        try:
            place = backend.rstrip("/") if "://" in backend else f"{backend}:{folder}"
            compare(place, backend, options, report)
        finally:
            shutil.rmtree(folder)
    report.save(options.json)


def compare(place: str, backend: str, options: argparse.Namespace, report: Report) -> None:
    """Print what reading takes in one backend."""
    recipe = actcache.Recipe(model="bench-optional", layer=1, hidden_size=options.hidden)
    rng = np.random.default_rng(0)
    shape = (options.entries, options.tokens, options.hidden)
    rows = list(rng.standard_normal(shape, np.float32).astype(np.float16))
    ids = [np.arange(options.tokens)] * options.entries
    spans = [np.stack([ids[0] * 5, ids[0] * 5 + 4], axis=1)] * options.entries
    keys = [actcache.document_key(f"document {i}") for i in range(options.entries)]
    size = options.batch or options.entries
    batches = [[keys[i] for i in rng.permutation(options.entries)[:size]] for _ in range(-(-options.entries // size))]

    def get(space: Space) -> None:
        for batch in batches * options.repeat:
            space.get(batch)

    def verify(space: Space) -> None:
        if not all(space.verify().intact for _ in range(options.repeat)):
            raise RuntimeError(f"{place} is damaged")

    turns: dict[str, Callable[[], None]] = {}
    for name, given in (("without", None), ("with spans", spans)):
        store = actcache.open(f"{place}/{name.partition(' ')[0]}")
        space = store.space(recipe)
        space.put(keys, rows, ids, spans=given)
        space.flush()
        entry = space.get(keys[:1])[0]
        if entry is None or not np.array_equal(entry.activations, rows[0]) or ("spans" in entry.extras) != bool(given):
            raise RuntimeError(f"{place} does not give back what was put")
        turns |= {f"{work.__name__}, {name}": partial(work, space) for work in (get, verify)}
    processor: dict[str, list[float]] = {name: [] for name in turns}

    def timed(name: str, _: int) -> float:
        start = time.process_time()
        turns[name]()
        processor[name].append(time.process_time() - start)
        return 0.0

    seconds = rounds.take_turns({name: partial(timed, name) for name in turns}, options.rounds)
    table: list[list[Cell]] = []
    for what in ("get", "verify"):
        without, with_spans = seconds[f"{what}, without"], seconds[f"{what}, with spans"]
        ratio = Spread.of(with_spans / without)
        busy, busy_with = (np.array(processor[f"{what}, {name}"][1:]) for name in ("without", "with spans"))
        met = "yes" if ratio.low <= TARGET else "no"
        table.append(
            [
                what,
                *(Spread.of(spent / options.repeat * 1e3) for spent in (without, with_spans)),
                ratio,
                Spread.of(busy_with / busy),
                met,
            ]
        )
    title = f"{backend}: {options.entries} entries of {options.tokens} x {options.hidden}, {size} at a time, warm"
    report.table(title, ("", "ms without", "ms with spans", "ratio", "of processor time", f"<= {TARGET}"), table)


if __name__ == "__main__":
    main()

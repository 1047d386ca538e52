"""What benchmarks of one stored corpus a shape and backend share: their options, and a folder for each."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from actcache.admin.benchmark.corpus import SHAPES, Shape
from bench.report import Report

Compare = Callable[[Shape, str, Path, argparse.Namespace, Report], None]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that ``run`` looks at; more may be added."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="paper,short", help="paper (60-512 tokens x 768), short (8-48 x 384)")
    parser.add_argument("--backends", default="hdf5", help="hdf5, zarr, lmdb, safetensors")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the corpus")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dir", type=Path, help="where to put the corpus (removed afterwards)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser


def run(options: argparse.Namespace, compare: Compare) -> None:
    """Compare for each shape and backend in a new folder, which is removed; write the figures that were asked for."""
    report = Report()
    for shape in (SHAPES[name] for name in options.shape.split(",")):
        for backend in options.backends.split(","):
            folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=options.dir))
            try:
                compare(shape, backend, folder, options, report)
            finally:
                shutil.rmtree(folder)
    report.save(options.json)

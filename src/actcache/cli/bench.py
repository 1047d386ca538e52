"""``cachectl bench``: what this disk can do, and what of it each backend reaches."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from actcache.admin import benchmark
from actcache.admin.benchmark import Comparison, plot
from actcache.admin.display import fields_as_json
from actcache.cli import options
from actcache.cli.common import console, print_json, say, table
from actcache.format.arguments import nbytes_of
from actcache.io.progress import Meter

_FASTEST, _SIDE_BY_SIDE = "fastest raw read of the same documents", "one large read of as many bytes"
_FEW = 4  # batches of a turn
_SHOWN = ("actcache", "python", "numpy", "xxhash", "h5py", "zarr", "lmdb", "torch")  # whose versions matter here

_LIMITS = {
    "warm": "the fastest raw way to bring the same documents' rows into the same buffer, and the fastest xxh3 pass "
    "over them",
    "cold": "direct reads (O_DIRECT) of the same documents, 8 to 32 at a time, neither checked nor put in order",
}
_STATES = {
    "warm": "in the page cache and mapped before anything is timed",
    "cold": "before every turn the stores' pages are dropped by POSIX_FADV_DONTNEED, which needs no rights, mincore "
    "confirms that they are gone, and the store is opened anew within the time",
}


def bench(
    folder: Annotated[
        Path, typer.Argument(help="On the disk that is measured; a scratch folder is made in it and removed.")
    ] = Path("."),
    backend: Annotated[
        list[str] | None,
        typer.Option(help="A backend that keeps a store in a folder; may be repeated. Default: all installed."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="paper (60-512 tokens x 768) or short (8-48 x 384); may be repeated. Default: paper."),
    ] = None,
    mode: Annotated[list[str] | None, typer.Option(help="cold or warm; may be repeated. Default: cold.")] = None,
    size: Annotated[
        str, typer.Option(help="Bytes of rows, written once for each backend and once more, and held in memory once.")
    ] = "1GiB",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; intervals mean little with fewer than 9.")] = 15,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Also draw it: a .png, .svg or .pdf file (needs the extra plots).")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show every raw way that was tried, and how all was measured.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the scratch folder where it is.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure how fast this disk gives stored activations back, beside what it can do at all.

    Backends and raw reads take turns, round by round, over the same shuffled batches; a ratio is of two turns of one
    round, its interval holds the true median with 95 % confidence. Checksums are on. Removes what it wrote, also when
    it is interrupted or told to end. Shows what it is compared with in two lines, with --verbose every raw way.

    Example: cachectl bench /data --backend hdf5 --backend lmdb --plot disk.png
    """
    if plot_file is not None:
        plot.check(plot_file)
    with Meter("bench", "turns", show=not quiet) as meter:
        found = benchmark.run(
            folder,
            backends=backend,
            shapes=shape or ("paper",),
            modes=mode or ("cold",),
            nbytes=nbytes_of("--size", size),
            rounds=rounds,
            keep=keep,
            progress=meter,
        )
    command = shlex.join(["cachectl", *sys.argv[1:]])
    if plot_file is not None:
        plot.save(found, plot_file)
    if as_json:
        print_json({"command": command, **fields_as_json(found)})
        return
    say(command)
    for name, value in found.facts.items():
        say(f"  {name}: {value}")
    versions = [f"{name} {found.versions[name].partition(' ')[0]}" for name in _SHOWN if name in found.versions]
    say(f"  versions: {', '.join(versions)}")
    for name, why in found.left_out.items():
        say(f"  left out: {name}: {why}")
    for one in found.comparisons:
        say("")
        _show(one, rounds, verbose)
    if plot_file is not None:
        say(f"plot: {plot_file}")


def _show(one: Comparison, rounds: int, verbose: bool) -> None:
    words = {f"the limit: {one.limit}": _FASTEST, f"one coalesced read: {one.coalesced}": _SIDE_BY_SIDE}
    shown = table(one.title, ("",), ("GB/s", "of the limit", "of one coalesced read"))
    if not verbose:
        shown = table(one.title, ("",), ("GB/s", "of the fastest raw read"))
    for row in one.contestants:
        if not (verbose or row.checked or row.name in words):
            continue
        name = row.name if verbose else words.get(row.name, row.name)
        ratios = [str(ratio) for ratio in row.ratios] or ["", ""]
        shown.add_row(
            Text(name, style="bold" if row.checked else ""), str(one.speed(row)), *ratios[: 2 if verbose else 1]
        )
    console().print(shown)
    if verbose:
        say(f"the limit: {_LIMITS[one.mode]}; here {one.limit}")
        say(f"one coalesced read: as many bytes side by side, which no shuffled batch can be; here {one.coalesced}")
        say(f"{one.mode}: {_STATES[one.mode]}")
    say(f"{rounds} rounds of {one.batches} batches of {one.batch} documents; median [95 % interval]")
    if one.mode == "cold" and one.batches < _FEW:
        say("so few documents are mostly the opening and the first read: a larger --size says more about the disk")

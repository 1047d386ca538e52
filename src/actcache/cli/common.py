"""What the commands share: arguments, and how results are shown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

_PLAIN_WIDTH = 120  # where stdout is no terminal

StoreArgument = Annotated[str, typer.Argument(help="Path or URL of the store.", show_default=False)]
SpaceOption = Annotated[
    list[str] | None, typer.Option("--space", help="Only the space whose fingerprint begins so; may be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]

#: How much of a fingerprint tables show.
SHORT = 12


def console() -> Console:
    """Return where results are printed: stdout, with a fixed width where that is no terminal."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=_PLAIN_WIDTH)


def say(text: str) -> None:
    """Print a line of a result."""
    console().print(text, highlight=False, soft_wrap=True, markup=False)


def print_json(value: Any) -> None:
    """Print a result for machines."""
    print(json.dumps(value, indent=1))


def table(title: str, left: Iterable[str], right: Iterable[str] = ()) -> Table:
    """Return a table whose last columns, ``right``, hold numbers."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in left:
        made.add_column(name, no_wrap=True)
    for name in right:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def counted(number: int, thing: str, things: str | None = None) -> str:
    """Return a number with its noun."""
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"


def binary(nbytes: float) -> str:
    """Return a number of bytes with a binary unit."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def span(seconds: float) -> str:
    """Return a time span in its largest unit."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:,.{int(seconds < 10 * length)}f} {unit}"
    return f"{seconds:,.0f} s"

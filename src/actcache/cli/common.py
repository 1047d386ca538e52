"""What the commands share: arguments, and how results are shown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from actcache.admin.report.words import binary, clean, counted, span
from actcache.cli.corpus import Kind
from actcache.cli.streams import shown

__all__ = [
    "SHORT",
    "FieldOption",
    "FormatOption",
    "JsonOption",
    "QuietOption",
    "SpaceOption",
    "StoreArgument",
    "binary",
    "console",
    "counted",
    "notice",
    "print_json",
    "say",
    "span",
    "table",
]

_PLAIN_WIDTH = 120  # where stdout is no terminal

StoreArgument = Annotated[str, typer.Argument(help="Path or URL of the store.", show_default=False)]
SpaceOption = Annotated[
    list[str] | None, typer.Option("--space", help="Only the space whose fingerprint begins so; may be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
FieldOption = Annotated[
    str | None, typer.Option(help="The column or JSON field of the corpus's texts; without one, lines are the texts.")
]
FormatOption = Annotated[
    Kind | None,
    typer.Option(
        "--format",
        help="What the corpus's files hold, where their names do not say so; text: lines, whatever they hold.",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]

#: How much of a fingerprint tables show.
SHORT = 12


class _Console(Console):
    """Prints texts as they are: a model's name is no markup, and has no say in what the terminal does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        # First what is no character (a file name's bytes), then what stands for one that is no text.
        visible = shown(clean(shown(text, self.encoding)), self.encoding)
        return super().render_str(visible, **options)


def console() -> Console:
    """Return where results are printed: stdout, with a fixed width where that is no terminal."""
    terminal = _Console()
    return terminal if terminal.is_terminal else _Console(width=_PLAIN_WIDTH)


def say(text: str) -> None:
    """Print a line of a result."""
    console().print(text, highlight=False, soft_wrap=True)


def notice(text: str) -> None:
    """Print a line beside the result, on stderr: what is no failure, and perhaps not what was meant."""
    _Console(stderr=True).print(text, highlight=False, soft_wrap=True)


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

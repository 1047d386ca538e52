"""``cachectl inspect``: what a store holds."""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from actcache.inspection import SpaceReport
from actcache.inspection import inspect as inspect_store
from actcache.store import open_store

_PLAIN_WIDTH = 120  # where stdout is no terminal


def inspect(
    store: Annotated[str, typer.Argument(help="Path or URL of the store.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the spaces of a store: what is in them, and by which recipe.

    Example: cachectl inspect ./activations
    """
    with open_store(store, mode="r") as opened:
        reports = inspect_store(opened)
        collections = opened.collections()
    if as_json:
        spaces = [report.to_json() for report in reports]
        print(json.dumps({"store": store, "spaces": spaces, "collections": collections}, indent=1))
        return
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=_PLAIN_WIDTH)
    console.print(_summary(store, reports))
    for report in reports:
        console.print(_recipe(report))
    if collections:
        console.print(f"collections: {', '.join(collections)}", highlight=False)


def _summary(store: str, reports: list[SpaceReport]) -> Table:
    table = Table(title=f"{store}: {len(reports)} space{'' if len(reports) == 1 else 's'}")
    for name in ("space", "model", "layer", "dtype"):
        table.add_column(name, no_wrap=name != "model")
    for name in ("entries", "tokens", "bytes", "segments", "damaged"):
        table.add_column(name, justify="right", no_wrap=True)
    for report in reports:
        recipe, usage = report.recipe, report.usage
        table.add_row(
            recipe.fingerprint[:12],
            PurePath(recipe.model).name,
            str(recipe.layer),
            recipe.dtype,
            f"{usage.entries:,}",
            f"{usage.tokens:,}",
            binary(usage.nbytes),
            f"{usage.segments:,}",
            f"{len(report.damaged):,}",
        )
    return table


def _recipe(report: SpaceReport) -> Table:
    recipe = report.recipe
    table = Table(title=f"space {recipe.fingerprint}", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in recipe.identity().items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}={item}" for key, item in value.items())
        table.add_row(name, str(value))
    table.add_section()
    for name, value in recipe.to_json()["provenance"].items():
        table.add_row(name, value)
    for name, what in report.damaged.items():
        table.add_row(f"damaged {name}", what)
    return table


def binary(nbytes: int) -> str:
    """Return a number of bytes with a binary unit."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"

"""``cachectl inspect``: what a store holds."""

from __future__ import annotations

from pathlib import PurePath

from rich.table import Table

from actcache import inspection
from actcache.cli.common import JsonOption, SpaceOption, StoreArgument, binary, console, counted, print_json, say
from actcache.inspection import SpaceReport
from actcache.store import open_store


def inspect(store: StoreArgument, space: SpaceOption = None, as_json: JsonOption = False) -> None:
    """Show the spaces of a store in full: what is in them, and by which recipe.

    Example: cachectl inspect ./activations
    """
    with open_store(store, mode="r") as opened:
        found = inspection.inspect(opened, space or ())
    if as_json:
        spaces = [report.to_json() for report in found.spaces]
        rest = {"unreadable": found.unreadable, "collections": found.collections}
        print_json({"store": store, "spaces": spaces, **rest})
        return
    terminal = console()
    terminal.print(_summary(store, found.spaces))
    for report in found.spaces:
        terminal.print(_recipe(report))
    for name, what in found.unreadable.items():
        say(f"unreadable {name}: {what}")
    if found.collections:
        say(f"collections: {', '.join(found.collections)}")


def _summary(store: str, reports: list[SpaceReport]) -> Table:
    table = Table(title=f"{store}: {counted(len(reports), 'space')}")
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

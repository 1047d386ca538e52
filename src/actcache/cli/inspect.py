"""``cachectl inspect``: what a store holds."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Annotated, Any

import typer
from rich.table import Table

from actcache.admin import inspection
from actcache.admin import report as reporting
from actcache.admin.inspection import SpaceReport, StoreReport
from actcache.admin.report import SAMPLE, DocumentReport, SegmentDetail, Survey
from actcache.cli.common import (
    SHORT,
    JsonOption,
    QuietOption,
    SpaceOption,
    StoreArgument,
    binary,
    console,
    counted,
    print_json,
    say,
)
from actcache.cli.inspected import recipe_table, show
from actcache.cli.streams import text_of
from actcache.errors import UsageError
from actcache.io.newfile import check_new
from actcache.io.progress import Meter
from actcache.store.store import open_store

_DAMAGED = 4


def inspect(
    store: StoreArgument,
    space: SpaceOption = None,
    segment: Annotated[str | None, typer.Option(help="One segment: how its name begins.")] = None,
    text: Annotated[str | None, typer.Option(help="One document, by its text.")] = None,
    key: Annotated[
        str | None, typer.Option(help="One document, or a window of one: its key in hexadecimal, or how that begins.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots to this new file.")] = None,
    sample: Annotated[
        int | None,
        typer.Option(min=0, help=f"How many entries of each space, or of the segment, are read; default: {SAMPLE}."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Read all entries, and every segment without the help of an index.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Draws the same entries again.")] = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what is in a store, a space, a segment or a document, and by which recipe. Changes nothing.

    With --space, --segment, --html, --sample or --all some entries, drawn at random, or all are read and compared with
    their checksums: their norms, mean and deviation, what is NaN or infinite. With --text or --key, the document's
    entries in all spaces, windows too. Exit code 3 where there is no such document, 4 where what was looked at in such
    detail is damaged.

    Example: cachectl inspect ./activations --html report.html
    """
    if sum(one is not None for one in (segment, text, key, html)) > 1:
        raise UsageError("--segment, --text, --key and --html look at different things: give one of them")
    if every and sample is not None:
        raise UsageError("--sample and --all are two numbers of entries: give one of them")
    in_detail = bool(space) or every or sample is not None or html is not None
    options: dict[str, Any] = {"sample": None if every else SAMPLE if sample is None else sample, "seed": seed}
    if html is not None:
        check_new(html)  # before anything is read for it
    report: SegmentDetail | DocumentReport | Survey
    with open_store(store, mode="r") as opened, Meter("read", "entries", show=not quiet) as meter:
        options["progress"] = meter
        if segment is not None:
            report = reporting.segment_detail(opened, segment, space or (), **options)
        elif text is not None:
            report = reporting.document_by_text(opened, text_of(text), space or ())
        elif key is not None:
            report = reporting.document_by_key(opened, key, space or ())
        elif in_detail:
            report = reporting.survey(opened, space or (), **options)
        else:
            _show_store(store, inspection.inspect(opened), as_json)
            return
    page: dict[str, Any] = {}
    if html is not None and isinstance(report, Survey):
        page = {"html": str(html), "html_bytes": reporting.write_page(report, html)}
    if as_json:
        print_json({"store": store, **report.to_json(), **page})
    elif page:
        damage = "" if report.intact else "; something is damaged, it says what"
        say(f"{html}: {binary(page['html_bytes'])}{damage}")
    else:
        show(report)
    if not report.intact:
        raise typer.Exit(_DAMAGED)


def _show_store(store: str, found: StoreReport, as_json: bool) -> None:
    if as_json:
        spaces = [report.to_json() for report in found.spaces]
        rest = {"unreadable": found.unreadable, "collections": found.collections}
        print_json({"store": store, "spaces": spaces, **rest})
        return
    terminal = console()
    terminal.print(_summary(store, found.spaces))
    for report in found.spaces:
        terminal.print(recipe_table(report.recipe, f"space {report.recipe.fingerprint}", report.damaged))
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
            recipe.fingerprint[:SHORT],
            PurePath(recipe.model).name,
            str(recipe.layer),
            recipe.stored_as,
            f"{usage.entries:,}",
            f"{usage.tokens:,}",
            binary(usage.nbytes),
            f"{usage.segments:,}",
            f"{len(report.damaged):,}",
        )
    return table

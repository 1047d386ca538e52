"""``cachectl inspect``: what a store holds."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.table import Table

from actcache.admin import inspection
from actcache.admin import report as reporting
from actcache.admin.display import ago, binary, counted, entries, fields_as_json, model_name, number, spelled
from actcache.admin.inspection import SpaceReport, StoreReport
from actcache.cli import options
from actcache.cli.common import SHORT, ExitCode, console, print_json, quieten_transformers, say, say_rest, table
from actcache.cli.shell import text_of_argument
from actcache.errors import UsageError
from actcache.format.recipe import Recipe
from actcache.io.newfile import check_new
from actcache.io.progress import Meter
from actcache.store.store import open_store

_BAR = 40  # characters
_MOST = 20  # segments, ids
_CORRUPT = 5  # keys
_UNKNOWN = "at an unknown time"


def inspect(
    store: options.Store,
    space: options.Spaces = None,
    segment: Annotated[str | None, typer.Option(help="One segment: how its name begins.")] = None,
    text: Annotated[str | None, typer.Option(help="One document, by its text.")] = None,
    key: Annotated[
        str | None, typer.Option(help="One document, or a window of one: its key in hexadecimal, or how that begins.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots to this new file.")] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            min=0, help=f"How many entries of each space, or of the segment, are read; default: {reporting.SAMPLE}."
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Read all entries, and every segment without the help of an index.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Draws the same entries again.")] = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
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
    reading: dict[str, Any] = {"seed": seed}
    reading["sample"] = None if every else reporting.SAMPLE if sample is None else sample
    if html is not None:
        check_new(html)  # before anything is read for it
    report: reporting.SegmentDetail | reporting.DocumentReport | reporting.StoreDetail
    with open_store(store, mode="r") as opened, Meter("read", "entries", show=not quiet) as meter:
        reading["progress"] = meter
        if segment is not None:
            report = reporting.segment_detail(opened, segment, space or (), **reading)
        elif text is not None:
            report = reporting.document_by_text(opened, text_of_argument(text), space or ())
        elif key is not None:
            report = reporting.document_by_key(opened, key, space or ())
        elif in_detail:
            report = reporting.store_detail(opened, space or (), **reading)
        else:
            _show_store(store, inspection.inspect(opened), as_json)
            return
    page: dict[str, Any] = {}
    if html is not None and isinstance(report, reporting.StoreDetail):
        page = {"html": str(html), "html_nbytes": reporting.write_page(report, html, _decoder())}
    if as_json:
        print_json({"store": store, **report.to_json(), **page})
    elif page:
        damage = "" if report.intact else "; something is damaged, it says what"
        say(f"{html}: {binary(page['html_nbytes'])}{damage}")
    else:
        _show(report)
    if not report.intact:
        raise typer.Exit(ExitCode.DAMAGED)


def _decoder() -> Any:
    """Return what finds a space's tokenizer, where transformers is installed."""
    with contextlib.suppress(ImportError):
        from actcache.models.decoding import decoder_of

        quieten_transformers()
        return decoder_of
    return None


def _show_store(store: str, found: StoreReport, as_json: bool) -> None:
    if as_json:
        print_json({"store": store, **fields_as_json(found)})
        return
    terminal = console()
    terminal.print(_summary(store, found.spaces))
    for report in found.spaces:
        terminal.print(_recipe_table(report.recipe, f"space {report.recipe.fingerprint}", report.damaged))
    say_rest(found.unreadable, found.collections)


def _summary(store: str, reports: list[SpaceReport]) -> Table:
    """Return a table that fits into 80 columns: what is damaged has a column where something is."""
    damaged = any(report.damaged for report in reports)
    numbers = ("entries", "tokens", "bytes", "segments", *(["damaged"] if damaged else []))
    summary = table(f"{store}: {counted(len(reports), 'space')}", ("space", "model", "layer", "dtype"), numbers)
    for name in ("model", "layer", "dtype"):  # long ones go on in another line; numbers are never cut
        column = next(column for column in summary.columns if column.header == name)
        column.no_wrap, column.overflow = False, "fold"
    for report in reports:
        recipe, usage = report.recipe, report.usage
        words = (recipe.fingerprint[:SHORT], model_name(recipe), recipe.site_name.removeprefix("layer "))
        sizes = (f"{usage.entries:,}", f"{usage.tokens:,}", binary(usage.nbytes), f"{usage.segments:,}")
        summary.add_row(*words, recipe.stored_as, *sizes, *([f"{len(report.damaged):,}"] if damaged else []))
    return summary


def _show(report: reporting.StoreDetail | reporting.SegmentDetail | reporting.DocumentReport) -> None:
    if isinstance(report, reporting.SegmentDetail):
        _show_segment(report)
    elif isinstance(report, reporting.DocumentReport):
        _show_document(report)
    else:
        for space in report.spaces:
            _show_space(space)
        say_rest(report.unreadable, ())


def _recipe_table(recipe: Recipe, title: str, damaged: Mapping[str, str]) -> Table:
    """Return a recipe in full: what decides the numbers, then where they came from; and what is damaged."""
    made = table(title, ("what", "value"))
    made.show_header = False
    made.columns[1].no_wrap, made.columns[1].overflow = False, "fold"
    for name, value in recipe.identity().items():
        made.add_row(name, spelled(value))
    made.add_section()
    for name, value in recipe.to_json()["provenance"].items():
        made.add_row(name, value)
    for name, what in damaged.items():
        made.add_row(f"damaged {name}", what)
    return made


def _show_space(detail: reporting.SpaceDetail) -> None:
    usage = detail.report.usage
    console().print(_recipe_table(detail.recipe, f"space {detail.recipe.fingerprint}", detail.report.damaged))
    written = "" if detail.written is None else f", last written to {ago(detail.written)}"
    say(f"made {ago(detail.made, _UNKNOWN)}{'' if detail.owner is None else f' by {detail.owner}'}{written}")
    say(f"{entries(usage.entries)}, {counted(usage.tokens, 'token')}")
    say(f"{binary(usage.nbytes)}{_compression(detail)}")
    for name, held in detail.passages.items():
        say(f"collection {name}: {held.told()}")
    if detail.errors is not None:
        say(f"storing changes {detail.errors.told()}")
    if detail.errors_damaged is not None:
        say(f"{detail.errors_damaged}; fill again with --max-error to have it measured anew")
    _show_lengths(detail.lengths)
    _show_rows(detail)
    _show_segments(detail.segments)
    _show_sample(detail.sample)


def _show_rows(detail: reporting.SpaceDetail) -> None:
    rows = detail.rows
    if not rows.count:
        return
    spread = [number(float(figure)) for figure in (*_ends(rows.mean), *_ends(rows.std), *_ends(rows.maximum))]
    say(f"statistics of {rows.count:,} of {detail.report.usage.tokens:,} rows: mean norm {number(rows.mean_norm)}")
    say(
        f"  by dimension: means {spread[0]} to {spread[1]}, standard deviations {spread[2]} to {spread[3]}, maxima "
        f"{spread[4]} to {spread[5]}"
    )


def _ends(figures: NDArray[np.float64]) -> tuple[float, float]:
    return float(figures.min()), float(figures.max())


def _show_segment(detail: reporting.SegmentDetail) -> None:
    segment = detail.report
    say(f"segment {segment.name} of space {detail.recipe.fingerprint}")
    size = binary(segment.nbytes) or "no file"
    say(f"{entries(segment.entries)}, {counted(segment.tokens, 'token')}, {size}: {segment.state}")
    written = ago(segment.age, _UNKNOWN)
    provenance = ", ".join(f"{name} {value}" for name, value in detail.recipe.to_json()["provenance"].items())
    say(f"written {written}{'' if segment.owner is None else f' by {segment.owner}'}; the space: {provenance}")
    if segment.damaged is not None:
        say(f"damaged: {segment.damaged}")
    _show_lengths(detail.lengths)
    _show_sample(detail.sample)


def _show_document(report: reporting.DocumentReport) -> None:
    say(f"document {report.key.hex()}: {entries(len(report.entries))}")
    for before, entry in zip([None, *report.entries], report.entries, strict=False):
        if before is None or before.recipe != entry.recipe:
            say(f"space {entry.recipe.fingerprint[:SHORT]} ({entry.recipe.model} {entry.recipe.site_name})")
        _show_entry(entry)
    for name, what in report.unreadable.items():
        say(f"unreadable {name[:SHORT]}: {what}")


def _show_entry(entry: reporting.EntryReport) -> None:
    recipe, window = entry.recipe, entry.window
    if window is not None:
        last = ", the last" if window.last else ""
        say(f"  window {window.number}{last}, cut at {window.max_length} tokens with stride {window.stride}")
        say(f"  key {entry.key.hex()}")
    size = f"{counted(entry.tokens, 'token')} x {recipe.hidden_size} {recipe.stored_as}, {binary(entry.nbytes)}"
    say(f"  {size}{'' if entry.segment is None else f', in {entry.segment}'}")
    say(f"  checksum {entry.checksum:016x}: {'intact' if entry.intact else 'CORRUPT, cachectl repair takes it away'}")
    if entry.statistics is not None:
        _show_statistics(entry.statistics)
    if entry.token_ids is not None:
        say(f"  token ids {_some(entry.token_ids)}")
    for name, rows in (entry.extras or {}).items():
        say(f"  {name} {_some(rows)}")


def _some(values: list[Any]) -> str:
    text = " ".join(str(value).replace(" ", "") for value in values[:_MOST])
    return text if len(values) <= _MOST else f"{text} ... ({len(values):,})"


def _compression(detail: reporting.SpaceDetail) -> str:
    if detail.bytes_per_token is None or detail.ratio is None:
        return ""
    computed = f"{binary(detail.computed_bytes)} that its rows are in {detail.recipe.compute_dtype}"
    return f", {number(detail.bytes_per_token)} bytes a token; {detail.ratio:.2f} times the {computed}"


def _show_lengths(lengths: reporting.Lengths) -> None:
    if not lengths.entries:
        return
    say(
        f"tokens of an entry: {lengths.shortest:,} to {lengths.longest:,}, median {number(lengths.median)}, mean "
        f"{number(lengths.mean)}, 95 % up to {lengths.p95:,}"
    )
    block = "█" if "utf" in console().encoding.lower() else "#"
    most = max(lengths.histogram.counts, default=0)
    names = [f"{begin:,.0f}" for begin in lengths.histogram.edges[:-1]]
    width = max(map(len, names), default=0)
    for name, count in zip(names, lengths.histogram.counts, strict=True):
        bar = block * max(1, round(_BAR * count / most)) if count else ""
        say(f"  {name:>{width}} {bar:<{_BAR}} {count:,}".rstrip())


def _show_segments(segments: list[reporting.SegmentReport]) -> None:
    if not segments:
        return
    listed = table("", ("segment", "state", "owner"), ("entries", "tokens", "bytes", "written"))
    listed.columns[0].no_wrap, listed.columns[0].overflow = False, "fold"  # on a narrow terminal
    for one in segments[:_MOST]:
        numbers = (f"{one.entries:,}", f"{one.tokens:,}", binary(one.nbytes), ago(one.age))
        listed.add_row(one.name, one.state, one.owner or "", *numbers)
    console().print(listed)
    if len(segments) > _MOST:
        say(f"and {counted(len(segments) - _MOST, 'more segment')}: --json lists them all")


def _show_sample(sample: reporting.Sample) -> None:
    if not sample.entries:
        return
    many = counted(len(sample.corrupt), "fails its checksum", "fail their checksums")
    say(f"read {sample.entries:,} of {entries(sample.of)}: {many if sample.corrupt else 'intact'}")
    for key in sample.corrupt[:_CORRUPT]:
        say(f"  corrupt {key.hex()}")
    _show_statistics(sample.statistics)


def _show_statistics(found: reporting.Statistics) -> None:
    say(f"  norms {number(found.norm_min)} to {number(found.norm_max)}, mean {number(found.norm_mean)}")
    say(
        f"  numbers: mean {number(found.mean)}, standard deviation {number(found.std)}; {found.nan:,} NaN, "
        f"{found.infinite:,} infinite, {counted(found.zero_rows, 'row')} all zero"
    )

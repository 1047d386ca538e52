"""How reports of ``cachectl inspect`` are shown on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from actcache.admin.report import (
    DocumentReport,
    EntryReport,
    Histogram,
    Lengths,
    Sample,
    SegmentDetail,
    SegmentReport,
    SpaceDetail,
    Statistics,
    Survey,
)
from actcache.admin.report.words import number, spelled
from actcache.cli.common import SHORT, binary, console, counted, say, span, table
from actcache.format.recipe import Recipe

_BAR = 40  # characters
_MOST = 20  # segments, ids
_CORRUPT = 5  # keys


def show(report: Survey | SegmentDetail | DocumentReport) -> None:
    """Print a report in full."""
    if isinstance(report, SegmentDetail):
        _show_segment(report)
    elif isinstance(report, DocumentReport):
        _show_document(report)
    else:
        for space in report.spaces:
            _show_space(space)
        for name, what in report.unreadable.items():
            say(f"unreadable {name}: {what}")


def recipe_table(recipe: Recipe, title: str, damaged: Mapping[str, str]) -> Table:
    """Return a recipe in full: what decides the numbers, then where they came from; and what is damaged."""
    made = Table(title=title, show_header=False)
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in recipe.identity().items():
        made.add_row(name, spelled(value))
    made.add_section()
    for name, value in recipe.to_json()["provenance"].items():
        made.add_row(name, value)
    for name, what in damaged.items():
        made.add_row(f"damaged {name}", what)
    return made


def _show_space(detail: SpaceDetail) -> None:
    usage = detail.report.usage
    console().print(recipe_table(detail.recipe, f"space {detail.recipe.fingerprint}", detail.report.damaged))
    made = "at an unknown time" if detail.made is None else f"{span(detail.made)} ago"
    written = "" if detail.written is None else f", last written to {span(detail.written)} ago"
    say(f"made {made}{'' if detail.owner is None else f' by {detail.owner}'}{written}")
    say(f"{counted(usage.entries, 'entry', 'entries')}, {counted(usage.tokens, 'token')}")
    say(f"{binary(usage.nbytes)}{_compression(detail)}")
    _show_lengths(detail.lengths)
    _show_segments(detail.segments)
    _show_sample(detail.sample)


def _show_segment(detail: SegmentDetail) -> None:
    segment = detail.report
    say(f"segment {segment.name} of space {detail.recipe.fingerprint}")
    size = "no file" if segment.nbytes is None else binary(segment.nbytes)
    say(f"{counted(segment.entries, 'entry', 'entries')}, {counted(segment.tokens, 'token')}, {size}: {segment.state}")
    written = "at an unknown time" if segment.age is None else f"{span(segment.age)} ago"
    provenance = ", ".join(f"{name} {value}" for name, value in detail.recipe.to_json()["provenance"].items())
    say(f"written {written}{'' if segment.owner is None else f' by {segment.owner}'}; the space: {provenance}")
    if segment.damaged is not None:
        say(f"damaged: {segment.damaged}")
    _show_lengths(detail.lengths)
    _show_sample(detail.sample)


def _show_document(report: DocumentReport) -> None:
    say(f"document {report.key.hex()}: {counted(len(report.entries), 'entry', 'entries')}")
    for before, entry in zip([None, *report.entries], report.entries, strict=False):
        if before is None or before.recipe != entry.recipe:
            say(f"space {entry.recipe.fingerprint[:SHORT]} ({entry.recipe.model} layer {entry.recipe.layer})")
        _show_entry(entry)
    for name, what in report.unreadable.items():
        say(f"unreadable {name[:SHORT]}: {what}")


def _show_entry(entry: EntryReport) -> None:
    recipe, window = entry.recipe, entry.window
    if window is not None:
        last = ", the last" if window.last else ""
        say(f"  window {window.number}{last}, cut at {window.max_length} tokens with stride {window.stride}")
        say(f"  key {entry.key.hex()}")
    size = f"{counted(entry.tokens, 'token')} x {recipe.hidden_size} {recipe.stored_as}, {binary(entry.nbytes)}"
    say(f"  {size}{'' if entry.segment is None else f', in {entry.segment}'}")
    say(f"  checksum {entry.checksum:016x}: {'intact' if entry.intact else 'CORRUPT, cachectl repair takes it away'}")
    if entry.statistics is not None:
        _show_statistics(entry.statistics, "  ")
    if entry.token_ids is not None:
        say(f"  token ids {_some(entry.token_ids)}")
    for name, rows in (entry.extras or {}).items():
        say(f"  {name} {_some(rows)}")


def _some(values: list[Any]) -> str:
    text = " ".join(str(value).replace(" ", "") for value in values[:_MOST])
    return text if len(values) <= _MOST else f"{text} ... ({len(values):,})"


def _compression(detail: SpaceDetail) -> str:
    if detail.bytes_per_token is None or detail.ratio is None:
        return ""
    computed = f"{binary(detail.computed_bytes)} that its rows are in {detail.recipe.compute_dtype}"
    return f", {number(detail.bytes_per_token)} a token; {detail.ratio:.2f} of the {computed}"


def _show_lengths(lengths: Lengths) -> None:
    if not lengths.entries:
        return
    say(
        f"tokens of an entry: {lengths.shortest:,} to {lengths.longest:,}, median {number(lengths.median)}, mean "
        f"{number(lengths.mean)}, 95 % up to {lengths.p95:,}"
    )
    _show_histogram(lengths.histogram, lambda edge: f"{edge:,.0f}")


def _show_histogram(histogram: Histogram, edge: Callable[[float], str]) -> None:
    block = "█" if "utf" in console().encoding.lower() else "#"
    most = max(histogram.counts, default=0)
    names = [edge(begin) for begin in histogram.edges[:-1]]
    width = max(map(len, names), default=0)
    for name, count in zip(names, histogram.counts, strict=True):
        bar = block * max(1, round(_BAR * count / most)) if count else ""
        say(f"  {name:>{width}} {bar:<{_BAR}} {count:,}".rstrip())


def _show_segments(segments: list[SegmentReport]) -> None:
    if not segments:
        return
    listed = table("", ("segment", "state", "owner"), ("entries", "tokens", "bytes", "written"))
    listed.columns[0].no_wrap, listed.columns[0].overflow = False, "fold"  # on a narrow terminal
    for one in segments[:_MOST]:
        size = "" if one.nbytes is None else binary(one.nbytes)
        ago = "" if one.age is None else f"{span(one.age)} ago"
        listed.add_row(one.name, one.state, one.owner or "", f"{one.entries:,}", f"{one.tokens:,}", size, ago)
    console().print(listed)
    if len(segments) > _MOST:
        say(f"and {counted(len(segments) - _MOST, 'more segment')}: --json lists them all")


def _show_sample(sample: Sample) -> None:
    if not sample.entries:
        return
    many = counted(len(sample.corrupt), "fails its checksum", "fail their checksums")
    state = many if sample.corrupt else "intact"
    say(f"read {sample.entries:,} of {counted(sample.of, 'entry', 'entries')}: {state}")
    for key in sample.corrupt[:_CORRUPT]:
        say(f"  corrupt {key.hex()}")
    _show_statistics(sample.statistics, "  ")


def _show_statistics(found: Statistics, indent: str) -> None:
    say(f"{indent}norms {number(found.norm_min)} to {number(found.norm_max)}, mean {number(found.norm_mean)}")
    say(
        f"{indent}numbers: mean {number(found.mean)}, standard deviation {number(found.std)}; {found.nan:,} NaN, "
        f"{found.infinite:,} infinite, {counted(found.zero_rows, 'row')} all zero"
    )

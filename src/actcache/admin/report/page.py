"""A store in full as one page: HTML and SVG, nothing else. It asks for nothing from anywhere and runs nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from actcache.admin.display import ago, binary, counted, entries, model_name, moment, number, spelled
from actcache.admin.report.plots import Markup, Row, bars, element, figure, histogram, joined, legend
from actcache.admin.report.spaces import SegmentReport, SpaceDetail, StoreDetail
from actcache.admin.report.statistics import Histogram, Statistics
from actcache.io.newfile import check_new, new_file

# How the page looks: by the reader's own choice of light or dark, on any width, without a font or picture.

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --card: #f6f7f9; --ink: #1c2430; --soft: #566070; --line: #d9dee6;
  --one: #2f6fdb; --two: #9aa7ba; --good: #1d8a54; --bad: #c8322b; --unknown: #b9c2cf; --warn: #fdecea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181f; --card: #1c222c; --ink: #e4e8ee; --soft: #a2adbd; --line: #364050;
    --one: #6ea0f5; --two: #66738a; --good: #4cc38a; --bad: #f0716a; --unknown: #4b576a; --warn: #3a1f1e;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { margin: .1rem 0 .4rem; font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 .5rem; font-size: 1.15rem; overflow-wrap: anywhere; }
p { margin: 0 0 .6rem; }
section { margin-top: 2rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
code { font-size: .92em; overflow-wrap: anywhere; }
a { color: var(--one); }
.soft { color: var(--soft); }
.wrong { padding: 1rem; border: 1px solid var(--bad); border-radius: 8px; background: var(--warn); }
.wrong li, .wrong p { overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .9rem .28rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td { max-width: 42rem; overflow-wrap: break-word; }
.fields { margin-bottom: 1rem; }
.fields td { overflow-wrap: anywhere; }
.fields td:first-child { overflow-wrap: normal; }
.number { text-align: right; white-space: nowrap; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem .9rem; border-radius: 8px; background: var(--card); min-width: 0; }
figcaption { font-weight: 600; margin-bottom: .5rem; }
figure p { margin: .4rem 0 0; color: var(--soft); font-size: .82rem; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font: 11.5px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
svg text.soft { fill: var(--soft); }
.axis { stroke: var(--soft); }
.grid { stroke: var(--line); stroke-dasharray: 3 3; }
.track { fill: var(--line); opacity: .5; }
.one { fill: var(--one); background: var(--one); }
.two { fill: var(--two); background: var(--two); }
.good { fill: var(--good); background: var(--good); }
.bad { fill: var(--bad); background: var(--bad); }
.unknown { fill: var(--unknown); background: var(--unknown); }
.key { margin-right: 1rem; display: inline-block; }
.key i { display: inline-block; width: .7rem; height: .7rem; margin-right: .35rem; border-radius: 2px; }
details { margin-top: .8rem; }
summary { cursor: pointer; font-weight: 600; margin-bottom: .4rem; }
"""

#: Even if something slipped through the escaping, a browser would neither run it nor fetch anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_SHORT = 12
_MODEL = 16  # characters of a model's name beside a bar
_MOST_SEGMENTS = 100  # in a table
_TIMES = 24  # ranges of a plot over time
_SHORTEST = 60.0  # seconds that such a plot shows


def write_page(found: StoreDetail, path: Path) -> int:
    """Write a page to a new file, whole or not at all; return its bytes.

    Raises:
        UsageError: something stands there already.
    """
    check_new(path)
    data = render_page(found).encode()
    with new_file(path) as temporary:
        temporary.write_bytes(data)
    return len(data)


def render_page(found: StoreDetail) -> str:
    title = f"Activation cache {found.store}"
    metas = (
        {"charset": "utf-8"},
        {"http-equiv": "Content-Security-Policy", "content": _POLICY},
        {"name": "viewport", "content": "width=device-width, initial-scale=1"},
        {"name": "color-scheme", "content": "light dark"},
    )
    icon, style = element("link", {"rel": "icon", "href": "data:,"}), element("style", None, Markup(STYLE))
    head = joined(*(element("meta", one) for one in metas), icon, element("title", None, title), style)
    body = joined(_header(found), _wrong(found), _spaces(found), *(_space(one, found.time) for one in found.spaces))
    content = joined(element("head", None, head), element("body", None, element("main", None, body)))
    return f"<!DOCTYPE html>\n{element('html', {'lang': 'en'}, content)}\n"


# --- the store --------------------------------------------------------------------------------------------------------


def _header(found: StoreDetail) -> Markup:
    tokens = sum(one.report.usage.tokens for one in found.spaces)
    held = entries(sum(one.report.usage.entries for one in found.spaces))
    facts = [counted(len(found.spaces), "space"), held, counted(tokens, "token"), binary(found.footprint.total)]
    if found.collections:
        facts.append(f"{counted(len(found.collections), 'collection')}: {', '.join(found.collections)}")
    return element(
        "header",
        None,
        element("p", {"class": "soft"}, f"Activation cache, as of {moment(found.time)}"),
        element("h1", None, found.store),
        element("p", None, " · ".join(facts)),
    )


def _wrong(found: StoreDetail) -> Markup:
    lines = [f"space {name} cannot be read: {what}" for name, what in found.unreadable.items()]
    for one in found.spaces:
        name = one.recipe.fingerprint[:_SHORT]
        lines += [f"space {name}: segment {segment} is damaged: {what}" for segment, what in one.report.damaged.items()]
        if one.errors_damaged is not None:
            lines.append(f"space {name}: {one.errors_damaged}; its entries do not need it")
        if corrupt := one.sample.corrupt:
            many = counted(len(corrupt), "entry fails its checksum", "entries fail their checksums")
            lines.append(f"space {name}: {many}, the first is {corrupt[0].hex()}")
    if not lines:
        return joined()
    items = element("ul", None, *(element("li", None, line) for line in lines))
    hint = "cachectl repair takes what is corrupt out of the way; a fill computes it again."
    return element("section", {"class": "wrong"}, element("h2", None, "What is wrong"), items, element("p", None, hint))


def _spaces(found: StoreDetail) -> Markup:
    names = ("space", "model", "layer", "dtype", "entries", "tokens", "bytes", "bytes/token", "segments", "written")
    rows = []
    for one in found.spaces:
        recipe, usage = one.recipe, one.report.usage
        each = number(one.bytes_per_token)
        link = element("a", {"href": f"#{recipe.fingerprint}"}, recipe.fingerprint[:_SHORT])
        model = (model_name(recipe), recipe.site_name.removeprefix("layer "), recipe.stored_as)
        sizes = (f"{usage.entries:,}", f"{usage.tokens:,}", binary(usage.nbytes), each, f"{usage.segments:,}")
        rows.append((link, *model, *sizes, ago(one.written)))
    ages = _ages([segment for one in found.spaces for segment in one.segments], found.time)
    figures = element("div", {"class": "plots"}, _bytes_plot(found), _checksum_plot(found), ages)
    return element("section", None, element("h2", None, "Spaces"), _table("Spaces", names, rows, left=4), figures)


def _bytes_plot(found: StoreDetail) -> Markup:
    rows = []
    for one in sorted(found.spaces, key=lambda one: -sum(one.parts.values())):
        total, held = sum(one.parts.values()), one.report.usage.nbytes
        rows.append(Row(_label(one), [("one", min(held, total)), ("two", max(0, total - held))], binary(total)))
    meanings = legend(("one", "entries"), ("two", "index, canaries, replaced and quarantined segments"))
    return _bars("Bytes by space", rows, meanings)


def _checksum_plot(found: StoreDetail) -> Markup:
    rows = []
    for one in found.spaces:
        sample = one.sample
        corrupt, intact, unread = len(sample.corrupt), sample.entries - len(sample.corrupt), sample.of - sample.entries
        text = f"{intact:,} intact, {corrupt:,} corrupt, {unread:,} not read"
        if one.report.damaged:
            text += f", {counted(len(one.report.damaged), 'segment')} damaged"
        parts = [("good", intact), ("bad", corrupt), ("unknown", unread)]
        rows.append(Row(_label(one), [(kind, amount / max(1, sample.of)) for kind, amount in parts], text))
    return _bars("Checksums", rows, legend(("good", "intact"), ("bad", "corrupt"), ("unknown", "not read")))


def _bars(title: str, rows: Sequence[Row], meanings: Markup) -> Markup:
    described = "; ".join(f"{row.label}: {row.text}" for row in rows) or "There are no spaces."
    return figure(title, described, bars(rows), meanings)


def _label(one: SpaceDetail) -> str:
    model = model_name(one.recipe)
    model = model if len(model) <= _MODEL else f"{model[: _MODEL - 1]}…"
    return f"{model} {one.recipe.site_name} {one.recipe.stored_as} {one.recipe.fingerprint[:6]}"


# --- one space --------------------------------------------------------------------------------------------------------


def _space(one: SpaceDetail, now: float) -> Markup:
    recipe = one.recipe
    title = f"{model_name(recipe)}, {recipe.site_name}, {recipe.stored_as}"
    lengths, sample = one.lengths, one.sample
    described = (
        f"{entries(lengths.entries)} of {lengths.shortest:,} to {lengths.longest:,} tokens: half "
        f"have up to {number(lengths.median)}, 95 % up to {lengths.p95:,}; the mean is {number(lengths.mean)}."
    )
    plot = histogram(lengths.histogram, lambda edge: f"{edge:,.0f}", _count, "tokens of an entry")
    norms = _norms(sample.statistics, sample.entries)
    figures = [figure("Lengths", described, plot, described), _ages(one.segments, now), norms]
    made = "" if one.made is None else f", made {moment(now - one.made)}"
    made += "" if one.owner is None else f" by {one.owner}"
    return element(
        "section",
        {"id": recipe.fingerprint},
        element("h2", None, title),
        element("p", {"class": "soft"}, element("code", None, recipe.fingerprint), made),
        *([] if one.errors is None else [element("p", None, f"Storing changes {one.errors.told()}.")]),
        *(element("p", None, f"Collection {name}: {held.told()}.") for name, held in one.passages.items()),
        element("div", {"class": "plots"}, *figures),
        _folded("Recipe", _fields("Recipe", recipe.identity())),
        _folded("Provenance", _fields("Provenance", recipe.to_json()["provenance"])),
        _folded(counted(len(one.segments), "segment"), _segments(one.segments)),
    )


def _norms(found: Statistics, count: int) -> Markup:
    described = "No rows were read."
    if found.tokens:
        described = (
            f"Of {entries(count)} ({counted(found.tokens, 'row')}): norms from "
            f"{number(found.norm_min)} to {number(found.norm_max)}, mean {number(found.norm_mean)}. All numbers: mean "
            f"{number(found.mean)}, standard deviation {number(found.std)}, {found.nan:,} NaN, {found.infinite:,} "
            f"infinite; {counted(found.zero_rows, 'row')} all zero."
        )
    return figure("Norms of a sample", described, histogram(found.norms, number, _count, "norm of a row"), described)


def _ages(segments: Sequence[SegmentReport], now: float) -> Markup:
    dated = [(now - segment.age, segment.nbytes or 0) for segment in segments if segment.age is not None]
    described = "There are no segments."
    if dated:
        first, last = (moment(end(time for time, _ in dated)) for end in (min, max))
        described = f"{counted(len(dated), 'segment')}, the oldest written {first}, the newest {last}."

    def minute(seconds: float) -> str:
        return moment(seconds).removesuffix(" UTC")

    plot = histogram(_over_time(dated), minute, binary, "when segments were written (UTC)", ticks=2)
    return figure("Age of segments", described, plot, described)


def _over_time(dated: Sequence[tuple[float, int]]) -> Histogram:
    """Return bytes by ranges of time, ``counts`` holding the bytes."""
    if not dated:
        return Histogram()
    first, last = (end(time for time, _ in dated) for end in (min, max))
    first = min(first, last - _SHORTEST)
    width = (last - first) / _TIMES
    counts = [0] * _TIMES
    for time, nbytes in dated:
        counts[min(math.floor((time - first) / width), _TIMES - 1)] += nbytes
    return Histogram(tuple(first + i * width for i in range(_TIMES + 1)), tuple(counts))


def _count(amount: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if amount >= size:
            return f"{amount / (1e3 if unit == 'k' else size):,.3g}{unit}"
    return f"{amount:,.0f}"


# --- tables -----------------------------------------------------------------------------------------------------------


def _segments(segments: Sequence[SegmentReport]) -> Markup:
    names = ("segment", "state", "owner", "entries", "tokens", "bytes", "written")
    rows = []
    for one in segments[:_MOST_SEGMENTS]:
        state = one.state if one.damaged is None else f"damaged: {one.damaged}"
        sizes = (f"{one.entries:,}", f"{one.tokens:,}", binary(one.nbytes))
        rows.append((one.name, state, one.owner or "", *sizes, ago(one.age)))
    more = len(segments) - len(rows)
    note = element("p", None, f"and {more:,} more: cachectl inspect --json lists them all") if more else joined()
    return joined(_table("Segments", names, rows, left=3), note)


def _fields(label: str, fields: Mapping[str, object]) -> Markup:
    rows = [(name, spelled(value)) for name, value in fields.items()]
    return _table(label, ("field", "value"), rows, left=2, kind="fields")


def _table(label: str, names: Sequence[str], rows: Iterable[Sequence[str]], left: int, kind: str = "wide") -> Markup:
    """Return a table whose first columns, ``left`` of them, hold texts and the others numbers; it scrolls by itself."""

    def cells(kind: str, values: Sequence[str], **given: str) -> Markup:
        numbers = {**given, "class": "number"}
        return element(
            "tr", None, *(element(kind, given if i < left else numbers, one) for i, one in enumerate(values))
        )

    head = element("thead", None, cells("th", names, scope="col"))
    body = element("tbody", None, *(cells("td", row) for row in rows))
    scrolling = {"class": kind, "role": "region", "aria-label": label, "tabindex": "0"}
    return element("div", scrolling, element("table", None, head, body))


def _folded(title: str, content: Markup) -> Markup:
    return element("details", None, element("summary", None, title), content)

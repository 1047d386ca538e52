"""A store in full as one page: HTML and SVG, and a small script of its own that sorts tables and compares recipes.

It asks for nothing from anywhere, and all of it can be read without the script.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actcache.admin.display import ago, binary, counted, entries, model_name, moment, number, spelled
from actcache.admin.inspection import Coverage
from actcache.admin.report.plots import Markup, Point, Row, bars, by_layer, element, figure, histogram, joined, legend
from actcache.admin.report.spaces import SegmentReport, SpaceDetail, StoreDetail
from actcache.admin.report.statistics import Histogram, Statistics
from actcache.format.recipe import Recipe
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
figure { align-self: start; min-width: 0; margin: 0; padding: .8rem .9rem; border-radius: 8px; }
figure { background: var(--card); }
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
.two-line { stroke: var(--two); }
.one-line { stroke: var(--one); fill: none; stroke-width: 1.6; }
.reach { stroke: var(--two); stroke-width: 1.4; }
.broad { grid-column: span 2; }
details { margin-top: .8rem; }
summary { cursor: pointer; font-weight: 600; margin-bottom: .4rem; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--one); }
th button::after { content: "\N{UP DOWN ARROW}"; margin-left: .3rem; opacity: .5; }
th[aria-sort=ascending] button::after { content: "\N{UPWARDS ARROW}"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\N{DOWNWARDS ARROW}"; opacity: 1; }
select { font: inherit; max-width: 100%; margin: 0 1rem .6rem 0; color: inherit; background: var(--card); }
tr.same { display: none; }
@media (max-width: 48rem) { .broad { grid-column: auto; } .broad svg text { font-size: 18px; } }
@media print {
  :root { color-scheme: light; --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; }
  main { max-width: none; padding: 0; }
  section, figure, tr { break-inside: avoid; }
  figure { border: 1px solid var(--line); }
  .wide { overflow: visible; }
  table { font-size: .68rem; }
  th, td { padding-right: .5rem; }
  th button::after, select, .comparing { display: none; }
  .plots { grid-template-columns: repeat(2, 1fr); }
}
"""

#: Sorts tables by a click on a column's name, and shows what two spaces differ in. Its digest is in the page's policy.
SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sorted")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const order = (a, b) => {
        const [one, other] = [value(a), value(b)], apart = Number(one) - Number(other);
        return one !== "" && other !== "" && !Number.isNaN(apart) ? apart : one.localeCompare(other);
      };
      const rows = [...table.tBodies[0].rows].sort(order);
      table.tBodies[0].append(...(up ? rows : rows.reverse()));
    });
  });
}
const [first, second, compared] = ["first", "second", "compared"].map(name => document.getElementById(name));
if (compared) {
  const fields = name => new Map([...document.querySelectorAll(`[id="${name}"] .recipe tbody tr`)]
    .map(row => [...row.cells].map(cell => cell.textContent)));
  const show = () => {
    const [one, other] = [fields(first.value), fields(second.value)];
    compared.tBodies[0].replaceChildren(...[...new Set([...one.keys(), ...other.keys()])]
      .filter(name => one.get(name) !== other.get(name))
      .map(name => {
        const row = document.createElement("tr");
        for (const text of [name, one.get(name) ?? "", other.get(name) ?? ""]) row.insertCell().textContent = text;
        return row;
      }));
  };
  first.addEventListener("change", show);
  second.addEventListener("change", show);
  show();
}
addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details")) one.open = true; });
"""

#: Even if something slipped through the escaping, a browser would neither run it nor fetch anything.
_DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
_POLICY = (
    f"default-src 'none'; script-src 'sha256-{_DIGEST}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
_SHORT = 12
_MODEL = 16  # characters of a model's name beside a bar
_SAID = 240  # characters of a document
_MOST_SEGMENTS = 100  # in a table
_NO_CORPUS = (
    "No corpus is kept as a collection here: after cachectl fill ... --collection NAME this page says what share of it "
    "each space has."
)
_TIMES = 24  # ranges of a plot over time
_SHORTEST = 60.0  # seconds that such a plot shows


#: Makes texts of a space's token ids; None where its tokenizer is not at hand.
Decoder = Callable[[Recipe], Callable[[Sequence[int]], str] | None]


def write_page(found: StoreDetail, path: Path, decoder: Decoder | None = None) -> int:
    """Write a page to a new file, whole or not at all; return its bytes.

    With a ``decoder`` it shows the texts of unusual documents, which else are token ids.

    Raises:
        UsageError: something stands there already.
    """
    check_new(path)
    data = render_page(found, decoder).encode()
    with new_file(path) as temporary:
        temporary.write_bytes(data)
    return len(data)


def render_page(found: StoreDetail, decoder: Decoder | None = None) -> str:
    found = replace(found, spaces=sorted(found.spaces, key=_order))
    title = f"Activation cache {found.store}"
    metas = (
        {"charset": "utf-8"},
        {"http-equiv": "Content-Security-Policy", "content": _POLICY},
        {"name": "viewport", "content": "width=device-width, initial-scale=1"},
        {"name": "color-scheme", "content": "light dark"},
    )
    icon, style = element("link", {"rel": "icon", "href": "data:,"}), element("style", None, Markup(STYLE))
    head = joined(*(element("meta", one) for one in metas), icon, element("title", None, title), style)
    each = (_space(one, found.time, decoder) for one in found.spaces)
    body = joined(_header(found), _wrong(found), _spaces(found), _comparison(found), *each)
    script = element("script", None, Markup(SCRIPT))
    content = joined(element("head", None, head), element("body", None, element("main", None, body), script))
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
    names = ("model", "layer", "dtype", "space", "entries", "tokens", "bytes", "bytes/token", "segments", "written")
    rows: list[Sequence[str | tuple[str, float]]] = []
    for one in found.spaces:
        recipe, usage = one.recipe, one.report.usage
        each = (number(one.bytes_per_token), one.bytes_per_token or 0.0)
        link = element("a", {"href": f"#{recipe.fingerprint}"}, recipe.fingerprint[:_SHORT])
        depth = (recipe.site_name.removeprefix("layer "), float(-1 if recipe.layer is None else recipe.layer))
        held = [(f"{amount:,}", float(amount)) for amount in (usage.entries, usage.tokens, usage.segments)]
        size = (binary(usage.nbytes), float(usage.nbytes))
        age = (ago(one.written), one.written or 0.0)
        rows.append((model_name(recipe), depth, recipe.stored_as, link, *held[:2], size, each, held[2], age))
    figures = [*_by_layer(found), *_coverage_plot(found)]
    if found.spaces:
        figures += [_bytes_plot(found), _checksum_plot(found)]
    figures += _ages([segment for one in found.spaces for segment in one.segments], found.time)
    plots = element("div", {"class": "plots"}, *figures)
    table = _table("Spaces", names, rows, left=4, order=True)
    notes = [element("p", None, _NO_CORPUS)] if found.spaces and not found.collections else []
    return element("section", None, element("h2", None, "Spaces"), table, *notes, plots)


def _order(one: SpaceDetail) -> tuple[Any, ...]:
    """By model and layer; other sites after them, as people count: layers.5 before layers.10."""
    recipe = one.recipe
    site = [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in (recipe.site or "").split(".")]
    return model_name(recipe), recipe.layer is None, recipe.layer or 0, site, recipe.stored_as, recipe.fingerprint


def _by_layer(found: StoreDetail) -> list[Markup]:
    """Return norms and numbers by layer, a figure for each model of which several layers are there."""
    models: dict[str, list[SpaceDetail]] = {}
    for one in found.spaces:
        if one.recipe.layer is not None and one.sample.statistics.norm_mean is not None:
            models.setdefault(model_name(one.recipe), []).append(one)
    figures = []
    for model, spaces in models.items():
        if len({one.recipe.layer for one in spaces}) < 2:
            continue
        points = []
        for one in spaces:
            numbers, layer = one.sample.statistics, float(one.recipe.layer or 0)
            norm = Point(layer, numbers.norm_mean or 0.0, numbers.norm_min or 0.0, numbers.norm_max or 0.0)
            mean, spread = numbers.mean or 0.0, numbers.std or 0.0
            told = f"layer {one.recipe.layer}, {one.recipe.stored_as}: "
            points.append(
                (
                    replace(
                        norm, told=f"{told}norms {number(norm.low)} to {number(norm.high)}, mean {number(norm.mean)}"
                    ),
                    Point(
                        layer,
                        mean,
                        mean - spread,
                        mean + spread,
                        f"{told}mean {number(mean)}, deviation {number(spread)}",
                    ),
                )
            )
        described = "; ".join(f"{norm.told}; {value.told.partition(': ')[2]}" for norm, value in points)
        panels = (
            ("norm of a row", [one for one, _ in points]),
            ("all numbers", [other for _, other in points]),
        )
        notes = ("Dots: means of a sample. Lines: smallest to largest norm; one standard deviation to each side.",)
        figures.append(figure(f"By layer: {model}", described, by_layer(panels), *notes, kind="broad"))
    return figures


def _coverage_plot(found: StoreDetail) -> list[Markup]:
    """Return how much of each corpus each space has, where corpora were kept as collections."""
    figures, labels = [], _labels(found)
    for name in found.collections:
        rows = []
        for one in found.spaces:
            held = one.coverage.get(name)
            if isinstance(held, Coverage):
                share = held.present / held.documents if held.documents else 1.0
                parts = [("good", share), ("unknown", 1 - share)]
                rows.append(
                    Row(
                        labels[one.recipe.fingerprint],
                        parts,
                        f"{held.present:,} of {held.documents:,} ({_percent(share)})",
                    )
                )
        if rows:
            meanings = legend(("good", "stored"), ("unknown", "not stored"))
            figures.append(_bars(f"Share of the collection {name}", rows, meanings))
    return figures


def _percent(share: float) -> str:
    """Return a share that is 100 % only where it is whole."""
    return f"{math.floor(share * 1000) / 10:,.4g} %"


def _comparison(found: StoreDetail) -> Markup:
    """Return what the script makes a comparison of two spaces of; nothing where there are not two."""
    if len(found.spaces) < 2:
        return joined()
    labels = _labels(found)

    def choice(name: str, chosen: int) -> Markup:
        options = (
            element(
                "option",
                {"value": one.recipe.fingerprint} | ({"selected": ""} if i == chosen else {}),
                labels[one.recipe.fingerprint],
            )
            for i, one in enumerate(found.spaces)
        )
        return element("select", {"id": name, "aria-label": f"{name} space"}, *options)

    head = element("tr", None, *(element("th", {"scope": "col"}, name) for name in ("field", "first", "second")))
    table = element("table", {"id": "compared"}, element("thead", None, head), element("tbody", None))
    scrolling = {"class": "fields", "role": "region", "aria-label": "Comparison", "tabindex": "0"}
    return element(
        "section",
        {"class": "comparing"},
        element("h2", None, "What two spaces differ in"),
        element("p", None, choice("first", 0), choice("second", 1)),
        element("div", scrolling, table),
    )


def _bytes_plot(found: StoreDetail) -> Markup:
    rows, labels = [], _labels(found)
    for one in sorted(found.spaces, key=lambda one: -sum(one.parts.values())):
        total, held = sum(one.parts.values()), one.report.usage.nbytes
        rows.append(
            Row(
                labels[one.recipe.fingerprint],
                [("one", min(held, total)), ("two", max(0, total - held))],
                binary(total),
            )
        )
    meanings = legend(("one", "entries"), ("two", "index, canaries, replaced and quarantined segments"))
    return _bars("Bytes by space", rows, meanings)


def _checksum_plot(found: StoreDetail) -> Markup:
    rows, labels = [], _labels(found)
    for one in found.spaces:
        sample = one.sample
        corrupt, intact, unread = len(sample.corrupt), sample.entries - len(sample.corrupt), sample.of - sample.entries
        text = f"{intact:,} intact, {corrupt:,} corrupt, {unread:,} not read"
        if one.report.damaged:
            text += f", {counted(len(one.report.damaged), 'segment')} damaged"
        parts = [("good", intact), ("bad", corrupt), ("unknown", unread)]
        rows.append(
            Row(labels[one.recipe.fingerprint], [(kind, amount / max(1, sample.of)) for kind, amount in parts], text)
        )
    return _bars("Checksums", rows, legend(("good", "intact"), ("bad", "corrupt"), ("unknown", "not read")))


def _bars(title: str, rows: Sequence[Row], meanings: Markup) -> Markup:
    described = "; ".join(f"{row.label}: {row.text}" for row in rows) or "There are no spaces."
    return figure(title, described, bars(rows), meanings)


def _labels(found: StoreDetail) -> dict[str, str]:
    """Return what spaces are called beside bars, by fingerprint: without the model, where there is only one."""
    alone = len({model_name(one.recipe) for one in found.spaces}) == 1
    labels = {}
    for one in found.spaces:
        recipe = one.recipe
        model = model_name(recipe)
        model = "" if alone else f"{model} " if len(model) <= _MODEL else f"{model[: _MODEL - 1]}… "
        labels[recipe.fingerprint] = f"{model}{recipe.site_name} {recipe.stored_as} {recipe.fingerprint[:6]}"
    return labels


# --- one space --------------------------------------------------------------------------------------------------------


def _space(one: SpaceDetail, now: float, decoder: Decoder | None) -> Markup:
    recipe = one.recipe
    title = f"{model_name(recipe)}, {recipe.site_name}, {recipe.stored_as}"
    lengths, sample = one.lengths, one.sample
    described = (
        f"{entries(lengths.entries)} of {lengths.shortest:,} to {lengths.longest:,} tokens: half "
        f"have up to {number(lengths.median)}, 95 % up to {lengths.p95:,}; the mean is {number(lengths.mean)}."
    )
    figures = []
    if lengths.entries:
        plot = histogram(lengths.histogram, lambda edge: f"{edge:,.0f}", _count, "tokens of an entry")
        figures.append(figure("Lengths", described, plot, described))
    if sample.statistics.norms.counts:
        figures.append(_norms(sample.statistics, sample.entries))
    if len(one.segments) > 1:
        figures += _ages(one.segments, now)
    made = "" if one.made is None else f", made {moment(now - one.made)}"
    made += "" if one.owner is None else f" by {one.owner}"
    return element(
        "section",
        {"id": recipe.fingerprint},
        element("h2", None, title),
        element("p", {"class": "soft"}, element("code", None, recipe.fingerprint), made),
        *([] if one.errors is None else [element("p", None, f"Storing changes {one.errors.told()}.")]),
        *(element("p", None, f"Collection {name}: {held.told()}.") for name, held in one.passages.items()),
        *([] if one.lengths.entries else [element("p", None, "It holds no entries.")]),
        *([element("div", {"class": "plots"}, *figures)] if figures else []),
        _unusual(one, decoder),
        element("h3", None, "Recipe"),
        element("div", {"class": "recipe"}, _fields("Recipe", recipe.identity())),
        _folded("Provenance", _fields("Provenance", recipe.to_json()["provenance"])),
        _folded(counted(len(one.segments), "segment"), _segments(one.segments)),
    )


def _unusual(one: SpaceDetail, decoder: Decoder | None) -> Markup:
    """Return the documents whose rows are unlike most, with their texts where the tokenizer is at hand."""
    if not one.sample.outliers:
        return joined()
    decode = None if decoder is None else decoder(one.recipe)
    rows: list[Sequence[str | tuple[str, float]]] = []
    for entry in one.sample.outliers:
        ids = entry.token_ids or []
        said = decode(ids) if decode is not None and ids else " ".join(map(str, ids)) or "no token ids are stored"
        text = said if len(said) <= _SAID else f"{said[:_SAID]}…"
        figures = (
            (number(entry.norm), entry.norm),
            (f"{entry.off:,.1f}", entry.off),
            (f"{entry.tokens:,}", entry.tokens),
        )
        rows.append((text, element("code", None, entry.key.hex()[:_SHORT]), *figures))
    what = "text" if decode is not None else "token ids (the tokenizer is not at hand)"
    names = (what, "key", "mean norm", "median distances off", "tokens")
    note = f"Of {entries(one.sample.entries)} that were read, those whose norms are furthest from the median."
    return joined(
        element("h3", None, "Unusual documents"),
        element("p", {"class": "soft"}, note),
        _table("Unusual documents", names, rows, left=2, order=True),
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


def _ages(segments: Sequence[SegmentReport], now: float) -> list[Markup]:
    """Return when segments were written; nothing where there are none."""
    dated = [(now - segment.age, segment.nbytes or 0) for segment in segments if segment.age is not None]
    if not dated:
        return []
    first, last = (moment(end(time for time, _ in dated)) for end in (min, max))
    described = f"{counted(len(dated), 'segment')}, the oldest written {first}, the newest {last}."

    def minute(seconds: float) -> str:
        return moment(seconds).removesuffix(" UTC")

    plot = histogram(_over_time(dated), minute, binary, "when segments were written (UTC)", ticks=2)
    return [figure("Age of segments", described, plot, described)]


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


def _table(
    label: str,
    names: Sequence[str],
    rows: Iterable[Sequence[str | tuple[str, float]]],
    left: int,
    kind: str = "wide",
    order: bool = False,
) -> Markup:
    """Return a table whose first columns, ``left`` of them, hold texts and the others numbers; it scrolls by itself.

    With ``order`` a click on a column's name orders it: by the number of a cell that has one beside its text.
    """

    def cells(kind: str, values: Sequence[str | tuple[str, float]], **given: str) -> Markup:
        made = []
        for i, one in enumerate(values):
            attributes: dict[str, object] = {**given} if i < left else {**given, "class": "number"}
            text, value = one if isinstance(one, tuple) else (one, None)
            made.append(
                element(kind, attributes if value is None else {**attributes, "data-value": f"{value:.12g}"}, text)
            )
        return element("tr", None, *made)

    head = element("thead", None, cells("th", names, scope="col"))
    body = element("tbody", None, *(cells("td", row) for row in rows))
    scrolling = {"class": kind, "role": "region", "aria-label": label, "tabindex": "0"}
    return element("div", scrolling, element("table", {"class": "sorted"} if order else None, head, body))


def _folded(title: str, content: Markup) -> Markup:
    return element("details", None, element("summary", None, title), content)

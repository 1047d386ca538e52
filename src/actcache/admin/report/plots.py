"""Plots as inline SVG: each with a title and a description that says in words what it shows."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from actcache.admin.display import clean
from actcache.admin.report.statistics import Histogram

# HTML and SVG from elements. What is not markup already is escaped: a model's name is text, whatever stands in it.

_VOID = frozenset({"meta", "link"})


class Markup(str):
    """Text that is HTML: made by ``element`` and ``joined`` alone."""

    __slots__ = ()


def element(name: str, attributes: Mapping[str, object] | None = None, *children: str) -> Markup:
    """Return an element with escaped attributes; children are ``Markup`` as it is, other texts escaped."""
    given = "".join(f' {key}="{escaped(str(value))}"' for key, value in (attributes or {}).items())
    return Markup(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{joined(*children)}</{name}>")


def joined(*children: str) -> Markup:
    """Return children one after another: ``Markup`` as it is, other texts escaped."""
    return Markup("".join(child if isinstance(child, Markup) else escaped(child) for child in children))


def escaped(text: str) -> str:
    """Return a text that may stand between tags and in quotes; what is no character is replaced."""
    return html.escape(clean(text), quote=True)


_WIDTH = 380
_HEIGHT = 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 12, 16, 40  # around a histogram's bars
_BAR = 44  # of a histogram, at most
_ROW, _LINE = 42, 16  # of a list of bars; more where texts stand below
_LABEL = 34  # characters
_BESIDE = 50  # characters of label and text that have room beside each other


@dataclass(frozen=True)
class Row:
    """One bar of a list: its parts from left to right, each ``(kind, amount)``, and what is written beside it."""

    label: str
    parts: Sequence[tuple[str, float]]
    text: str


@dataclass(frozen=True)
class Point:
    """A mean, and how far what it is the mean of reaches, at one place of an axis of layers."""

    layer: float
    mean: float
    low: float
    high: float
    told: str = ""


def figure(title: str, described: str, plot: Callable[[str, str], Markup], *notes: str, kind: str = "") -> Markup:
    """Return a figure: its caption, what ``plot`` makes of title and description, and notes."""
    caption = element("figcaption", None, title)
    return element(
        "figure",
        {"class": kind} if kind else None,
        caption,
        plot(title, described),
        *(element("p", None, note) for note in notes),
    )


def _svg(title: str, described: str, height: int, content: Markup, width: int = _WIDTH) -> Markup:
    name = hashlib.blake2b(joined(title, described, content).encode(), digest_size=6).hexdigest()
    return element(
        "svg",
        {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-labelledby": f"t{name} d{name}"},
        element("title", {"id": f"t{name}"}, title),
        element("desc", {"id": f"d{name}"}, described),
        content,
    )


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> Markup:
    given = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    return element("text", given | ({"class": kind} if kind else {}), text)


def _rect(x: float, y: float, width: float, height: float, kind: str, *told: str) -> Markup:
    given = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}", "class": kind}
    return element("rect", given, *(element("title", None, one) for one in told))


def histogram(
    counts: Histogram, edge: Callable[[float], str], count: Callable[[float], str], axis: str, *, ticks: int = 5
) -> Callable[[str, str], Markup]:
    """Return what makes a histogram, of which about ``ticks`` edges, at least 2, are written."""
    number, most = len(counts.counts), max(counts.counts, default=0)
    inner, floor = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _BOTTOM
    slot = inner / max(1, number)
    parts = [_rule(_LEFT, floor, "axis"), _text(_LEFT - 6, floor + 4, count(0), "end")]
    if most:
        parts += [_rule(_LEFT, _TOP, "grid"), _text(_LEFT - 6, _TOP + 4, count(most), "end")]
    width = min(_BAR, max(slot - 1, 0.5 * slot))
    for i, amount in enumerate(counts.counts):
        height = max(1.0, (floor - _TOP) * amount / most) if amount else 0.0
        told = f"{edge(counts.edges[i])} to {edge(counts.edges[i + 1])}: {count(amount)}"
        parts.append(_rect(_LEFT + (i + 0.5) * slot - width / 2, floor - height, width, height, "one", told))
    if number:
        step = max(1, -(-number // (ticks - 1)))
        for i in [*range(0, number - step // 2, step), number] if number > 1 else [0, 1]:
            anchor = "start" if i == 0 else "end" if i == number else "middle"
            parts.append(_text(_LEFT + i * slot, floor + 15, edge(counts.edges[i]), anchor))
    else:
        parts.append(_text(_LEFT + inner / 2, (_TOP + floor) / 2, "nothing to show", "middle"))
    parts.append(_text(_LEFT + inner / 2, _HEIGHT - 6, axis, "middle", "soft"))
    return lambda title, described: _svg(title, described, _HEIGHT, joined(*parts))


def _rule(x: float, y: float, kind: str, width: int = _WIDTH) -> Markup:
    return _line(x, y, width - _RIGHT, y, kind)


def _line(x: float, y: float, to_x: float, to_y: float, kind: str) -> Markup:
    given = {"x1": f"{x:.1f}", "x2": f"{to_x:.1f}", "y1": f"{y:.1f}", "y2": f"{to_y:.1f}", "class": kind}
    return element("line", given)


_PANEL, _GAP = 96, 26  # of what is drawn by layer
_BROAD = 560


def by_layer(panels: Sequence[tuple[str, Sequence[Point]]]) -> Callable[[str, str], Markup]:
    """Return what makes panels one above another over one axis of layers: means, a line through them, their reach."""
    layers = sorted({point.layer for _, points in panels for point in points})
    first, last = layers[0], layers[-1]
    scale = (_BROAD - _LEFT - _RIGHT - 40) / max(1.0, last - first)
    parts = []

    def across(layer: float) -> float:
        return _LEFT + 20 + (layer - first) * scale

    for i, (name, points) in enumerate(panels):
        top = _GAP + i * (_PANEL + _GAP)
        low, high = min(point.low for point in points), max(point.high for point in points)
        low, high = min(low, 0.0), max(high, 0.0)

        def down(value: float, top: int = top, low: float = low, high: float = high) -> float:
            return top + _PANEL * (high - value) / ((high - low) or 1.0)

        parts += [_text(_LEFT, top - 9, name, "start", "soft")]
        for value in (high, 0.0, low) if low else (high, 0.0):
            parts += [_rule(_LEFT, down(value), "grid" if value else "axis", _BROAD)]
            parts += [_text(_LEFT - 6, down(value) + 4, f"{value:,.3g}", "end")] if value or not low else []
        ordered = sorted(points, key=lambda point: point.layer)
        path = " ".join(f"{across(point.layer):.1f},{down(point.mean):.1f}" for point in ordered)
        parts.append(element("polyline", {"points": path, "class": "one-line"}))
        for point in ordered:
            x = across(point.layer)
            inside = [
                element("title", None, point.told),
                _line(x, down(point.high), x, down(point.low), "reach"),
                element("circle", {"cx": f"{x:.1f}", "cy": f"{down(point.mean):.1f}", "r": "3.6", "class": "one"}),
            ]
            parts.append(element("g", None, *inside))
    floor = len(panels) * (_PANEL + _GAP)
    step = max(1, -(-len(layers) // 14))
    parts += [_text(across(layer), floor + 18, f"{layer:g}", "middle") for layer in layers[::step]]
    parts.append(_text(_LEFT + (_BROAD - _LEFT - _RIGHT) / 2, floor + 36, "layer", "middle", "soft"))
    return lambda title, described: _svg(title, described, floor + 44, joined(*parts), _BROAD)


def bars(rows: Sequence[Row]) -> Callable[[str, str], Markup]:
    """Return what makes a list of bars, all to one scale."""
    most = max((sum(amount for _, amount in row.parts) for row in rows), default=0.0)
    labels = [row.label if len(row.label) <= _LABEL else f"{row.label[: _LABEL - 1]}…" for row in rows]
    below = any(len(label) + len(row.text) > _BESIDE for label, row in zip(labels, rows, strict=True))
    step = _ROW + below * _LINE
    parts = []
    for i, (label, row) in enumerate(zip(labels, rows, strict=True)):
        y, x = i * step, 0.0
        text = _text(0, y + 45, row.text, "start", "soft") if below else _text(_WIDTH, y + 14, row.text, "end", "soft")
        named = element("g", None, element("title", None, row.label), _text(0, y + 14, label))
        parts += [named, text, _rect(0, y + 20, _WIDTH, 11, "track")]
        for kind, amount in row.parts:
            width = _WIDTH * amount / most if most else 0.0
            if amount:
                parts.append(_rect(x, y + 20, max(width, 1.0), 11, kind, f"{row.label}: {row.text}"))
            x += width
    if not rows:
        parts.append(_text(_WIDTH / 2, _ROW / 2, "nothing to show", "middle"))
    return lambda title, described: _svg(title, described, step * max(1, len(rows)), joined(*parts))


def legend(*kinds: tuple[str, str]) -> Markup:
    """Return what the colours mean, each ``(kind, meaning)``."""
    items = (element("span", {"class": "key"}, element("i", {"class": kind}), text) for kind, text in kinds)
    return element("p", {"class": "legend"}, *items)

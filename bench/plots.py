"""The plots of docs/benchmarks.md, drawn from the figures in its tables. They follow the reader's light or dark scheme.

python -m bench.plots                      # docs/images/backends.svg and docs/images/speedups.svg
"""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "benchmarks.md"
WIDTH = 880
STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1f2328 }
  .small { font-size: 12.5px; fill: #59636e } .middle { text-anchor: middle } .end { text-anchor: end }
  .in { font-size: 12px; font-weight: 600; fill: #fff; text-anchor: end }
  .grid { stroke: #d1d9e0; stroke-width: 1 } .limit { stroke: #59636e; stroke-width: 1.5; stroke-dasharray: 5 4 }
  .a { fill: #8250df } .b { fill: #1a7f37 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 } .grid { stroke: #3d444d } .limit { stroke: #9198a1 }
    .a { fill: #ab7df8 } .b { fill: #3fb950 } .in { fill: #0d1117 }
  }
"""
#: What is compared -> the words by which its row in the page's table begins, and which of its "N x" it is.
SPEEDUPS = {
    "inference from the store, over the full model": ("MiniLM cut after layer 3 of 6, inference", 0),
    "training from the store, over the full model": ("the same, training:", 0),
    "training from the store, over computed frozen layers": ("the same, training:", 1),
    "int8 upper layers, over the same in float32": ("int8 upper half", 0),
}
_BAR, _GAP = 16, 4


def row_of(page: str, begin: str) -> list[str]:
    """Return the cells of the one row of a table that begins so; ``ValueError`` where there is none."""
    found = [line for line in page.splitlines() if line.startswith(f"| {begin}")]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows of {PAGE.name} begin with {begin!r}, and one is to")
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def speedups(page: str) -> dict[str, str]:
    """Return the factors that the page says."""
    return {
        what: re.findall(r"(\d+(?:\.\d+)?) x\b", row_of(page, begin)[1])[which]
        for what, (begin, which) in SPEEDUPS.items()
    }


def shares(page: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Return what the page says of each local backend: kind of read -> shares of the limit for long and short
    documents."""
    found, table = {}, page.partition("The four backends")[2]
    for backend in ("hdf5", "zarr", "lmdb"):
        _, warm, cold, _, _ = row_of(table.partition("\n(")[0], f"{backend} |")
        pairs = {"warm, one read": warm, "cold, by the reader": cold}
        found[backend] = {kind: _pair(cell) for kind, cell in pairs.items()}
    return found


def _pair(cell: str) -> tuple[float, float]:
    long, short = re.findall(r"\d+\.\d+", cell)[:2]
    return float(long), float(short)


def drawing(title: str, height: int, parts: list[str]) -> str:
    """Return a picture as SVG."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"><title>{title}</title>'
        f"<style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def line(x: float, top: float, bottom: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x:g}" x2="{x:g}" y1="{top:g}" y2="{bottom:g}"/>'


def bar(left: float, y: float, right: float, kind: str, said: str) -> str:
    width = right - left
    return (
        f'<rect class="{kind}" x="{left:g}" y="{y:g}" width="{width:g}" height="{_BAR}" rx="3"/>'
        f"{text(right - 6, y + 12.5, said, 'in')}"
    )


def picture_of_backends(page: str) -> str:
    """Draw the share of the limit that each backend reaches, long and short documents beside each other."""
    found = shares(page)
    left, unit = 200, 470
    rows = [(backend, kind, pair) for backend, kinds in found.items() for kind, pair in kinds.items()]
    step, top = 2 * _BAR + _GAP + 14, 62
    bottom = top + step * len(rows)
    parts = [line(left + unit * tick / 4, top - 8, bottom, "limit" if tick == 4 else "grid") for tick in range(6)]
    parts += [text(left + unit * tick / 4, bottom + 18, f"{tick * 25} %", "small middle") for tick in range(6)]
    parts.append(text(left + unit, top - 14, "what the machine can do", "small middle"))
    for i, (name, kind) in enumerate((("60-512 tokens x 768", "a"), ("8-48 tokens x 384", "b"))):
        x = left + 190 * i
        parts.append(f'<rect class="{kind}" x="{x}" y="10" width="{_BAR}" height="{_BAR}" rx="3"/>')
        parts.append(text(x + _BAR + 6, 23, name, "small"))
    for i, (backend, kind, (long, short)) in enumerate(rows):
        y = top + i * step
        parts.append(text(left - 12, y + _BAR + 6, f"{backend}: {kind}", "end"))
        parts.append(bar(left, y, left + unit * long, "a", f"{long:.2f}"))
        parts.append(bar(left, y + _BAR + _GAP, left + unit * short, "b", f"{short:.2f}"))
    return drawing("Reading by backend, as a share of what the machine can do", bottom + 30, parts)


def picture_of_speedups(page: str) -> str:
    """Draw how much faster work from the store is."""
    found = speedups(page)
    left, unit, top, step = 450, 130, 34, _BAR + 18
    bottom = top + step * len(found)
    parts = [line(left + unit * tick, top - 8, bottom, "limit" if tick == 1 else "grid") for tick in range(4)]
    parts += [text(left + unit * tick, bottom + 18, f"{tick} x", "small middle") for tick in range(4)]
    parts.append(text(left + unit, top - 14, "as fast", "small middle"))
    for i, (what, factor) in enumerate(found.items()):
        y = top + i * step
        parts.append(text(left - 12, y + 13, what, "end"))
        parts.append(bar(left, y, left + unit * float(factor), "a", f"{factor} x"))
    return drawing("How much faster work from the store is than without it", bottom + 30, parts)


def pictures(page: str) -> dict[str, str]:
    """Return the pictures by their files' names in docs/images."""
    return {"backends.svg": picture_of_backends(page), "speedups.svg": picture_of_speedups(page)}


if __name__ == "__main__":
    for name, drawn in pictures(PAGE.read_text(encoding="utf-8")).items():
        (DOCS / "images" / name).write_text(drawn, encoding="utf-8")

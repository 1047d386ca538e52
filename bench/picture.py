"""The README's picture: what runs once, and what runs every time. Follows the reader's light or dark scheme.

python -m bench.picture docs/images/how.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

WIDTH, HEIGHT, LAYER, GAP = 880, 300, 22, 6
STYLE = """
  text { font: 15px system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
  .small { font-size: 13px; fill: #59636e }
  .lower { fill: #8250df } .upper { fill: #1a7f37 } .store { fill: #bf8700 }
  .arrow { stroke: #59636e; stroke-width: 2; fill: none } .head { fill: #59636e }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 }
    .lower { fill: #ab7df8 } .upper { fill: #3fb950 } .store { fill: #d29922 }
    .arrow { stroke: #9198a1 } .head { fill: #9198a1 }
  }
"""


def layers(kind: str, left: int, bottom: int, count: int, width: int = 150) -> str:
    """Return some layers of a transformer, one above the other."""
    places = [bottom - LAYER - n * (LAYER + GAP) for n in range(count)]
    return "".join(f'<rect class="{kind}" x="{left}" y="{y}" width="{width}" height="{LAYER}" rx="4"/>' for y in places)


def text(x: int, y: int, words: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{words}</text>'


def arrow(*points: tuple[int, int]) -> str:
    line = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline class="arrow" points="{line}" marker-end="url(#end)"/>'


def picture() -> str:
    """Return the picture as SVG."""
    bottom = 235
    parts = [
        text(85, 150, "text") + text(85, 170, "each document once", "small") + arrow((120, 146), (165, 146)),
        layers("lower", 175, bottom, 6)
        + text(250, bottom + 24, "lower layers 1..k")
        + text(250, 50, "run once", "small"),
        arrow((335, 146), (385, 146)),
        '<path class="store" d="M395 100 a55 16 0 0 1 110 0 v92 a55 16 0 0 1 -110 0 z"/>',
        text(450, bottom + 24, "store") + text(450, 50, "rows by content", "small"),
    ]
    runs = ("another epoch", "another task", "a sweep, a probe")
    for number, name in enumerate(runs):
        y = 68 + number * 78
        parts += [arrow((515, 146), (545, 146), (545, y), (575, y)), layers("upper", 585, y + 25, 2, 130)]
        parts.append(text(795, y + 5, name))
    parts.append(
        text(650, bottom + 50, "layers k+1..N and a head, every time") + text(650, 25, "run every time", "small")
    )
    head = '<marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        "<title>Text goes through the lower layers once; every later run starts from the stored rows</title>"
        f'<style>{STYLE}</style><defs>{head}<path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>'
        + "".join(parts)
        + "</svg>\n"
    )


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/how.svg").write_text(picture(), encoding="utf-8")

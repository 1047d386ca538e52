"""The pictures of docs/concepts.md: a space, a hit, a flush. They follow the reader's light or dark scheme.

python -m bench.concepts                   # docs/images/space.svg, hit.svg and flush.svg
"""

from __future__ import annotations

from pathlib import Path

IMAGES = Path(__file__).parents[1] / "docs" / "images"
WIDTH = 880
STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
  .small { font-size: 12.5px; fill: #59636e } .left { text-anchor: start } .strong { font-weight: 600 }
  .box { fill: #f6f8fa; stroke: #afb8c1; stroke-width: 1.5 } .in { fill: #fff; stroke: #d1d9e0; stroke-width: 1.2 }
  .in-bar { fill: #fff }
  .a { fill: #8250df } .b { fill: #1a7f37 } .gone { fill: none; stroke: #afb8c1; stroke-dasharray: 4 3 }
  .arrow { stroke: #59636e; stroke-width: 2; fill: none } .head { fill: #59636e }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 }
    .box { fill: #161b22; stroke: #3d444d } .in { fill: #0d1117; stroke: #3d444d }
    .a { fill: #ab7df8 } .b { fill: #3fb950 } .gone { stroke: #656c76 }
    .in-bar { fill: #0d1117 } .arrow { stroke: #9198a1 } .head { fill: #9198a1 }
  }
"""
_HEAD = (
    '<marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path class="head" d="M0 0 L8 4 L0 8 z"/></marker>'
)


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def box(x: float, y: float, width: float, height: float, kind: str = "box") -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>'


def arrow(*points: tuple[float, float]) -> str:
    line = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline class="arrow" points="{line}" marker-end="url(#end)"/>'


def drawing(title: str, height: int, parts: list[str]) -> str:
    """Return a picture as SVG."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"><title>{title}</title>'
        f"<style>{STYLE}</style><defs>{_HEAD}</defs>{''.join(parts)}</svg>\n"
    )


def space() -> str:
    """Draw a store, its spaces, a space's segments, a segment's entries, and an entry's rows."""
    parts = [box(10, 30, 250, 210), text(135, 20, "store", "strong")]
    for i, (name, what) in enumerate((("space 6241...", "layer 3, float16"), ("space 9ab0...", "layer 5, float16"))):
        y = 48 + 62 * i
        parts += [box(25, y, 220, 50, "in"), text(135, y + 21, name), text(135, y + 39, what, "small")]
    parts += [box(25, 172, 220, 50, "in"), text(135, 193, "collection corpus")]
    parts += [text(135, 211, "a named, ordered list of keys", "small"), arrow((245, 73), (305, 73))]
    parts += [box(310, 30, 250, 210), text(435, 20, "space: all of one recipe", "strong")]
    for i in range(3):
        y = 48 + 62 * i
        parts += [box(325, y, 220, 50, "in"), text(435, y + 21, f"segment {i + 1}")]
        parts.append(text(435, y + 39, "a file, whole or not there", "small"))
    parts += [arrow((545, 73), (605, 73)), box(610, 30, 260, 210), text(740, 20, "segment: entries by key", "strong")]
    for i, (name, rows) in enumerate((("key of a text", 9), ("key of another", 4), ("key of a third", 6))):
        y = 62 + 62 * i
        parts.append(text(628, y + 14, name, "small left"))
        parts += [box(725 + 15 * n, y - 6, 11, 34, "a") for n in range(rows)]
    parts.append(text(740, 258, "an entry: one row for each token", "small"))
    return drawing("A store holds spaces, a space segments, a segment entries, an entry one row a token", 270, parts)


def hit() -> str:
    """Draw what decides whether stored rows are found."""
    parts = [
        box(10, 20, 300, 66),
        text(160, 46, "the document's content"),
        text(160, 68, "what the text says", "small"),
    ]
    parts += [box(10, 110, 300, 84), text(160, 136, "what computes its rows")]
    parts += [text(160, 158, "weights and settings below the cut, layer,", "small")]
    parts += [text(160, 176, "tokenizer, length, both dtypes", "small")]
    parts += [arrow((310, 53), (375, 53)), arrow((310, 152), (375, 152))]
    parts += [box(380, 28, 150, 50, "in"), text(455, 58, "key"), box(380, 127, 150, 50, "in"), text(455, 157, "space")]
    parts += [arrow((530, 53), (570, 53), (570, 95), (605, 95)), arrow((530, 152), (570, 152), (570, 112), (605, 112))]
    parts += [box(610, 78, 100, 50, "in"), text(660, 108, "look up")]
    parts += [arrow((710, 95), (740, 95), (740, 53), (765, 53)), arrow((710, 112), (740, 112), (740, 152), (765, 152))]
    parts += [text(820, 50, "hit", "strong"), text(820, 68, "rows are read", "small")]
    parts += [text(820, 149, "miss", "strong"), text(820, 167, "fill computes", "small")]
    parts.append(
        text(440, 232, "Head, task, seed, optimizer, the upper layers and the model's name decide nothing.", "small")
    )
    return drawing("The content gives the key, what computes the rows gives the space; both decide a hit", 246, parts)


def flush() -> str:
    """Draw what becomes of entries that were put, by when a process is killed."""
    parts = [arrow((40, 150), (860, 150)), text(835, 172, "time", "small")]
    for x, name in ((110, "put"), (350, "flush()"), (560, "flush returns")):
        parts += [f'<line class="arrow" x1="{x}" x2="{x}" y1="140" y2="160"/>', text(x, 180, name)]
    for left, right, kind, said, more in (
        (110, 345, "gone", "in memory", "if killed: absent, never partial"),
        (350, 555, "gone", "being written", "if killed: a whole segment or none"),
        (560, 840, "b", "durable", "kill -9 and power loss change nothing"),
    ):
        parts += [box(left, 62, right - left, 46, kind), text((left + right) / 2, 50, said, "strong")]
        parts.append(text((left + right) / 2, 128, more, "small"))
    parts += [text(700, 90, "found by every process", "in-bar")]
    return drawing("Before flush returns entries may be absent, never partial; afterwards they are durable", 195, parts)


def pictures() -> dict[str, str]:
    """Return the pictures by their files' names in docs/images."""
    return {"space.svg": space(), "hit.svg": hit(), "flush.svg": flush()}


if __name__ == "__main__":
    for name, drawn in pictures().items():
        (IMAGES / name).write_text(drawn, encoding="utf-8")

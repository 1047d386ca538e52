"""A picture of what ``run`` found. Needs matplotlib, which the extra ``plots`` brings."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from actcache.admin.benchmark.corpus import SHAPES
from actcache.admin.benchmark.disk import Bench
from actcache.admin.benchmark.reading import Comparison, Contestant
from actcache.errors import MissingExtraError, UsageError
from actcache.io.newfile import replaced_file

_BAR, _LIMIT, _FAINT, _TEXT = "#3b6ea5", "#c0392b", "#d5d8dc", "#2c3e50"
_WIDEST = 2.0  # where an interval reaches further, it is cut; the numbers beside it are not
_FORMATS = {".png", ".svg", ".pdf"}


def check(path: Path) -> None:
    """Find out whether ``save`` can work, before anything takes time.

    Raises:
        MissingExtraError: matplotlib is not installed.
        UsageError: a file of that name cannot be made.
    """
    _matplotlib("matplotlib")
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"a plot is {', '.join(sorted(_FORMATS))}; {path.name!r} is none of them")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path.absolute().parent} is no folder")


def save(bench: Bench, path: Path) -> None:
    """Draw each backend's share of the limit, a panel for each comparison, into a file that passes ``check``."""
    check(path)
    figures, backend = _matplotlib("matplotlib.figure"), _matplotlib("matplotlib.backends.backend_agg")
    height = 1.35 + 0.62 * max(len(_backends(one)) for one in bench.comparisons)
    figure = figures.Figure(figsize=(9, 1.0 + height * len(bench.comparisons)), layout="constrained")
    backend.FigureCanvasAgg(figure)
    panels = figure.subplots(len(bench.comparisons), 1, squeeze=False)[:, 0]
    highest = max(row.ratios[0].high for one in bench.comparisons for row in _backends(one))
    for panel, one in zip(panels, bench.comparisons, strict=True):
        _draw(panel, one, min(max(1.2, 1.04 * highest), _WIDEST))
    panels[-1].set_xlabel("speed, as a share of the fastest raw read of the same documents", color=_TEXT, fontsize=9)
    facts = bench.facts
    figure.suptitle(
        "Shuffled batches of stored activations: how much of the machine's own speed is reached", color=_TEXT
    )
    note = (
        f"{facts['processor']}; {facts['folder'].partition(', ')[2]}; {facts['system']}\n"
        f"actcache {bench.versions['actcache']}, {facts['when']}; bars: medians; lines: 95 % intervals"
    )
    figure.supxlabel(note, fontsize=7.5, color="#7f8c8d")
    with replaced_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=160, bbox_inches="tight")


def _draw(panel: Any, one: Comparison, widest: float) -> None:
    rows = _backends(one)[::-1]
    limit = next(row for row in one.contestants if row.name == f"the limit: {one.limit}")
    beside = panel.get_yaxis_transform()  # x in parts of the panel's width
    for place, row in enumerate(rows):
        ratio, speed = row.ratios[0], one.speed(row)
        panel.barh(place, ratio.median, height=0.56, color=_BAR, zorder=2)
        reach = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
        panel.errorbar(ratio.median, place, xerr=reach, color=_TEXT, capsize=4, linewidth=1.3, zorder=3)
        panel.text(
            1.02, place, f"{ratio}\n{speed.median:.2f} GB/s", transform=beside, va="center", color=_TEXT, fontsize=9
        )
    panel.axvline(1, color=_LIMIT, linewidth=1.4, linestyle="--", zorder=4)
    words = f"fastest raw read: {one.speed(limit).median:.2f} GB/s"
    panel.text(1, len(rows) - 0.42, words, color=_LIMIT, fontsize=8.5, ha="center")
    shape = SHAPES[one.shape]
    what = f"{shape.shortest}-{shape.longest} tokens x {shape.hidden}, float16, batches of {one.batch}"
    where = {"cold": "from the disk", "warm": "from memory (the page cache)"}[one.mode]
    panel.set_title(f"{where}: {what}, {one.nbytes / 2**30:.2g} GiB", fontsize=10, color=_TEXT, pad=18)
    panel.set_yticks(range(len(rows)), [row.name for row in rows])
    panel.set_xlim(0, widest)
    panel.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    panel.set_ylim(-0.5, len(rows) - 0.5)
    panel.xaxis.grid(True, color=_FAINT, linewidth=0.6, zorder=0)
    panel.set_axisbelow(True)
    panel.tick_params(colors=_TEXT, length=0)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)


def _backends(one: Comparison) -> list[Contestant]:
    return [row for row in one.contestants if row.checked]


def _matplotlib(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"plots need matplotlib ({error}): pip install 'actcache[plots]'") from None

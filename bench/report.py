"""What a benchmark found: tables for people, and the same figures as JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import actcache
from actcache.admin.benchmark.rounds import Spread
from actcache.io import loops
from actcache.io.workers import available_cpus

Cell = str | float | Spread | None


class Report:
    """Prints tables and remembers them. A machine that is busy with other work is named as such."""

    def __init__(self) -> None:
        self.console = Console(width=120)
        self._load = os.getloadavg()[0]
        self._tables: list[dict[str, Any]] = []
        if self._load > 0.5:
            self.console.print(f"this machine is busy: its load was {self._load:.1f} before this benchmark began")
        if loops.missing:
            self.console.print(f"NumPy stands in for the compiled loops, ten times as slow: {loops.missing}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], decimals: int = 2) -> None:
        """Print one table; the first column names the row, None stands for nothing."""
        table = Table(title=title)
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left")
        for row in rows:
            table.add_row(*(_text(cell, decimals) for cell in row))
        self.console.print(table)
        named = [dict(zip(columns, map(_plain, row), strict=True)) for row in rows]
        self._tables.append({"title": title, "rows": named})

    def say(self, text: str) -> None:
        self.console.print(text)
        self._tables.append({"note": text})

    def save(self, path: Path | None) -> None:
        """Write everything to a file, with what machine and versions it was; nothing where there is no path."""
        if path is None:
            return
        where = {
            "command": sys.argv[1:],
            "program": Path(sys.argv[0]).name,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "cpus": available_cpus(),
            "load_before": self._load,
            "load_after": os.getloadavg()[0],
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "actcache": getattr(actcache, "__version__", None),
        }
        path.write_text(json.dumps({**where, "tables": self._tables}, indent=1) + "\n")


def _text(cell: Cell, decimals: int) -> str:
    if cell is None:
        return ""
    if isinstance(cell, Spread):
        return cell.text(decimals)
    return cell if isinstance(cell, str) else f"{cell:.{decimals}f}"


def _plain(cell: Cell) -> Any:
    return asdict(cell) if isinstance(cell, Spread) else cell

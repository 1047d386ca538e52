"""How results are shown: numbers as people read them, dataclasses as JSON values."""

from __future__ import annotations

import dataclasses
import math
import re
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

import numpy as np

from actcache.format.recipe import Recipe

#: What is no text: controls (but tab and line feed), surrogates, noncharacters.
_NO_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")

_NAMELESS = re.compile(r"model|final|best|last|latest|output|out|(checkpoint|ckpt|step|epoch)([-_]?[0-9]+)?|[0-9]+")

_FIRST, _LAST = (datetime(year, 1, 2, tzinfo=UTC).timestamp() for year in (1, 9999))


def clean(text: str) -> str:
    """Return a text that may be printed, wherever it comes from; what is no text is replaced."""
    return _NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", text)


def counted(number: int, thing: str, things: str | None = None) -> str:
    """Return a number with its noun."""
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"


def entries(number: int) -> str:
    """Return a number of entries."""
    return counted(number, "entry", "entries")


def binary(nbytes: float | None) -> str:
    """Return a number of bytes with a binary unit, nothing for None."""
    if nbytes is None:
        return ""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def span(seconds: float) -> str:
    """Return a time span in its largest unit."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:,.{int(seconds < 10 * length)}f} {unit}"
    return f"{seconds:,.0f} s"


def ago(seconds: float | None, unknown: str = "") -> str:
    """Return an age in its largest unit; ``unknown`` for None."""
    return unknown if seconds is None else f"{span(seconds)} ago"


def number(value: float | None) -> str:
    """Return a number with four significant digits, ``-`` for None."""
    return "-" if value is None else f"{value:,.4g}"


def moment(seconds: float) -> str:
    """Return a time since 1970, to the minute; one that no calendar has is the nearest that it has."""
    return datetime.fromtimestamp(min(max(seconds, _FIRST), _LAST), UTC).strftime("%Y-%m-%d %H:%M UTC")


def model_name(recipe: Recipe) -> str:
    """Return the last part of a model's id or folder; of a folder whose name says nothing (``model``,
    ``checkpoint-500``, a snapshot of the hub's cache), also what says more."""
    path = PurePath(recipe.model)
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.split("--")[-1]
    return "/".join(path.parts[-2:]) if path.is_absolute() and _NAMELESS.fullmatch(path.name) else path.name


def spelled(value: object) -> str:
    """Return a field of a recipe in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={item}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def as_json(value: Any) -> Any:
    """Return a result as JSON values: dataclasses by ``to_json`` or else by their fields, keys in hexadecimal."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        return fields_as_json(value)
    if isinstance(value, dict):
        return {name: as_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no infinity
    return value.hex() if isinstance(value, bytes) else value


def fields_as_json(value: Any, *more: str) -> dict[str, Any]:
    """Return the fields of a dataclass, and ``more`` of its attributes, as JSON values."""
    return attributes_as_json(value, *(field.name for field in dataclasses.fields(value)), *more)


def attributes_as_json(value: Any, *names: str) -> dict[str, Any]:
    """Return attributes as JSON values."""
    return {name: as_json(getattr(value, name)) for name in names}

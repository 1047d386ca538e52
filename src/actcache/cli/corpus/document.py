"""What a corpus holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actcache.errors import DocumentError

_SHOWN = 20  # names of a table with many


@dataclass(frozen=True)
class Document:
    """A text and the id that the corpus gives it, None where it gives none."""

    text: str
    id: str | None = None


def id_of(name: Any, where: str) -> str | None:
    """Return an id as a text."""
    if name is None or isinstance(name, str):
        return name
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)
    raise DocumentError(f"{where}: an id is a text or a whole number, not {type(name).__name__}")


def column(names: Sequence[str], wanted: str) -> int:
    """Return where a table has a column; its name has to stand there exactly so, and once."""
    found = [place for place, name in enumerate(names) if name == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        raise DocumentError(f"there is more than one column {wanted!r} ({listed(names)}): rename all but one of them")
    raise DocumentError(f"there is no column {wanted!r}; there are {listed(names)}{like(names, wanted)}")


def unnamed(names: Sequence[str], what: str) -> DocumentError:
    """Return the error of a table or an object whose field of the texts nobody named."""
    return DocumentError(f"name the {what} of the texts with --field (field= in Python); there are {listed(names)}")


def listed(names: Sequence[str]) -> str:
    """Return the names of columns or fields for a message."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return (", ".join(f"{name!r:.80}" for name in names[:_SHOWN]) or "none") + more


def like(names: Sequence[str], wanted: str) -> str:
    """Return what may have been meant by a name that is not there."""
    near = [name for name in names if name.strip().casefold() == wanted.strip().casefold()]
    return f"; write it {near[0]!r}" if near else ""

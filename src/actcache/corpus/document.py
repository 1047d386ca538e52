"""What a corpus holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actcache.errors import DocumentError


@dataclass(frozen=True)
class Document:
    """A text and the id that the corpus gives it, None where it gives none."""

    text: str
    id: str | None = None


def id_of(name: Any, where: str) -> str | None:
    """Return an id as a text.

    Raises:
        DocumentError: it is neither a text nor a whole number; it names ``where`` it stands.
    """
    if name is None or isinstance(name, str):
        return name
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)
    raise DocumentError(f"{where}: an id is a text or a whole number, not {type(name).__name__}")

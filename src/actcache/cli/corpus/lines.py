"""Text files: a document a line."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

from actcache.cli.corpus.document import Document, listed
from actcache.errors import DocumentError

_LOOKED_AT = 5  # lines


def documents(lines: Iterator[str], *, certain: bool) -> Iterator[Document]:
    """Yield the lines that are not blank, without their ends, spaces as they are.

    Args:
        certain: whether somebody said that the lines are texts; else those that begin like a JSON file are refused.

    Raises:
        DocumentError: they look like JSON.
    """
    texts = (text for line in lines if (text := line.removesuffix("\n")).strip())
    head = list(itertools.islice(texts, _LOOKED_AT))
    if head and not certain:
        _check_prose(head)
    yield from map(Document, itertools.chain(head, texts))


def _check_prose(head: list[str]) -> None:
    if head[0].strip() in ("{", "[", "[{"):
        raise DocumentError(f"this looks like JSON over several lines: say --format json with --field, {_NEVERTHELESS}")
    fields = [_fields(line) for line in head]
    if None not in fields:
        raise DocumentError(
            "its lines are JSON objects: name the field of the texts with --field (field= in Python); there are "
            f"{listed(fields[0] or [])}; {_NEVERTHELESS}"
        )


_NEVERTHELESS = "or, where the lines themselves are the texts, --format text"


def _fields(line: str) -> list[str] | None:
    """Return the fields of a JSON object, None for any other line."""
    if not line.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return list(value) if isinstance(value, dict) else None

"""Text files, a document a line; with a field CSV or TSV tables, by the file's name, or JSON lines."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from actcache.corpus.document import Document, id_of
from actcache.errors import DocumentError

STANDARD_INPUT = Path("-")

_LONGEST = 1 << 30  # characters of a cell
_COUNTED_BYTES = 1 << 30
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def opened(source: Path) -> BinaryIO:
    """Open a file, or standard input for ``-``, to read bytes.

    Raises:
        DocumentError: it cannot be read.
    """
    try:
        return open(os.dup(0) if source == STANDARD_INPUT else source, "rb")
    except OSError as error:
        raise DocumentError(f"cannot read {source}: {error.strerror}") from None


def check(source: Path, field: str | None, id_field: str | None) -> None:
    """Raise what ``read`` would raise before its first line."""
    _separator(source, field, id_field)
    opened(source).close()


def count(source: Path) -> int | None:
    """Return how many lines there are, the last one's end or not; None for a stream or a very large file.

    Raises:
        DocumentError: it cannot be read.
    """
    if source == STANDARD_INPUT or not source.is_file() or source.stat().st_size > _COUNTED_BYTES:
        return None
    with opened(source) as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 20), b"")) + 1


def read(source: Path, field: str | None, id_field: str | None) -> Iterator[Document]:
    """Yield the documents of a file; blank lines and empty texts are none.

    Raises:
        DocumentError: the file cannot be read; a line is not UTF-8, no JSON, or has no text under a field.
    """
    separator = _separator(source, field, id_field)
    with opened(source) as file:
        lines = _lines(file)
        if field is None:
            yield from (Document(text) for _, text in lines if text.strip())
        elif separator is not None:
            yield from _of_table(lines, separator, field, id_field)
        else:
            yield from _of_json(lines, field, id_field)


def _separator(source: Path, field: str | None, id_field: str | None) -> str | None:
    separator = _SEPARATORS.get(source.suffix.lower())
    if field is None and (separator is not None or id_field is not None):
        raise DocumentError(f"{source}: name the column or field of the texts with --field")
    return separator


def _lines(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield the lines with their numbers, without their ends and the file's byte order mark, spaces as they are."""
    for number, line in enumerate(file, 1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DocumentError(
                f"line {number} is not UTF-8 ({error.reason}, byte {error.start} of it): convert the file with iconv"
            ) from None


def _of_json(lines: Iterator[tuple[int, str]], field: str, id_field: str | None) -> Iterator[Document]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            text, name = value[field], None if id_field is None else value[id_field]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DocumentError(f"line {number}: no JSON object with a field {field!r} ({error!r})") from None
        if not isinstance(text, str):
            raise DocumentError(f"line {number}: field {field!r} holds {type(text).__name__}, not a text")
        if text:
            yield Document(text, id_of(name, f"line {number}"))


def _of_table(lines: Iterator[tuple[int, str]], separator: str, field: str, id_field: str | None) -> Iterator[Document]:
    csv.field_size_limit(_LONGEST)
    rows = csv.DictReader((f"{line}\n" for _, line in lines), delimiter=separator, strict=True)
    try:
        names = rows.fieldnames or []
        for name in (field, id_field):
            if name is not None and name not in names:
                raise DocumentError(f"there is no column {name!r}; there are {', '.join(map(repr, names)) or 'none'}")
        for row in rows:
            text = row[field]
            if text is None:
                raise DocumentError(f"line {rows.line_num}: the row has too few columns")
            if text.strip():
                yield Document(text, None if id_field is None else id_of(row[id_field], f"line {rows.line_num}"))
    except csv.Error as error:
        raise DocumentError(f"line {rows.line_num}: {error}") from None

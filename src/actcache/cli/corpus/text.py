"""Text files: bytes to lines of UTF-8, nothing lost on the way; a document a line, or rows of CSV and TSV tables."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator
from functools import partial

from actcache.cli.corpus.document import Document, column, listed, unnamed
from actcache.errors import DocumentError

#: Characters of a line, or of a cell or value that goes over lines: whatever has no end is not read whole into memory.
LONGEST = 1 << 28
_PIECE = 1 << 16  # characters

_FOREIGN = (
    (b"\x1f\x8b", "gzip data (name it .gz, or pipe it through zcat)"),
    (b"\xfd7zXZ\0", "xz data (name it .xz, or pipe it through xzcat)"),
    (b"\x28\xb5\x2f\xfd", "zstd data (name it .zst, or pipe it through zstdcat)"),
    (b"PK\x03\x04", "a zip archive, which .xlsx and .docx files are, too: unpack or export it"),
    (b"PAR1\x15", "Parquet (name it .parquet, or say --format parquet)"),
    (b"ARROW1\0\0", "Arrow (name it .arrow, or say --format arrow)"),
    (b"%PDF-", "a PDF: extract its text"),
    (b"SQLite format 3\0", "an SQLite database: export a table"),
    (b"\x89HDF\r\n", "HDF5"),
)
_BZIP2 = b"1AY&SY"  # from the fifth byte on

SEPARATORS = {"csv": ",", "tsv": "\t"}
_LOOKED_AT = 5  # lines
_NEVERTHELESS = "or, where the lines themselves are the texts, --format text"


def decoded(file: io.BufferedReader, newline: str | None) -> Iterator[str]:
    """Yield the lines of a file, with their ends but without its byte order mark.

    Args:
        newline: of ``open``, which cuts and translates in the same way: None where LF, CR LF and CR end a line and
            become LF, ``""`` where they stay what they are, LF where nothing else ends a line.
    """
    with _stream(file, newline) as stream:
        for number, line in enumerate(iter(partial(stream.readline, LONGEST), ""), 1):
            if len(line) >= LONGEST:
                raise DocumentError(f"line {number} is longer than {LONGEST:,} characters")
            _check(line, number)
            yield line


def pieces(file: io.BufferedReader) -> Iterator[str]:
    """Yield what a file holds in pieces of one size, whatever its lines are; else as ``decoded``."""
    with _stream(file, "\n") as stream:
        number = 1
        for piece in iter(partial(stream.read, _PIECE), ""):
            _check(piece, number)
            number += piece.count("\n")
            yield piece


def _stream(file: io.BufferedReader, newline: str | None) -> io.TextIOWrapper:
    _check_head(file.peek(16)[:16])
    # What cannot be decoded passes as surrogates, so that the line is known that it stands in.
    return io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline)


def _check(text: str, number: int) -> None:
    """Refuse what could not be decoded of a text that begins in line ``number``."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line, begin = number + text.count("\n", 0, error.start), text.rfind("\n", 0, error.start) + 1
        byte = ord(text[error.start]) - 0xDC00
        raise DocumentError(
            f"line {line} is not UTF-8 (byte 0x{byte:02x} after {error.start - begin} characters): convert the file "
            "with iconv"
        ) from None


def _check_head(head: bytes) -> None:
    """Refuse what is UTF-8 by accident, or would be said to be a broken line of it."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:2]:
        raise DocumentError("line 1 is UTF-16 or UTF-32, not UTF-8: convert the file with iconv -f UTF-16 -t UTF-8")
    for magic, what in (*_FOREIGN, (head[:4] + _BZIP2, "bzip2 data (name it .bz2, or pipe it through bzcat)")):
        if head.startswith(magic):
            raise DocumentError(f"these are no lines of text but {what}")


# --- a document a line ------------------------------------------------------------------------------------------------


def line_documents(lines: Iterator[str], *, certain: bool) -> Iterator[Document]:
    """Yield the lines that are not blank, without their ends, spaces as they are.

    Unless it is certain that the lines are texts, those that begin like a JSON file are refused.
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


def _fields(line: str) -> list[str] | None:
    """Return the fields of a JSON object, None for any other line."""
    if not line.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return list(value) if isinstance(value, dict) else None


# --- tables -----------------------------------------------------------------------------------------------------------


def table_documents(
    lines: Iterator[str], separator: str, field: str | None, id_field: str | None
) -> Iterator[Document]:
    """Yield the texts of a column of what was decoded with ``newline=""``; empty cells and blank lines are none.

    Line ends inside of quotes belong to the cell, as they are.
    """
    rows = _rows(lines, separator)
    _, names = next(rows, (1, []))
    if field is None:
        raise unnamed(names, "column")
    place, id_place = column(names, field), None if id_field is None else column(names, id_field)
    for line, row in rows:
        if len(row) != len(names):
            # Whoever takes what is there takes half a text: a separator or a line end stands outside of quotes.
            raise DocumentError(
                f"line {line}: the row has too {'few' if len(row) < len(names) else 'many'} columns, {len(row)}, where "
                f"the header has {len(names)}: texts with separators or line ends have to be quoted"
            )
        if text := row[place]:
            yield Document(text, None if id_place is None else row[id_place])


def _rows(lines: Iterator[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not blank, and the line that each begins in."""
    csv.field_size_limit(max(LONGEST, csv.field_size_limit()))  # the whole process's: never make it smaller
    rows = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        begin = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise DocumentError(f"the row that begins in line {begin}: {error}") from None
        if row is None:
            return
        if row:
            yield begin, row

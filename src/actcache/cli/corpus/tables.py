"""CSV and TSV tables, as the ``csv`` module reads a file that was opened with ``newline=""``."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from actcache.cli.corpus.decoding import LONGEST
from actcache.cli.corpus.document import Document, column, unnamed
from actcache.errors import DocumentError

SEPARATORS = {"csv": ",", "tsv": "\t"}


def documents(lines: Iterator[str], separator: str, field: str | None, id_field: str | None) -> Iterator[Document]:
    """Yield the texts of a column; empty cells are none, and so are blank lines between rows.

    Line ends inside of quotes belong to the cell, as they are.

    Args:
        lines: with their ends, untranslated.

    Raises:
        DocumentError: there is no such column, or more than one; a row has not as many cells as the header, or
            quotes that do not end.
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

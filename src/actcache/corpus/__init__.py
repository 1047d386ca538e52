"""Corpora as files: which documents they hold, under which ids and keys. All are streamed.

A text file has a document a line. With a field, a file is a table: CSV, TSV or Parquet where its name ends so, else
JSON lines. A folder is a dataset that ``save_to_disk`` of Hugging Face's ``datasets`` wrote. Parquet and such datasets
need the extra ``corpora``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache.corpus import arrow, lines
from actcache.corpus.document import Document
from actcache.errors import DocumentError
from actcache.key import document_key, key_array

__all__ = ["Document", "check", "count", "keys", "read"]


def read(source: Path, field: str | None = None, id_field: str | None = None) -> Iterator[Document]:
    """Yield the documents of a file or folder, ``-`` for standard input; blank lines and empty texts are none.

    Raises:
        DocumentError: it cannot be read; a line is not UTF-8, no JSON, or has no text under a field; a column is not
            there or does not hold texts.
        MissingExtraError: it needs pyarrow.
    """
    if not _is_arrow(source):
        yield from lines.read(source, field, id_field)
        return
    yield from arrow.read(source, _named(source, field), id_field)


def check(source: Path, field: str | None = None, id_field: str | None = None) -> None:
    """Raise what ``read`` would raise before its first document; standard input stays unread."""
    if _is_arrow(source):
        arrow.check(source, _named(source, field), id_field)
    else:
        lines.check(source, field, id_field)


def count(source: Path) -> int | None:
    """Return about how many documents there are, at most, to show progress; None where that takes long to learn."""
    return arrow.count(source) if _is_arrow(source) else lines.count(source)


def keys(source: Path, field: str | None = None) -> NDArray[np.uint8]:
    """Return the keys of a corpus's documents, ``[n, 32]``, in their order. Raises as ``read`` does."""
    return key_array([document_key(document.text) for document in read(source, field)])


def _is_arrow(source: Path) -> bool:
    return source.suffix.lower() in arrow.PARQUET or source.is_dir()


def _named(source: Path, field: str | None) -> str:
    if field is None:
        raise DocumentError(f"{source}: name the column of the texts with --field")
    return field

"""Documents as callers give them: refused where they are none, and their keys."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence, Set, Sized
from typing import Any, TypeVar

import numpy as np

from actcache.errors import DocumentError, UsageError
from actcache.format.keys import Document, document_key

T = TypeVar("T")


def check_texts(texts: object) -> None:
    """Raise ``UsageError`` for what is not documents, though it can be iterated over.

    That is one text, whose characters would be taken for documents; a mapping or a table, whose names would be; a set,
    which has no order; a file, whose lines end in line feeds; a loader's batches, which would be taken for words.
    """
    name = type(texts).__name__
    if isinstance(texts, str | bytes):
        raise UsageError("give a list or an iterable of documents, not one text")
    if isinstance(texts, os.PathLike):
        raise UsageError(f"{texts} is a path, not documents: read the file, or fill from it with cachectl fill")
    if isinstance(texts, Mapping):
        raise UsageError(f"give a list of documents, not a {name}: one of its values, such as {_one_of(list(texts))}")
    if (columns := _columns(texts)) is not None:
        raise UsageError(
            f"this {name} is a table, not documents: name the column (field={_named(columns)!r}), or give it alone, "
            f"such as {_one_of(columns)}"
        )
    if isinstance(texts, Set) and not isinstance(texts, KeysView):
        raise UsageError(f"this {name} has no order, by which documents are told apart: give a list")
    if isinstance(texts, io.IOBase) or hasattr(texts, "readline"):
        raise UsageError(
            "an open file is no list of documents, for its lines have their ends: give [line.rstrip('\\n') for line in "
            "file], or fill from the file with cachectl fill"
        )
    if hasattr(texts, "collate_fn"):
        raise UsageError(f"this {name} gives batches, not documents: give the texts themselves")
    if isinstance(texts, np.ndarray) and texts.ndim > 1 and texts.dtype.kind not in "iu":
        raise UsageError("give a list or one-dimensional array of texts: one column of this array, such as texts[:, 0]")
    iterable = isinstance(texts, Iterable) or hasattr(texts, "__getitem__")
    if not iterable or getattr(texts, "ndim", 1) == 0:
        called = ": call it" if callable(texts) else ""
        raise UsageError(f"give a list or an iterable of documents, not a {name}{called}")


def _columns(texts: object) -> list[object] | None:
    """Return the names of a table's columns (of pandas, Polars, Arrow, datasets, ...); None where it is no table."""
    structured = getattr(getattr(texts, "dtype", None), "names", None)
    found = (structured, getattr(texts, "column_names", None), getattr(texts, "columns", None))
    return next(([*names] for names in found if names is not None and not callable(names)), None)


def _named(names: list[object]) -> object:
    return "text" if "text" in names or not names else names[0]


def _one_of(names: list[object]) -> str:
    example = _named(names)
    there = ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
    return f"texts[{example!r}] (there are {there or 'none'})"


#: Where the documents of a table or of rows are: a column's name, or two of them for pairs of texts.
Field = str | tuple[str, str]


def documents_in(texts: Any, field: Field | None) -> Iterable[Document]:
    """Return the documents that lie in a field of a data set, streamed where it is; without a field, ``texts``.

    Args:
        texts: a data set of Hugging Face (of any format, streamed or not), a table of pandas, Polars or Arrow, a
            mapping of columns, or any iterable of rows that are mappings.
        field: the column's name; two of them (a tuple) for pairs of texts.

    Raises:
        UsageError: there is no such column, or the rows are no mappings.
    """
    if field is None:
        return texts  # type: ignore[no-any-return]
    names = field if isinstance(field, tuple) else (field,)
    if not names or len(names) > 2 or not all(isinstance(name, str) for name in names):
        raise UsageError(f"field is a column's name, or two of them for pairs of texts, not {field!r:.80}")
    columns = [*texts] if isinstance(texts, Mapping) else _columns(texts)
    if columns is not None:
        missing = [name for name in names if name not in columns]
        if missing:
            there = ", ".join(map(repr, columns)) or "none"
            raise UsageError(f"this {type(texts).__name__} has no column {missing[0]!r}; there are {there}")
    elif isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        check_texts(texts)
        raise UsageError(f"field names a column of rows, and this {type(texts).__name__} has none")
    return Fields(texts, names, columns is not None and hasattr(texts, "__len__"))


class Fields(Iterable[Any]):
    """One field of all rows, or two as pairs; it can be gone through as often as the rows can."""

    def __init__(self, rows: Any, names: tuple[str, ...], by_column: bool) -> None:
        self._rows, self._names, self._by_column = rows, names, by_column

    def __iter__(self) -> Iterator[Any]:
        if self._by_column:
            columns = [self._rows[name] for name in self._names]
            return iter(columns[0]) if len(columns) == 1 else map(_pair, *columns)
        return (self._of(position, row) for position, row in enumerate(self._rows))

    def _of(self, position: int, row: Any) -> Any:
        if not isinstance(row, Mapping) or any(name not in row for name in self._names):
            has = f"has {', '.join(map(repr, row))}" if isinstance(row, Mapping) else f"is a {type(row).__name__}"
            wanted = " and ".join(map(repr, self._names))
            raise UsageError(f"row {position} has no {wanted}: it {has}")
        values = [row[name] for name in self._names]
        return values[0] if len(values) == 1 else _pair(*values)

    def __length_hint__(self) -> int:
        if not isinstance(self._rows, Sized):
            return NotImplemented  # type: ignore[no-any-return]
        return len(self._rows[self._names[0]] if isinstance(self._rows, Mapping) else self._rows)


def _pair(first: Any, second: Any) -> tuple[Any, Any]:
    plain = [value.as_py() if hasattr(value, "as_py") else value for value in (first, second)]
    return plain[0], plain[1]


def streamed(texts: Iterable[T]) -> Iterator[T]:
    """Return an iterator over documents, of which the first has been taken already.

    Raises:
        UsageError: see ``check_texts``; or it is an iterator that gives nothing. An empty list is fine.
    """
    check_texts(texts)
    documents = iter(texts)
    first = list(itertools.islice(documents, 1))
    if not first and isinstance(texts, Iterator):
        raise UsageError(
            f"the {type(texts).__name__} gave no documents: it was used up before (it can be gone through only once), "
            "or never had any. Give a list, or make it anew each time"
        )
    return itertools.chain(first, documents)


def listed(texts: Iterable[T]) -> list[T]:
    """Return documents as a list; raises as ``streamed`` does."""
    return list(streamed(texts))


def chunked(texts: Iterable[T], size: int) -> Iterator[tuple[int, list[T]]]:
    """Yield documents so many at a time, each time with the position of the first."""
    iterator, first = iter(texts), 0
    while chunk := list(itertools.islice(iterator, size)):
        yield first, chunk
        first += len(chunk)


def document_keys(documents: Sequence[Document], first: int = 0) -> list[bytes]:
    """Return the documents' keys; raises ``DocumentError`` with the position, from ``first``, of one without."""
    keys = []
    for position, document in enumerate(documents, first):
        try:
            keys.append(document_key(document))
        except DocumentError as error:
            raise DocumentError(f"position {position} of the texts: {error}") from None
    return keys

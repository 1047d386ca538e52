"""Documents as callers give them: refused where they are none, and their keys."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence, Set, Sized
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from actcache.errors import DocumentError, UsageError
from actcache.format.arguments import to_numpy
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
    return _fields(texts, names)


#: Which fields stand beside the tokens: their names, or the columns that they become and their names.
ColumnFields = Sequence[str] | Mapping[str, str]


def documents_with_columns(texts: Any, field: Field | None, columns: ColumnFields) -> DocumentsWithColumns:
    """Return the documents that lie in a field of a data set, and what other fields say of their tokens.

    Raises:
        UsageError: there is no such field; ``field`` is not given; ``columns`` are none.
    """
    fields = columns
    if isinstance(columns, Sequence) and not isinstance(columns, str):
        fields = {name: name for name in columns if isinstance(name, str)}
    named = isinstance(fields, Mapping) and all(isinstance(one, str) for pair in fields.items() for one in pair)
    if not isinstance(fields, Mapping) or not named or not fields or len(fields) < len(columns):
        raise UsageError(f"columns are names of fields, or a mapping of columns to them, not {columns!r:.80}")
    documents = documents_in(texts, field)
    if not isinstance(documents, Fields):
        raise UsageError("columns are fields of a data set beside its documents: say which field has these (field=...)")
    return DocumentsWithColumns(
        _fields(texts, (*documents.names, *fields.values())), len(documents.names), tuple(fields)
    )


def _fields(texts: Any, names: tuple[str, ...]) -> Fields:
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
        self._rows, self.names, self._by_column = rows, names, by_column

    def __iter__(self) -> Iterator[Any]:
        return map(_document, self.values())

    def values(self) -> Iterator[tuple[Any, ...]]:
        """Yield what each row has in all of the fields."""
        if self._by_column:
            return zip(*(self._rows[name] for name in self.names), strict=False)
        return (self._of(position, row) for position, row in enumerate(self._rows))

    def _of(self, position: int, row: Any) -> tuple[Any, ...]:
        if not isinstance(row, Mapping) or any(name not in row for name in self.names):
            has = f"has {', '.join(map(repr, row))}" if isinstance(row, Mapping) else f"is a {type(row).__name__}"
            wanted = " and ".join(map(repr, self.names))
            raise UsageError(f"row {position} has no {wanted}: it {has}")
        return tuple(row[name] for name in self.names)

    def __length_hint__(self) -> int:
        if not isinstance(self._rows, Sized):
            return NotImplemented  # type: ignore[no-any-return]
        return len(self._rows[self.names[0]] if isinstance(self._rows, Mapping) else self._rows)


class TokenColumns(Protocol):
    """What stands beside the tokens of some documents, by the documents' positions."""

    beside: tuple[str, ...]  # the columns' names

    def take(self, position: int, tokens: int) -> dict[str, NDArray[Any]]:
        """Return the columns of a document of so many tokens, ``[tokens, ...]`` each, and drop them here.

        Raises:
            DocumentError: one has another length, or holds no numbers; it names the position.
        """

    def forget(self, before: int) -> None:
        """Drop what is held of documents before a position."""


class HeldColumns:
    """What stands beside documents' tokens, held until it is taken; see ``TokenColumns``."""

    def __init__(self, beside: tuple[str, ...]) -> None:
        self.beside = beside
        self._held: dict[int, tuple[Any, ...]] = {}

    def hold(self, position: int, values: tuple[Any, ...]) -> None:
        self._held[position] = values

    def give(self, position: int) -> tuple[Any, ...]:
        """Return a document's columns as they came, to be held elsewhere, and drop them here."""
        return tuple(map(_plain, self._held.pop(position)))

    def take(self, position: int, tokens: int) -> dict[str, NDArray[Any]]:
        arrays = {}
        for name, value in zip(self.beside, self.give(position), strict=True):
            try:
                array = to_numpy(value) if hasattr(value, "detach") else np.asarray(value)
            except ValueError:  # lists of several lengths
                array = np.empty(0, object)
            if array.dtype == object or array.shape[:1] != (tokens,):
                what = "no array" if array.dtype == object else f"the shape {list(array.shape)}"
                raise DocumentError(
                    f"position {position} of the texts: column {name} has {what}, and the document {tokens} tokens: "
                    "give one value a token, special tokens included"
                )
            arrays[name] = array
        return arrays

    def forget(self, before: int) -> None:
        for position in [one for one in self._held if one < before]:
            del self._held[position]


class DocumentsWithColumns(HeldColumns, Iterable[Any]):
    """Documents, streamed, and what stands beside their tokens: that of a document is held until it is taken.

    ``fields``: those of the documents, ``count`` of them, then those of the columns that are named.
    """

    def __init__(self, fields: Fields, count: int, columns: tuple[str, ...]) -> None:
        super().__init__(columns)  # "beside": no table has such a name
        self._fields, self._count = fields, count

    def __iter__(self) -> Iterator[Any]:
        self._held.clear()
        for position, values in enumerate(self._fields.values()):
            self.hold(position, values[self._count :])
            yield _document(values[: self._count])

    def __length_hint__(self) -> int:
        return self._fields.__length_hint__()


def _plain(value: Any) -> Any:
    return value.as_py() if hasattr(value, "as_py") else value


def _document(values: tuple[Any, ...]) -> Any:
    return values[0] if len(values) == 1 else _pair(*values)


def _pair(first: Any, second: Any) -> tuple[Any, Any]:
    return _plain(first), _plain(second)


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

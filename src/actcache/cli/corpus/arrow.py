"""Parquet files, Arrow files and streams, and datasets that Hugging Face's library saved, by pyarrow alone.

``Dataset.save_to_disk`` writes Arrow streams and a ``state.json`` that names them in order (a selection or a shuffle is
applied before that), so that nothing of that library is needed to read them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from actcache.cli.corpus.document import Document, column, id_of, unnamed
from actcache.cli.corpus.files import SPLITS, STATE, File, Folder, Kind
from actcache.errors import ActcacheError, DocumentError, requires_extra

_ROWS = 1024  # that are decoded at a time
_BUFFER = 1 << 20  # bytes of a column that are read at a time
_FILE_MAGIC = b"ARROW1"  # an Arrow file, which has its batches' places at its end; a stream begins otherwise


def documents(file: File, kind: Kind, field: str | None, id_field: str | None) -> Iterator[Document]:
    """Yield the documents of a Parquet or Arrow file; rows whose text is null or empty are none.

    A batch of rows is held at a time: 1024 of a Parquet file, those that an Arrow file was written with (1000 by
    Hugging Face's library). Raises also ``OSError`` and ``MissingExtraError``.
    """
    if file.is_stream:
        raise DocumentError(f"a {kind} file is read from its end: give the file, no pipe")
    number = 0
    with _readable(), _opened(file, kind) as (schema, batches_of):
        names = list(schema.names)
        if field is None:
            raise unnamed(names, "column")
        for name, fits, wanted in ((field, _is_text, "texts"), (id_field, _is_id, "texts or whole numbers")):
            if name is not None and not fits(held := schema.field(column(names, name)).type):
                raise DocumentError(f"the column {name!r} holds {held}, not {wanted}")
        for batch in batches_of([field] if id_field in (None, field) else [field, id_field]):
            texts = _column(batch, field)
            ids = [None] * len(texts) if id_field is None else _column(batch, id_field)
            for text, name in zip(texts, ids, strict=True):
                number += 1
                if text:
                    yield Document(text, id_of(name, f"row {number}"))


def count(file: File, kind: Kind) -> int | None:
    """Return how many rows a Parquet file has; None for others, of which only reading all of it would tell."""
    if kind is not Kind.parquet:
        return None
    _, parquet = _library()
    with _readable(), parquet.ParquetFile(file.path) as opened:
        return int(opened.metadata.num_rows)


def saved_dataset(folder: Folder) -> list[File] | None:
    """Return the Arrow files of a saved dataset, in order; None where the folder is none."""
    state = folder.file(STATE)
    if state is None:
        _refuse_splits(folder)
        return None
    try:
        with state.open() as opened:
            names = [file["filename"] for file in json.loads(opened.read())["_data_files"]]
        if not all(isinstance(name, str) and name and "/" not in name for name in names):
            raise ValueError(f"it names files that are not in the folder: {names}")
    except OSError as error:
        raise DocumentError(f"cannot read {state}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DocumentError(f"{state} is none that Dataset.save_to_disk wrote: {error!r:.200}") from None
    found = [folder.file(name) for name in names]
    if None in found:
        raise DocumentError(f"cannot read {folder.name}/{names[found.index(None)]}: {state} names it, it is not there")
    return [file for file in found if file is not None]


def _refuse_splits(folder: Folder) -> None:
    named = folder.file(SPLITS)
    if named is None:
        return
    splits: list[str] = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError), named.open() as opened:
        splits = [str(split) for split in json.loads(opened.read())["splits"]]
    raise DocumentError(
        f"{folder.name} holds several splits ({', '.join(splits) or 'none'}), not one dataset: give one split's folder"
        + (f", such as {folder.name}/{splits[0]}" if splits else "")
    )


@contextlib.contextmanager
def _opened(file: File, kind: Kind) -> Iterator[tuple[Any, Any]]:
    """Open a file: its schema, and a function that yields batches that hold at least some columns."""
    pyarrow, parquet = _library()
    # Read, not mapped: a file that shrinks under a mapping kills the process.
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        data = enter(pyarrow.OSFile(str(file.path)) if file.path else pyarrow.PythonFile(enter(file.open()), mode="r"))
        if kind is Kind.parquet:
            # Buffered ahead, or without a buffer, a whole row group is held, which may be the whole file.
            opened = enter(parquet.ParquetFile(data, buffer_size=_BUFFER, pre_buffer=False))
            yield opened.schema_arrow, lambda columns: opened.iter_batches(_ROWS, columns=columns)
            return
        is_file = data.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        data.seek(0)
        if is_file:
            opened = enter(pyarrow.ipc.open_file(data))
            yield opened.schema, lambda columns: map(opened.get_batch, range(opened.num_record_batches))
        else:
            stream = enter(pyarrow.ipc.open_stream(data))
            yield stream.schema, lambda columns: stream


def _is_text(kind: Any) -> bool:
    held = kind.value_type if str(kind).startswith("dictionary<") else kind
    return str(held) in ("string", "large_string", "string_view", "null")


def _is_id(kind: Any) -> bool:
    return _is_text(kind) or str(kind).removeprefix("u") in ("int8", "int16", "int32", "int64")


def _column(batch: Any, name: str) -> list[Any]:
    try:
        values: list[Any] = batch.column(batch.schema.get_field_index(name)).to_pylist()
    except UnicodeDecodeError as error:
        raise DocumentError(f"the column {name!r} holds a text that is not UTF-8 ({error.reason})") from None
    return values


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Raise as ``DocumentError`` what pyarrow has against a file: it has an exception under most of Python's."""
    try:
        yield
    except ActcacheError:
        raise
    except (ValueError, NotImplementedError) as error:
        said = str(error).strip().partition("\n")[0]
        raise DocumentError(f"the file is damaged, or of another format than its name says: {said}") from None


def _library() -> tuple[Any, Any]:
    with requires_extra("corpora", "Parquet and Arrow files need pyarrow"):
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    return pyarrow, pyarrow.parquet

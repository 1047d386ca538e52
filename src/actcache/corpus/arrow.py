"""Parquet files, and datasets that Hugging Face's library saved, by pyarrow alone.

``Dataset.save_to_disk`` writes Arrow streams and a ``state.json`` that names them in order (a selection or a shuffle is
applied before that), so that nothing of that library is needed to read them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actcache.corpus.document import Document, id_of
from actcache.errors import DocumentError, MissingExtraError

PARQUET = (".parquet", ".pq")

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_ROWS = 1024  # that are decoded at a time
_BUFFER = 1 << 20  # bytes of a column that are read at a time


def read(source: Path, field: str, id_field: str | None) -> Iterator[Document]:
    """Yield the documents of a Parquet file or a saved dataset; rows whose text is null or empty are none.

    A batch of rows is held at a time: 1024 of a Parquet file, those that the dataset was written with (1000).

    Raises:
        DocumentError: it cannot be read, or has no such columns of texts and ids.
        MissingExtraError: pyarrow is not installed.
    """
    number = 0
    for schema, batches in _parts(source, _wanted(field, id_field)):
        _check_columns(schema, field, id_field)
        for batch in batches:
            texts = _column(batch, field)
            names = [None] * len(texts) if id_field is None else _column(batch, id_field)
            for text, name in zip(texts, names, strict=True):
                number += 1
                if text:
                    yield Document(text, id_of(name, f"row {number}"))


def check(source: Path, field: str, id_field: str | None) -> None:
    """Raise what ``read`` would raise before its first document."""
    for schema, _ in _parts(source, _wanted(field, id_field)):
        _check_columns(schema, field, id_field)


def count(source: Path) -> int | None:
    """Return how many rows a Parquet file has; None for a dataset, of which only reading all of it would tell.

    Raises:
        DocumentError, MissingExtraError: see ``read``.
    """
    if source.is_dir():
        return None
    _, parquet = _library(source)
    with _readable(source), parquet.ParquetFile(source) as file:
        return int(file.metadata.num_rows)


def _wanted(field: str, id_field: str | None) -> list[str]:
    return [field] if id_field in (None, field) else [field, str(id_field)]


def _parts(source: Path, columns: list[str]) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Yield each file's schema and its batches, which hold at least these columns."""
    pyarrow, parquet = _library(source)
    if source.suffix.lower() in PARQUET and not source.is_dir():
        # Buffered ahead, or without a buffer, a whole row group is held, which may be the whole file.
        with _readable(source), parquet.ParquetFile(source, buffer_size=_BUFFER, pre_buffer=False) as file:
            yield file.schema_arrow, _guarded(source, file.iter_batches(_ROWS, columns=columns))
        return
    for path in _files(source):
        # Read, not mapped: a file that shrinks under a mapping kills the process.
        with _readable(path), pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
            yield stream.schema, _guarded(path, stream)


def _files(folder: Path) -> list[Path]:
    """Return the Arrow files of a saved dataset, in order."""
    try:
        names = [file["filename"] for file in json.loads((folder / _STATE).read_bytes())["_data_files"]]
        if not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise ValueError(f"it names files that are not in the folder: {names}")
    except FileNotFoundError:
        raise DocumentError(_no_dataset(folder)) from None
    except OSError as error:
        raise DocumentError(f"cannot read {folder / _STATE}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DocumentError(f"{folder / _STATE} is none that Dataset.save_to_disk wrote: {error!r:.200}") from None
    return [folder / name for name in names]


def _no_dataset(folder: Path) -> str:
    """Say what a folder is that has no ``state.json``."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        splits = [str(split) for split in json.loads((folder / _SPLITS).read_bytes())["splits"]]
        example = folder / splits[0] if splits else folder
        return (
            f"{folder} holds several splits ({', '.join(splits) or 'none'}), not one dataset: give one split's folder, "
            f"such as {example}"
        )
    return f"{folder} is a folder, but none that Dataset.save_to_disk wrote: there is no {_STATE} in it"


def _check_columns(schema: Any, field: str, id_field: str | None) -> None:
    for name, fits, wanted in ((field, _is_text, "texts"), (id_field, _is_id, "texts or whole numbers")):
        if name is None:
            continue
        found = schema.get_all_field_indices(name)
        if len(found) != 1:
            there = ", ".join(map(repr, schema.names)) or "none"
            raise DocumentError(f"there is {'more than one' if found else 'no'} column {name!r}; there are {there}")
        kind = schema.field(found[0]).type
        if not fits(kind):
            raise DocumentError(f"the column {name!r} holds {kind}, not {wanted}")


def _is_text(kind: Any) -> bool:
    return str(getattr(kind, "value_type", kind) if _is_dictionary(kind) else kind) in (
        "string",
        "large_string",
        "string_view",
        "null",
    )


def _is_id(kind: Any) -> bool:
    return _is_text(kind) or str(kind).removeprefix("u") in ("int8", "int16", "int32", "int64")


def _is_dictionary(kind: Any) -> bool:
    return str(kind).startswith("dictionary<")


def _column(batch: Any, name: str) -> list[Any]:
    try:
        values: list[Any] = batch.column(batch.schema.get_field_index(name)).to_pylist()
    except UnicodeDecodeError as error:
        raise DocumentError(f"the column {name!r} holds a text that is not UTF-8 ({error.reason})") from None
    return values


def _guarded(path: Path, batches: Any) -> Iterator[Any]:
    with _readable(path):
        yield from batches


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise as ``DocumentError`` what pyarrow has against a file: it has an exception under most of Python's."""
    try:
        yield
    except DocumentError:
        raise
    except OSError as error:
        raise DocumentError(f"cannot read {path}: {error.strerror or _first_line(error)}") from None
    except (ValueError, NotImplementedError) as error:
        raise DocumentError(
            f"{path} is damaged, or of another format than its name says: {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _library(source: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(f"{source} needs pyarrow: pip install 'actcache[corpora]' ({error})") from None
    return pyarrow, pyarrow.parquet

"""Corpora as files: which documents they hold, under which ids and keys. All are streamed.

A text file has a document a line. Everything else has fields: JSON lines, a JSON array, CSV, TSV, Parquet, Arrow, by
the file's name, which may end in .gz, .bz2, .xz or .zst as well. A source is one file, a folder, a pattern such as
``data/*.jsonl.gz``, any of these in an object store, a dataset that ``save_to_disk`` of Hugging Face's ``datasets``
wrote, or ``-`` for standard input. Parquet, Arrow, such datasets and .zst need the extra ``corpora``, object stores the
extra ``s3``. Folders of images or audio are ``find_media``'s. See docs/corpora.md.

Whatever is wrong with a corpus is a ``DocumentError``, here and in all modules below.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache.cli.corpus.document import Document
from actcache.cli.corpus.files import Kind
from actcache.cli.corpus.media import Media, MediaDocument, find_media
from actcache.cli.corpus.shards import find_shards
from actcache.format.keys import document_key, key_array

__all__ = ["Document", "Kind", "Media", "MediaDocument", "check", "count", "find_media", "is_stream", "keys", "read"]


def read(
    source: str | Path, field: str | None = None, id_field: str | None = None, format: str | None = None
) -> Iterator[Document]:
    """Yield the documents of a corpus, file by file in the order of their names; blank lines and empty texts are none.

    Args:
        field, id_field: the columns or JSON fields of the texts and their ids; texts that stand alone have none.
        format: a value of ``Kind``, where the names do not say it or say it wrongly; by ``text`` the lines are the
            texts, whatever they look like.

    Raises:
        DocumentError: it cannot be read, names no corpus, or more than one kind; no field is named where there are
            some, or one that is not there or holds no texts; a line is not UTF-8, no JSON or no row of its table. It
            names file and line.
        MissingExtraError: an extra has to be installed.
        StoreError: an object store fails.
    """
    with find_shards(source, field, id_field, format) as found:
        for shard in found.files:
            yield from found.documents(shard)


def check(source: str | Path, field: str | None = None, id_field: str | None = None, format: str | None = None) -> None:
    """Raise what ``read`` would raise before a file's first document: of each file here, of the first one elsewhere.

    Pipes and standard input stay unread.
    """
    with find_shards(source, field, id_field, format) as found:
        for shard in found.files if found.local else found.files[:1]:
            if shard.is_stream:
                found.check_named(shard)
            else:
                documents = found.documents(shard)
                next(documents, None)
                documents.close()


def count(source: str | Path, field: str | None = None, format: str | None = None) -> int | None:
    """Return about how many documents there are, at most, to show progress; None where that takes long to learn."""
    with find_shards(source, field, None, format) as found:
        return found.count()


def keys(source: str | Path, field: str | None = None, format: str | None = None) -> NDArray[np.uint8]:
    """Return the keys of a corpus's documents, ``[n, 32]``, in their order. Raises as ``read`` does."""
    return key_array([document_key(document.text) for document in read(source, field, format=format)])


def is_stream(source: str | Path) -> bool:
    """Return whether a corpus can be read only once: standard input, or a pipe."""
    with find_shards(source, None, None, None) as found:
        return any(shard.is_stream for shard in found.files)

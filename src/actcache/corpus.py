"""Corpora as files: which documents they hold, and under which keys."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from actcache.errors import DocumentError
from actcache.key import document_key, key_array

STANDARD_INPUT = Path("-")


def opened(source: Path) -> BinaryIO:
    """Open a file, or standard input for ``-``, to read bytes.

    Raises:
        DocumentError: it cannot be read.
    """
    try:
        return open(os.dup(0) if source == STANDARD_INPUT else source, "rb")
    except OSError as error:
        raise DocumentError(f"cannot read {source}: {error.strerror}") from None


def documents(file: BinaryIO, field: str | None) -> Iterator[str]:
    """Yield the documents of a file, one a line; blank lines and, in JSON lines, empty texts are none.

    A text is its line as it stands, spaces included, without the line's end and the file's byte order mark.

    Raises:
        DocumentError: a line is not UTF-8, not JSON, or has no text under ``field``.
    """
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DocumentError(
                f"line {number} is not UTF-8 ({error.reason}, byte {error.start} of it): convert the file with iconv"
            ) from None
        if not text.strip():
            continue
        if field is not None:
            try:
                value = json.loads(text)
                text = value[field]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DocumentError(f"line {number}: no JSON object with a field {field!r} ({error!r})") from None
            if not isinstance(text, str):
                raise DocumentError(f"line {number}: field {field!r} holds {type(text).__name__}, not a text")
        if text:
            yield text


def keys(source: Path, field: str | None) -> NDArray[np.uint8]:
    """Return the keys of a file's documents, ``[n, 32]``, in their order. Raises as ``opened`` and ``documents`` do."""
    with opened(source) as file:
        return key_array([document_key(text) for text in documents(file, field)])

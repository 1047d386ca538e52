"""Keys: the name of a document is a digest of its kind and content.

Format version 1. Each kind has its own domain, so that no text, pair, word list or id sequence shares a key with
another kind's, and every part is length-prefixed, so that ``("ab", "c")`` and ``("a", "bc")`` differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from actcache.errors import DocumentError, KeyFormatError

KEY_BYTES = 32

#: What a document can be: a text, a pair of texts (tuple), a list of words, or a sequence of token ids.
Document = str | tuple[str, str] | Sequence[str] | Sequence[int] | NDArray[np.integer]


#: A batch of keys: a list of ``bytes``, or a ``[n, 32]`` uint8 array.
Keys = Sequence[bytes] | NDArray[np.uint8]


def _digest(kind: str, parts: Iterable[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=KEY_BYTES, person=f"actcache/{kind}".encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DocumentError(
            f"the document holds a lone surrogate at character {error.start} and has no UTF-8 form; "
            "decode its source with errors='replace' or leave it out"
        ) from None


def document_key(document: Document) -> bytes:
    """Return the 32-byte BLAKE2b key of a document.

    Args:
        document: a text (``str``), a pair of texts (``tuple`` of two ``str``), words (``list`` of ``str``), or token
            ids
            (a sequence or array of integers in [0, 2**63)). Two documents with the same kind and content have the same
            key, whatever model reads them; text is taken as it is, without Unicode normalization.

    Raises:
        DocumentError: the document is empty, or of no such kind.
    """
    if isinstance(document, str):
        if not document:
            raise DocumentError("the document is an empty text; leave it out")
        return _digest("text", [_utf8(document)])
    if isinstance(document, tuple) and len(document) == 2 and all(isinstance(part, str) for part in document):
        if not any(document):
            raise DocumentError("both texts of the pair are empty; leave it out")
        return _digest("pair", [_utf8(str(part)) for part in document])
    if isinstance(document, bytes | bytearray | memoryview):
        raise DocumentError("the document is bytes; decode it to a text first")
    if not isinstance(document, Sequence | np.ndarray):
        raise DocumentError(
            f"a {type(document).__name__} is no document; give a text, two texts (tuple), a list of words or token ids"
        )
    if isinstance(document, np.ndarray) and document.ndim != 1:
        raise DocumentError(f"token ids are one-dimensional; this array is {list(document.shape)}")
    if len(document) == 0:
        raise DocumentError("the document is an empty sequence; leave it out")
    if all(isinstance(word, str) for word in document):
        return _digest("words", [_utf8(str(word)) for word in document])
    try:
        ids = np.asarray(document)
    except ValueError:
        ids = np.empty(0, object)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DocumentError("the document mixes kinds; give a text, two texts (tuple), a list of words or token ids")
    if ids.min() < 0 or ids.max() >= 2**63:
        raise DocumentError("token ids must lie in [0, 2**63)")
    return _digest("ids", [ids.astype("<i8").tobytes()])


def window_key(key: bytes, max_length: int, stride: int, number: int, last: bool) -> bytes:
    """Return the key of one window of a long document (see ``actcache.windows``)."""
    spec = np.array([max_length, stride, number, last], "<i8").tobytes()
    return _digest("window", [key, spec])


def key_array(keys: Keys) -> NDArray[np.uint8]:
    """Return keys as one ``[n, 32]`` uint8 array (an array of that shape is returned as it is).

    Raises:
        KeyFormatError: a key is not 32 bytes.
    """
    if isinstance(keys, np.ndarray):
        if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
            raise KeyFormatError(f"an array of keys is uint8 [n, {KEY_BYTES}], not {keys.dtype} {list(keys.shape)}")
        return np.ascontiguousarray(keys)
    if isinstance(keys, bytes | str):
        raise KeyFormatError("give a list of keys, not one key")
    keys = list(keys)  # an iterator would be used up by the check
    for key in keys:
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise KeyFormatError(f"{key!r:.80} is no key; make keys with actcache.document_key(document)")
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


def key_list(keys: NDArray[np.uint8]) -> list[bytes]:
    """Return an ``[n, 32]`` array as a list of ``bytes``."""
    data = keys.tobytes()
    return [data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES)]

"""Keys: the name of a document, or of a window of it, is a digest of its kind and content.

Format version 1. Each kind has its own domain, so that no text, pair, word list, id sequence, image or audio shares a
key with another kind's, and every part is length-prefixed, so that ``("ab", "c")`` and ``("a", "bc")`` differ.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, overload

import numpy as np
from numpy.typing import NDArray

from actcache.errors import DocumentError, KeyFormatError, ShapeError
from actcache.format.arguments import is_whole, to_numpy

KEY_BYTES = 32


class Array(Protocol):
    """An array or tensor of any library (the array API's exchange)."""

    def __dlpack__(self) -> Any: ...


class Medium(Protocol):
    """A document that is no text and knows its own key: an image or audio (``actcache.format.media``)."""

    what: str  # "an image"

    def key(self) -> bytes: ...


#: What a document can be: a text, a pair of texts (tuple), words (list or array of texts), token ids (sequence, array
#: or tensor of whole numbers), an image or audio.
Document = str | tuple[str, str] | Sequence[str] | Sequence[int] | NDArray[Any] | Array | Medium

#: The one type that each kind of document has: a text, a pair, words, token ids (int64).
NormalDocument = str | tuple[str, str] | list[str] | NDArray[np.int64]

_OUT_OF_RANGE = "token ids must lie in [0, 2**63)"
_KINDS = "give a text, two texts (tuple), a list of words or token ids"

#: A batch of keys: a list of ``bytes``, or a ``[n, 32]`` uint8 array.
Keys = Sequence[bytes] | NDArray[np.uint8]


def _digest(kind: str, parts: Iterable[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=KEY_BYTES, person=f"actcache/{kind}".encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def document_key(document: Document) -> bytes:
    """Return the 32-byte BLAKE2b key of a document, whatever model reads it.

    Args:
        document: a text (``str``, without Unicode normalization), a pair of texts (``tuple`` of two ``str``), words
            (``list`` or array of ``str``), token ids (a sequence, array or tensor of whole numbers in [0, 2**63)), an
            ``actcache.Image`` or an ``actcache.Audio``.

    Raises:
        DocumentError: the document is empty, or of no such kind; or it is an image or audio that cannot be read.
    """
    if is_medium(document):
        return document.key()
    normal = normal_form(document)
    if isinstance(normal, str):
        return _digest("text", [normal.encode()])
    if isinstance(normal, np.ndarray):
        return _digest("ids", [normal.astype("<i8", copy=False).tobytes()])
    return _digest("pair" if isinstance(normal, tuple) else "words", [part.encode() for part in normal])


def is_medium(document: object) -> TypeGuard[Medium]:
    """Return whether a document is an image or audio, of those that know their keys."""
    return isinstance(getattr(type(document), "what", None), str) and hasattr(document, "key")


def image_key(mode: str, width: int, height: int, pixels: bytes) -> bytes:
    """Return the key of a decoded image: Pillow's name of its mode (``"RGB"``), its size, and its rows of pixels from
    the top, each from the left, the bands of a pixel one after another."""
    return _digest("image", [mode.encode(), np.array([width, height], "<i8").tobytes(), pixels])


def audio_key(rate: int, samples: NDArray[np.float32]) -> bytes:
    """Return the key of decoded audio: samples a second, and the samples ``[n]``."""
    return _digest("audio", [np.array(rate, "<i8").tobytes(), samples.astype("<f4", copy=False).tobytes()])


def image_file_key(content: bytes) -> bytes:
    """Return the key of an image by the bytes of its file."""
    return _digest("imgfile", [content])


def audio_file_key(content: bytes) -> bytes:
    """Return the key of audio by the bytes of its file."""
    return _digest("audfile", [content])


def normal_form(document: Any) -> NormalDocument:
    """Return a document as the one type that its kind has: ``str``, ``tuple``, ``list`` or an int64 array. Raises as
    ``document_key``."""
    if is_medium(document):
        raise DocumentError(f"the document is {document.what}, which has no text form: a model of texts reads texts")
    if hasattr(document, "as_py"):  # a value of an Arrow column
        document = document.as_py()
    if isinstance(document, str):
        if not document:
            raise DocumentError("the document is an empty text; leave it out")
        return _text(document)
    if isinstance(document, bytes | bytearray | memoryview):
        raise DocumentError("the document is bytes; decode it to a text first")
    if isinstance(document, Sequence):
        return _of_sequence(document)
    if isinstance(document, np.ndarray) or hasattr(document, "__dlpack__"):  # so have tensors and others' arrays
        return _of_array(document)
    raise DocumentError(_no_document(document))


def _of_sequence(document: Sequence[Any]) -> NormalDocument:
    if len(document) == 0:
        raise DocumentError("the document is an empty sequence; leave it out")
    types = set(map(type, document))
    if all(issubclass(one, str) for one in types):
        if not isinstance(document, tuple):
            return [_text(word) for word in document]
        if len(document) != 2:
            raise DocumentError(
                f"a tuple of texts is a pair, and this one has {len(document)}: give words as a list, and more than "
                "two texts as documents of their own"
            )
        if not any(document):
            raise DocumentError("both texts of the pair are empty; leave it out")
        return _text(document[0]), _text(document[1])
    numbers: NDArray[Any] = np.empty(0, object)
    if types.isdisjoint((bool, np.bool_)):  # among numbers NumPy would make numbers of them
        with contextlib.suppress(ValueError, TypeError, RuntimeError):  # nested lists of unequal lengths, tensors, ...
            numbers = np.asarray(document)
    if numbers.ndim == 1 and numbers.dtype.kind in "iu":
        return _ids(numbers)
    if types == {int}:
        raise DocumentError(_OUT_OF_RANGE)
    names = ", ".join(sorted(one.__name__ for one in types))
    raise DocumentError(f"the document mixes kinds: it holds values of {names}; {_KINDS}")


def _of_array(document: Any) -> NormalDocument:
    try:
        array = to_numpy(document)
    except ShapeError as error:
        raise DocumentError(f"the document cannot be read: {error}") from None
    if array.ndim == 1 and array.dtype.kind in "UOT" and all(isinstance(word, str) for word in array.tolist()):
        return _of_sequence(array.tolist())
    return _ids(array)


def _ids(array: NDArray[Any]) -> NDArray[np.int64]:
    if array.ndim != 1:
        raise DocumentError(f"token ids are one-dimensional, and this document is {list(array.shape)}: {_KINDS}")
    if array.size == 0:
        raise DocumentError("the document is an empty array; leave it out")
    if array.dtype.kind not in "iu":
        raise DocumentError(f"token ids are whole numbers, and this document holds {array.dtype}: {_KINDS}")
    if array.min() < 0 or array.max() >= 2**63:
        raise DocumentError(_OUT_OF_RANGE)
    return array.astype(np.int64)


def _text(text: str) -> str:
    """Return a text as Python's own ``str``, which a subclass may print in another way."""
    text = str.__str__(text)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DocumentError(
            f"the document holds a lone surrogate at character {error.start} and has no UTF-8 form; "
            "decode its source with errors='replace' or leave it out"
        ) from None
    return text


def _no_document(value: object) -> str:
    """Say what is wrong with a value of another type than documents have."""
    name = type(value).__name__
    if value is None or name in ("NAType", "NaTType") or (isinstance(value, float | np.floating) and value != value):
        return f"a missing value ({value!r}) is no document; leave it out"
    if isinstance(value, Mapping):
        return f"a {name} is no document; give one of its values ({', '.join(map(repr, value))})"
    if isinstance(value, os.PathLike):
        return f"a path ({value}) is no document; read the file and give its text"
    if is_whole(value):
        return f"one token id ({value}) is no document; give a document's ids as one list"
    return f"a {name} is no document; {_KINDS}"


def key_array(keys: Keys) -> NDArray[np.uint8]:
    """Return keys as one ``[n, 32]`` uint8 array (such an array as it is); ``KeyFormatError`` where one is not 32
    bytes."""
    if isinstance(keys, np.ndarray):
        if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
            raise KeyFormatError(f"an array of keys is uint8 [n, {KEY_BYTES}], not {keys.dtype} {list(keys.shape)}")
        return np.ascontiguousarray(keys)
    if isinstance(keys, bytes | str):
        raise KeyFormatError("give a list of keys, not one key")
    given, keys = keys, list(keys)  # an iterator would be used up by the check
    if not keys and isinstance(given, Iterator):
        raise KeyFormatError("the iterator gave no keys: it was used up before, or had none; give a list of keys")
    for key in keys:
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise KeyFormatError(f"{key!r:.80} is no key; make keys with actcache.document_key(document)")
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


_OPAQUE = np.dtype((np.void, KEY_BYTES))  # of which NumPy makes bytes objects, without a step of Python's


def key_list(keys: NDArray[np.uint8]) -> list[bytes]:
    """Return an ``[n, 32]`` array as a list of ``bytes``."""
    opaque: NDArray[Any] = np.ascontiguousarray(keys).view(_OPAQUE)
    listed: list[bytes] = opaque.reshape(-1).tolist()
    return listed


def first_of_their_like(keys: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the positions in ``[n, 32]`` keys of those that no equal one stands before, ascending."""
    _, first = np.unique(np.ascontiguousarray(keys).view(_OPAQUE).reshape(-1), return_index=True)
    return np.sort(first)


def split_keys(keys: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Return the first 8 bytes of ``[n, 32]`` keys as numbers that sort as the bytes do, ``[n]``, and the rest."""
    keys = np.ascontiguousarray(keys)
    return keys[:, :8].copy().view(">u8").reshape(-1).astype(np.uint64), keys[:, 8:]


def join_keys(prefix: NDArray[np.uint64], rest: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return ``[n, 32]`` keys; the inverse of ``split_keys``."""
    return np.concatenate([prefix.astype(">u8").view(np.uint8).reshape(-1, 8), rest], axis=1)


def key_order(keys: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the positions of ``[n, 32]`` keys in the order of their bytes, ``[n]``."""
    return np.lexsort(np.ascontiguousarray(keys).view(">u8").T[::-1])


@dataclass(frozen=True)
class Windows:
    """How long documents are cut: windows of ``max_length`` tokens that overlap by ``stride``, an entry each.

    A window's key is made from the document's key, these two, the window's number, and whether it is the last. So a
    document's windows are countable without its tokens, and one whose last window is missing is a miss rather than a
    shorter document.

    Args:
        max_length: tokens of a window, special tokens included.
        stride: content tokens that a window shares with the one before it (the tokenizers' ``stride``).

    Raises:
        DocumentError: these are no whole numbers, or a window would not move forward.
    """

    max_length: int
    stride: int = 0

    def __post_init__(self) -> None:
        for name in ("max_length", "stride"):
            value = getattr(self, name)
            if not is_whole(value):
                raise DocumentError(f"{name} of windows is a whole number of tokens, not {value!r:.80}")
            object.__setattr__(self, name, int(value))
        if self.max_length < 1 or not 0 <= self.stride < self.max_length:
            raise DocumentError(f"windows of {self.max_length} tokens cannot overlap by {self.stride}")

    def keys(self, document: bytes, count: int) -> list[bytes]:
        """Return the keys of the ``count`` windows of the document with that key, in order."""
        return [self.key(document, number, last=number == count - 1) for number in range(count)]

    def key(self, document: bytes, number: int, *, last: bool) -> bytes:
        """Return the key of one window, numbered from 0."""
        spec = np.array([self.max_length, self.stride, number, last], "<i8").tobytes()
        return _digest("window", [document, spec])


@dataclass(frozen=True)
class ModelWindows:
    """``Windows`` as long as a model allows, which only the model says: ``of`` makes them.

    Args:
        stride: content tokens that a window shares with the one before it.

    Raises:
        DocumentError: this is no whole number, or less than 0.
    """

    stride: int = 0

    def __post_init__(self) -> None:
        if not is_whole(self.stride) or self.stride < 0:
            raise DocumentError(f"stride of windows is a whole number of tokens, not {self.stride!r:.80}")

    def of(self, max_length: int) -> Windows:
        """Return the windows of that many tokens."""
        return Windows(max_length, self.stride)


@overload
def windows(max_length: int, stride: int = 0) -> Windows: ...
@overload
def windows(max_length: None = None, stride: int = 0) -> ModelWindows: ...
def windows(max_length: int | None = None, stride: int = 0) -> Windows | ModelWindows:
    """Return the spec by which documents longer than ``max_length`` tokens are cut into overlapping entries; without
    that number, than what the model takes."""
    return ModelWindows(stride) if max_length is None else Windows(max_length, stride)

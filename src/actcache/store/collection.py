"""Collections: named, ordered lists of keys, so that a corpus can be walked without its texts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.errors import FormatError, ShapeError, UsageError
from actcache.format import safetensors
from actcache.format.arguments import whole_numbers
from actcache.format.keys import KEY_BYTES, first_of_their_like, key_array
from actcache.format.ragged import offsets_of

_VERSION = "1"


def _checksum(arrays: Mapping[str, NDArray[np.generic]]) -> str:
    """Return the XXH3-64 of the arrays, each by its name and its bytes, in the order of their names."""
    digest = xxhash.xxh3_64()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Collection:
    """A corpus: ``keys`` [n, 32] uint8 in its order, and the caller's own id of each document, or None.

    Where documents are lists of passages, the keys are theirs, document by document: ``documents`` [n] int64 is the
    position of the document that each is of, and ``own`` [n, 2] int32 where a passage's own tokens begin and end among
    those of its entry, the others being special tokens and context. None where documents are whole.
    """

    keys: NDArray[np.uint8]
    ids: list[str] | None = None
    documents: NDArray[np.int64] | None = None
    own: NDArray[np.int32] | None = None

    @classmethod
    def of(
        cls,
        keys: Sequence[bytes] | NDArray[np.uint8],
        ids: Sequence[str] | None = None,
        documents: Any = None,
        own: Any = None,
    ) -> Collection:
        """Make a collection.

        Raises:
            KeyFormatError, ShapeError: a key is none; there are more or fewer ids than keys, or documents, or pairs.
            UsageError: an id has no UTF-8 form; documents are no positions in ascending order, ``own`` no pairs.
        """
        if ids is not None and len(ids) != len(keys):
            raise ShapeError(f"{len(keys)} keys and {len(ids)} ids: give one a key")
        texts = None if ids is None else [str(name) for name in ids]
        for text in texts or []:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UsageError(f"the id {text!r:.80} holds a lone surrogate and has no UTF-8 form") from None
        known = key_array(keys)
        positions = None if documents is None else whole_numbers("documents", documents)
        pairs = None if own is None else np.asarray(own)
        if positions is not None and positions.shape != (len(known),):
            raise ShapeError(f"{len(known)} keys and documents of shape {list(positions.shape)}: give each a position")
        if pairs is not None and pairs.shape != (len(known), 2):
            raise ShapeError(
                f"{len(known)} keys and own of shape {list(pairs.shape)}: give each where its own begin, end"
            )
        whole = pairs is None or pairs.dtype.kind in "iu"
        if wrong := _wrong(positions, pairs) if whole else f"own are whole numbers, not {own!r:.80}":
            raise UsageError(wrong)
        return cls(known, texts, positions, None if pairs is None else pairs.astype(np.int32))

    @property
    def document_count(self) -> int:
        """How many documents there are: as many as keys, where documents are whole."""
        if self.documents is None:
            return len(self.keys)
        return 1 + int(self.documents[-1]) if len(self.documents) else 0

    @property
    def first(self) -> NDArray[np.int64]:
        """The positions of the keys that stand first of their like, ascending."""
        return first_of_their_like(self.keys)

    def __len__(self) -> int:
        return len(self.keys)

    def to_bytes(self) -> bytes:
        """Return the collection as a safetensors file (docs/format.md)."""
        arrays: dict[str, NDArray[np.generic]] = {"keys": self.keys}
        if self.ids is not None:
            texts = [name.encode() for name in self.ids]
            arrays["ids"] = np.frombuffer(b"".join(texts), np.uint8)
            arrays["id_offsets"] = offsets_of(np.array([len(text) for text in texts], np.int64))
        if self.documents is not None:
            arrays["documents"] = self.documents
        if self.own is not None:
            arrays["own"] = self.own
        return safetensors.dumps(arrays, {"actcache_collection": _VERSION, "checksum": _checksum(arrays)})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Collection:
        """Rebuild a collection; ``FormatError``, naming ``where``, where the data are none of this format version."""
        metadata, arrays = safetensors.loads(data, where)
        keys = arrays.get("keys")
        if metadata.get("actcache_collection") != _VERSION or keys is None or keys.dtype != np.uint8:
            raise FormatError(f"{where} is no collection of format version {_VERSION}")
        if keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
            raise FormatError(f"{where} holds keys of another length")
        if metadata.get("checksum") != _checksum(arrays):
            raise FormatError(f"{where} is damaged: it fails its checksum; store it again")
        more = _of_passages(arrays, len(keys), where)
        if "ids" not in arrays:
            return cls(keys.astype(np.uint8), None, *more)
        offsets, text = arrays.get("id_offsets", np.empty(0, np.int64)).tolist(), arrays["ids"].tobytes()
        if len(offsets) != len(keys) + 1 or offsets[0] != 0 or offsets[-1] != len(text) or sorted(offsets) != offsets:
            raise FormatError(f"{where} holds ids that do not fit its keys")
        try:
            ids = [text[begin:end].decode() for begin, end in itertools.pairwise(offsets)]
        except UnicodeDecodeError as error:
            raise FormatError(f"{where} holds an id that is no UTF-8: {error}") from None
        return cls(keys.astype(np.uint8), ids, *more)


def _of_passages(
    arrays: Mapping[str, NDArray[Any]], count: int, where: str
) -> tuple[NDArray[np.int64] | None, NDArray[np.int32] | None]:
    """Return what a file says of passages."""
    documents, own = arrays.get("documents"), arrays.get("own")
    if documents is not None and (documents.dtype != np.int64 or documents.shape != (count,)):
        raise FormatError(f"{where} holds documents that do not fit its keys")
    if own is not None and (own.dtype != np.int32 or own.shape != (count, 2)):
        raise FormatError(f"{where} holds tokens of passages that do not fit its keys")
    if wrong := _wrong(documents, own):
        raise FormatError(f"{where}: {wrong}")
    return documents, own


def _wrong(documents: NDArray[Any] | None, own: NDArray[Any] | None) -> str | None:
    if documents is not None and len(documents) and (documents[0] < 0 or (np.diff(documents) < 0).any()):
        return "documents are positions from 0 on, in ascending order, those of one document's passages alike"
    if own is not None and ((own[:, 0] < 0) | (own[:, 0] >= own[:, 1]) | (own[:, 1] >= 1 << 31)).any():
        return "own are pairs of positions, where a passage's own tokens begin and end, none of them empty"
    return None

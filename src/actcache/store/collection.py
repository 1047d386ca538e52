"""Collections: named, ordered lists of keys, so that a corpus can be walked without its texts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.errors import FormatError, ShapeError, UsageError
from actcache.format import safetensors
from actcache.format.keys import KEY_BYTES, key_array
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
    """A corpus: ``keys`` [n, 32] uint8 in its order, and the caller's own id of each document, or None."""

    keys: NDArray[np.uint8]
    ids: list[str] | None = None

    @classmethod
    def of(cls, keys: Sequence[bytes] | NDArray[np.uint8], ids: Sequence[str] | None = None) -> Collection:
        """Make a collection.

        Raises:
            KeyFormatError, ShapeError: a key is none; there are more or fewer ids than keys.
            UsageError: an id has no UTF-8 form.
        """
        if ids is not None and len(ids) != len(keys):
            raise ShapeError(f"{len(keys)} keys and {len(ids)} ids: give one a key")
        texts = None if ids is None else [str(name) for name in ids]
        for text in texts or []:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UsageError(f"the id {text!r:.80} holds a lone surrogate and has no UTF-8 form") from None
        return cls(key_array(keys), texts)

    def __len__(self) -> int:
        return len(self.keys)

    def to_bytes(self) -> bytes:
        """Return the collection as a safetensors file (docs/format.md)."""
        arrays: dict[str, NDArray[np.generic]] = {"keys": self.keys}
        if self.ids is not None:
            texts = [name.encode() for name in self.ids]
            arrays["ids"] = np.frombuffer(b"".join(texts), np.uint8)
            arrays["id_offsets"] = offsets_of(np.array([len(text) for text in texts], np.int64))
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
        if "ids" not in arrays:
            return cls(keys.astype(np.uint8))
        offsets, text = arrays.get("id_offsets", np.empty(0, np.int64)).tolist(), arrays["ids"].tobytes()
        if len(offsets) != len(keys) + 1 or offsets[0] != 0 or offsets[-1] != len(text) or sorted(offsets) != offsets:
            raise FormatError(f"{where} holds ids that do not fit its keys")
        try:
            ids = [text[begin:end].decode() for begin, end in itertools.pairwise(offsets)]
        except UnicodeDecodeError as error:
            raise FormatError(f"{where} holds an id that is no UTF-8: {error}") from None
        return cls(keys.astype(np.uint8), ids)

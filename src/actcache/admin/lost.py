"""Entries that were lost, and what they are to be computed from: only from what is certain to be the document.

Certain, and tokenized as it was then, are: a text whose key is the entry's; token ids that another space of the store
holds for that key, with their checksums, by the same tokenizer and settings; and the lost entry's own token ids where
they prove themselves, because they, or the text that they decode to, have its key. The checksum of a corrupt entry
proves nothing of its ids: it is over ids and rows together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.admin.inspection import open_space
from actcache.entries.entry import Entry
from actcache.errors import DataError, FormatError
from actcache.format import safetensors
from actcache.format.columns import Schema
from actcache.format.keys import Document, Keys, document_key, key_array, key_list
from actcache.format.ragged import EXTRAS, OWN, TOKEN_IDS, check_offsets
from actcache.format.recipe import Recipe
from actcache.models.documents import check_texts, chunked, document_keys
from actcache.models.processing import Made, MediaEncoder
from actcache.models.tokenizing import DocumentEncoder, Encoded
from actcache.models.verification import intact_entries
from actcache.segments.quarantine import COLUMNS_DAMAGED, COLUMNS_INTACT, NO_COLUMNS
from actcache.store.document_entries import entry_keys, find_entries
from actcache.store.space import Space
from actcache.store.store import Store

_CHUNK = 2048  # documents that are looked at at a time
_ENTRIES = 64  # entries of another space that are read at a time

_TOKENIZING = ("tokenizer", "special_tokens", "max_length", "too_long")


@dataclass(frozen=True)
class Lost:
    """What is known of an entry besides its key."""

    extras: frozenset[str]  # of spans, word_ids, type_ids, what it had
    token_ids: NDArray[np.int32] | None  # as they were found: nobody vouches for them
    has_own: bool = False  # whether it had columns of the caller's own
    own: Mapping[str, NDArray[Any]] | None = None  # which, ``[tokens, ...]`` each, where their checksum is right


def lost_now(space: Space, corrupt: Sequence[bytes]) -> dict[bytes, Lost]:
    """Return what lies of corrupt entries that are still in place, by key."""
    if not corrupt:
        return {}
    had = {name: space.has(name, corrupt) for name in EXTRAS}
    extras = [frozenset(name for name, there in had.items() if there[i]) for i in range(len(corrupt))]
    has_own = space.has(OWN, corrupt).tolist()
    own = [_own(space, key) if has else None for key, has in zip(corrupt, has_own, strict=True)]
    return dict(zip(corrupt, map(Lost, extras, space.salvaged_ids(corrupt), has_own, own), strict=True))


def _own(space: Space, key: bytes) -> Mapping[str, NDArray[Any]] | None:
    """Return the caller's own columns of an entry, which have a checksum of their own; None where they are damaged."""
    try:
        return space.read_columns([key]).arrays
    except DataError:
        return None


def lost_before(store: Store, space: Space) -> dict[bytes, Lost]:
    """Return what the space's quarantine (docs/format.md) says of entries that are not in the space, by key.

    What is no quarantine of entries (a segment that could not be read) is passed over.
    """
    lost: dict[bytes, Lost] = {}
    for name in store.driver.blobs(f"spaces/{space.recipe.fingerprint}/quarantine"):
        data = store.driver.read_blob(name) if name.endswith(".safetensors") else None
        if data is not None:
            try:
                lost |= _kept(data, name, space.schema)
            except FormatError:
                continue
    keys = list(lost)
    there = space.contains(keys).tolist() if keys else []
    return {key: lost[key] for key, is_there in zip(keys, there, strict=True) if not is_there}


def _kept(data: bytes, where: str, schema: Schema | None) -> dict[bytes, Lost]:
    metadata, arrays = safetensors.loads(data, where)
    keys, offsets, ids = arrays.get("keys"), arrays.get("offsets"), arrays.get(TOKEN_IDS)
    if metadata.get("actcache_quarantine") != "1" or keys is None or offsets is None:
        raise FormatError(f"{where} holds no quarantined entries")
    if keys.dtype != np.uint8 or keys.shape[1:] != (32,) or offsets.dtype != np.int64 or offsets.ndim != 1:
        raise FormatError(f"{where} holds keys or offsets of another form")
    if ids is not None:
        if ids.dtype != np.int32 or ids.ndim != 1:
            raise FormatError(f"{where} holds token ids of another form")
        check_offsets(offsets.astype(np.int64), len(keys), len(ids), where)
    extras = frozenset(name for name in EXTRAS if name in arrays)
    found = [None] * len(keys) if ids is None else np.split(np.array(ids, np.int32), offsets[1:-1].tolist())
    has_own, own = _kept_columns(arrays, offsets.astype(np.int64), where, schema)
    names = key_list(keys.astype(np.uint8))
    return dict(zip(names, map(Lost, [extras] * len(names), found, has_own, own), strict=True))


def _kept_columns(
    arrays: Mapping[str, NDArray[Any]], offsets: NDArray[np.int64], where: str, schema: Schema | None
) -> tuple[list[bool], list[Mapping[str, NDArray[Any]] | None]]:
    """Return which entries in quarantine had columns of the caller's own, and those that are as they were put."""
    count, records = len(offsets) - 1, arrays.get(OWN)
    if records is None:
        return [False] * count, [None] * count
    state = arrays.get("columns_state", np.full(count, COLUMNS_DAMAGED, np.uint8))
    if state.shape != (count,) or records.dtype != np.uint8 or records.ndim != 2:
        raise FormatError(f"{where} holds columns of another form")
    check_offsets(offsets, count, len(records), where)
    own: list[Mapping[str, NDArray[Any]] | None] = [None] * count
    for i in np.flatnonzero(state == COLUMNS_INTACT).tolist():
        if schema is not None and records.shape[1] == schema.width:
            own[i] = schema.unpack(np.array(records[offsets[i] : offsets[i + 1]]))
    return (state != NO_COLUMNS).tolist(), own


def of_documents(
    space: Space, encoder: DocumentEncoder, documents: Iterable[Document], lost: Mapping[bytes, Lost]
) -> dict[bytes, Encoded]:
    """Return, by key, what the documents make of those entries that are theirs. The documents are streamed."""
    check_texts(documents)
    found: dict[bytes, Encoded] = {}
    wanted = _Whole(space, lost)
    for first, chunk in chunked(documents, _CHUNK):
        keys = document_keys(chunk, first)
        theirs = find_entries(wanted, keys, encoder.windows)
        which = [i for i, entries in enumerate(theirs) if any(key in lost and key not in found for key in entries)]
        encoded = encoder.encode([chunk[i] for i in which], [first + i for i in which])
        for i, windows in zip(which, encoded, strict=True):
            pairs = zip(entry_keys(keys[i], len(windows), encoder.windows), windows, strict=True)
            found |= {key: window for key, window in pairs if key in lost}
    return found


def of_media(encoder: MediaEncoder, documents: Iterable[Any], lost: Mapping[bytes, Lost]) -> dict[bytes, Made]:
    """Return, by key, the features of images or audio that are lost. The documents are streamed."""
    found: dict[bytes, Made] = {}
    for first, chunk in chunked(documents, encoder.chunk):
        keys = encoder.keys(chunk, first)
        which = [i for i, key in enumerate(keys) if key in lost and key not in found]
        encoded = encoder.encode([chunk[i] for i in which], [first + i for i in which])
        found.update({keys[i]: entries[0] for i, entries in zip(which, encoded, strict=True)})
    return found


def of_other_spaces(
    store: Store, recipe: Recipe, encoder: DocumentEncoder, lost: Mapping[bytes, Lost]
) -> dict[bytes, Encoded]:
    """Return, by key, what other spaces of the store hold for these keys, where the same tokenizer made their ids."""
    found: dict[bytes, Encoded] = {}
    typed = _Typed(encoder)
    for fingerprint in store.fingerprints():
        left = [key for key in lost if key not in found]
        try:
            other = store.recipe(fingerprint)
            if not left or other is None or other == recipe or other.tokenizer is None:
                continue
            if any(getattr(other, name) != getattr(recipe, name) for name in _TOKENIZING):
                continue
            with open_space(store, fingerprint) as space:
                keys = key_array(left)
                there = key_list(keys[space.contains(keys)])
                for start in range(0, len(there), _ENTRIES):
                    for key, entry in intact_entries(space, there[start : start + _ENTRIES], []).items():
                        encoded = typed.of(entry)
                        if encoded is not None and lost[key].extras <= {*entry.extras, "type_ids"}:
                            found[key] = encoded
        except DataError:  # another space's damage is not this one's
            continue
    return found


def proven(encoder: DocumentEncoder, lost: Mapping[bytes, Lost]) -> Iterator[Document]:
    """Yield the documents of which lost entries' own token ids prove that they are the document."""
    for key, one in lost.items():
        readings = () if one.token_ids is None else _readings(encoder, one.token_ids)
        for document in readings:
            if entry_keys(document_key(document), 1, encoder.windows) == [key]:
                yield document
                break


def _readings(encoder: DocumentEncoder, ids: NDArray[np.int32]) -> Iterator[Document]:
    if ids.min() < 0 or ids.max() >= encoder.vocabulary:
        return
    yield ids
    decode = encoder.tokenizer.decode
    text = str(decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    # Some tokenizers begin every text with a space.
    yield from (one for one in (text, text.removeprefix(" ")) if one)


class _Typed:
    """Tells the type ids of entries that were stored without them: zeros, where they cannot be of two texts."""

    def __init__(self, encoder: DocumentEncoder) -> None:
        special, vocabulary = encoder.special_tokens, encoder.vocabulary
        unlimited = DocumentEncoder(encoder.tokenizer, special_tokens=special, vocabulary=vocabulary)
        (one,), (two,) = unlimited.encode(["a", ("a", "b")])
        self._separator = encoder.tokenizer.sep_token_id
        self._untyped = not (one.type_ids.any() or two.type_ids.any())
        alone, both = self._separators(one.token_ids), self._separators(two.token_ids)
        self._alone = alone if alone < both and not one.type_ids.any() else None

    def of(self, entry: Entry) -> Encoded | None:
        """Return what an entry was made of; None where it could be one text or two."""
        ids, types = np.asarray(entry.token_ids, np.int32), entry.extras.get("type_ids")
        if types is None:
            if not self._untyped and self._separators(ids) != self._alone:
                return None
            types = np.zeros(len(ids), np.int8)
        return Encoded(ids, types, entry.extras.get("spans"), entry.extras.get("word_ids"))

    def _separators(self, ids: NDArray[np.int32]) -> int:
        return 0 if self._separator is None else int((ids == self._separator).sum())


class _Whole:
    """The entries that a space had before some were lost."""

    def __init__(self, space: Space, lost: Mapping[bytes, Lost]) -> None:
        self._space, self._lost = space, lost

    def contains(self, keys: Keys) -> NDArray[np.bool_]:
        names = key_array(keys)
        lost = np.array([key in self._lost for key in key_list(names)], bool)
        there: NDArray[np.bool_] = self._space.contains(names) | lost
        return there

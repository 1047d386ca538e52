"""One document: its entries in the spaces of a store, by its text or by its key."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from actcache.admin.display import attributes_as_json, fields_as_json
from actcache.admin.inspection import each_space, select_spaces
from actcache.admin.report.spaces import stem_of
from actcache.admin.report.statistics import Numbers, Statistics
from actcache.backend import VALUES, StoredFile
from actcache.entries.read import read_intact
from actcache.errors import MissingEntryError, UsageError
from actcache.format.keys import KEY_BYTES, Windows, document_key, key_list
from actcache.format.recipe import Recipe
from actcache.store.document_entries import stored_windows
from actcache.store.footprint import segments_in
from actcache.store.space import Space
from actcache.store.store import Store

_HEX = re.compile(rf"[0-9a-f]{{1,{2 * KEY_BYTES}}}")
_NAMED = 5  # of several keys that a prefix fits
_MOST_STRIDES = 1 << 16  # that are tried


@dataclass(frozen=True)
class Window:
    """Which part of its document an entry is."""

    number: int  # from 0
    last: bool
    max_length: int
    stride: int


@dataclass(frozen=True)
class EntryReport:
    """One entry of a document. Statistics, token ids and optional arrays are None where it is corrupt."""

    recipe: Recipe
    key: bytes
    window: Window | None
    tokens: int
    nbytes: int  # of its arrays, as stored
    segment: str | None  # the file or folder where it lies; None where the backend has no segments
    checksum: int
    intact: bool
    statistics: Statistics | None = None
    token_ids: list[int] | None = None
    extras: dict[str, list[Any]] | None = None  # spans, word_ids, type_ids, the caller's own: those that were stored

    def to_json(self) -> dict[str, Any]:
        return {
            "space": self.recipe.fingerprint,
            **attributes_as_json(self.recipe, "model", "layer", "site"),
            **attributes_as_json(self, "key", "window", "tokens"),
            **attributes_as_json(self.recipe, "hidden_size", "dtype", "stored_as"),
            **attributes_as_json(self, "nbytes", "segment"),
            "checksum": f"{self.checksum:016x}",
            **attributes_as_json(self, "intact", "statistics", "token_ids", "extras"),
        }


@dataclass(frozen=True)
class DocumentReport:
    """A document's entries, space by space, windows in their order; and the spaces that could not be looked into."""

    key: bytes
    entries: list[EntryReport]
    unreadable: dict[str, str]

    @property
    def intact(self) -> bool:
        return all(entry.intact for entry in self.entries)

    def to_json(self) -> dict[str, Any]:
        return fields_as_json(self, "intact")


def document_by_text(store: Store, text: str, spaces: Sequence[str] = ()) -> DocumentReport:
    """Look at the document with this text; raises as ``document_by_key``, or ``DocumentError`` where it has no key."""
    return _document(store, document_key(text), spaces, f"the text {text!r:.60}")


def document_by_key(store: Store, digits: str, spaces: Sequence[str] = ()) -> DocumentReport:
    """Look at the document, or the window of one, with this key.

    Args:
        digits: its key in hexadecimal; or how that begins, where it fits one key of the spaces. A document that was cut
            into windows is found by all digits of its own key, or by a window's.
        spaces: prefixes of the fingerprints.

    Raises:
        UsageError: these are no digits of a key, or several keys begin so.
        MissingEntryError: no space has such an entry.
    """
    digits = digits.lower()
    if not _HEX.fullmatch(digits):
        raise UsageError(f"{digits!r:.80} is no key: a key is {2 * KEY_BYTES} hexadecimal digits, or how they begin")
    if len(digits) == 2 * KEY_BYTES:
        return _document(store, bytes.fromhex(digits), spaces, f"key {digits}")
    keys, unreadable = each_space(store, spaces, lambda space: _beginning(space, digits))
    found = set(itertools.chain.from_iterable(keys.values()))
    if len(found) > 1:
        some = ", ".join(key.hex()[: len(digits) + 8] for key in sorted(found)[:_NAMED])
        more = ", ..." if len(found) > _NAMED else ""
        raise UsageError(f"{len(found)} keys begin with {digits}: {some}{more}; give more digits")
    if not found:
        raise _missing(store, f"a key that begins with {digits}", spaces, unreadable)
    return _document(store, found.pop(), spaces, f"key {digits}")


def _beginning(space: Space, digits: str) -> list[bytes]:
    """Return the keys of a space that begin with hexadecimal digits, fewer than a key has."""
    keys = space.key_array()
    low, high = (bytes.fromhex(digits.ljust(2 * KEY_BYTES, end)) for end in "0f")
    fitting = np.ones(len(keys), bool)
    for column in range((len(digits) + 1) // 2):  # of the last one, its upper half may be all that is given
        fitting &= (keys[:, column] >= low[column]) & (keys[:, column] <= high[column])
    return key_list(keys[fitting])


def _document(store: Store, key: bytes, spaces: Sequence[str], what: str) -> DocumentReport:
    files = store.driver.listing()

    def look(space: Space) -> list[EntryReport]:
        found: list[tuple[bytes, Window | None]] = [(key, None)] if key in space else []
        if space.recipe.too_long == "windows" and space.recipe.max_length:
            found += _windows(space, key, space.recipe.max_length)
        return [_entry(space, files, *one) for one in found]

    by_space, unreadable = each_space(store, spaces, look)
    entries = list(itertools.chain.from_iterable(by_space.values()))
    if not entries:
        raise _missing(store, what, spaces, unreadable)
    return DocumentReport(key, entries, unreadable)


def _missing(store: Store, what: str, spaces: Sequence[str], unreadable: dict[str, str]) -> MissingEntryError:
    looked = [name for name in select_spaces(store, spaces) if name not in unreadable]
    message = f"{store.url} has no entry for {what}: looked into {len(looked)} space{'' if len(looked) == 1 else 's'}"
    if any(recipe is not None and recipe.too_long == "passages" for recipe in map(store.recipe, looked)):
        message += (
            "; documents that are cut into passages have no key of their own here, recycler.passages tells theirs"
        )
    if unreadable:
        message += f"; {len(unreadable)} cannot be read ({', '.join(sorted(unreadable))}): see cachectl verify"
    return MissingEntryError(message)


def _windows(space: Space, document: bytes, max_length: int) -> Iterator[tuple[bytes, Window]]:
    """Yield the windows of a document that a space has, with any stride: recipes do not name it."""
    specs = [Windows(max_length, stride) for stride in range(min(max_length, _MOST_STRIDES))]
    first = [spec.key(document, 0, last=last) for spec in specs for last in (True, False)]
    has = space.contains(first).reshape(-1, 2).any(axis=1)
    for spec in (specs[i] for i in np.flatnonzero(has).tolist()):
        for window in stored_windows(space, [document], spec):
            yield window.key, Window(window.number, window.last, spec.max_length, spec.stride)
            if window.last:
                break


def _entry(space: Space, files: dict[str, StoredFile], key: bytes, window: Window | None) -> EntryReport:
    names, which = space.whereabouts([key])
    listed = {stem_of(name): name for name in segments_in(files, space.recipe.fingerprint)}
    stem = names[int(which[0])] if which[0] >= 0 else None
    tokens, checksum, _ = space.stored_checksums([key])[0].tolist()
    columns = space.ragged
    more = [columns[name] for name in columns if name != VALUES and space.has(name, [key])[0]]
    row_bytes = space.recipe.row_bytes + sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in more)
    where = None if stem is None else listed.get(stem, stem)
    report = EntryReport(space.recipe, key, window, tokens, tokens * row_bytes, where, checksum, intact=False)
    found, _, _ = read_intact(space.get, [key])
    entry, numbers = next(iter(found), None), Numbers()
    if entry is None:
        return report
    numbers.add(entry.activations)
    return replace(
        report,
        intact=True,
        statistics=numbers.statistics(),
        token_ids=None if entry.token_ids is None else entry.token_ids.tolist(),
        extras={name: rows.tolist() for name, rows in (entry.extras | entry.columns).items()},
    )

"""Filling: documents are looked up, tokenized, sorted by length, computed in batches, and put."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from actcache.errors import NonFiniteError
from actcache.key import Document
from actcache.models.entries import document_keys, entry_keys, find_entries
from actcache.models.progress import FillProgress
from actcache.models.record import LowerHalf, plan_batches
from actcache.models.tokenizing import DocumentEncoder, Encoded
from actcache.space import Space

TOKEN_BUDGET = 8192  # padded tokens of a batch
_CHUNK = 2048  # documents that are looked up, tokenized and sorted by length at a time
_GROUP = 8  # batches whose rows are held before they are put


@dataclass(frozen=True)
class FillReport:
    """What a fill did."""

    documents: int  # given
    present: int  # of those, stored before or given twice
    computed: int  # of those, computed and stored by this fill
    tokens: int  # computed
    seconds: float


@dataclass(frozen=True)
class _Work:
    """A document that is to be computed."""

    position: int  # in the texts
    keys: list[bytes]  # of its entries
    entries: list[Encoded]

    @property
    def tokens(self) -> int:
        return sum(len(entry.token_ids) for entry in self.entries)


class Filler:
    """Fills one space with one lower half's rows. Not thread-safe.

    Args:
        extras: of ``spans``, ``word_ids``, ``type_ids``, what is stored beside the token ids.
    """

    def __init__(self, space: Space, lower: LowerHalf, encoder: DocumentEncoder, extras: Sequence[str]) -> None:
        self._space, self._lower, self._encoder, self._extras = space, lower, encoder, tuple(extras)

    def fill(
        self, texts: Iterable[Document], token_budget: int, progress: bool, before_first: Callable[[], object]
    ) -> FillReport:
        """Compute what is missing; flushed when it returns, and when it is interrupted. See ``Recycler.fill``.

        Args:
            before_first: called before anything is computed, and not where nothing is.
        """
        start = time.monotonic()
        documents = computed = tokens = 0
        with FillProgress(len(texts) if isinstance(texts, Sized) else None, show=progress) as bar:
            try:
                for chunk in _chunks(texts):
                    work = self._missing(chunk, range(documents, documents + len(chunk)))
                    bar.advance(len(chunk) - len(work))
                    if work and not computed:
                        before_first()
                    for group in _groups(work, _GROUP * token_budget):
                        done = self._record(group, token_budget)
                        bar.advance(len(group), len(group), done)
                        computed, tokens = computed + len(group), tokens + done
                    documents += len(chunk)
            finally:
                self._space.flush()
        return FillReport(documents, documents - computed, computed, tokens, time.monotonic() - start)

    def supply(self, texts: Sequence[Document], positions: Sequence[int], token_budget: int) -> None:
        """Compute and put what is missing of a few documents, not flushed; errors name their ``positions``."""
        for group in _groups(self._missing(list(texts), positions), _GROUP * token_budget):
            self._record(group, token_budget)

    def _missing(self, chunk: list[Document], positions: Sequence[int]) -> list[_Work]:
        """Return what is to be computed, tokenized, each document once."""
        keys, spec = document_keys(chunk, positions[0] if chunk else 0), self._encoder.windows
        places: dict[bytes, int] = {}
        for i, found in enumerate(find_entries(self._space, keys, spec)):
            if not found:
                places.setdefault(keys[i], i)
        positions = [positions[i] for i in places.values()]
        encoded = self._encoder.encode([chunk[i] for i in places.values()], positions)
        return [
            _Work(position, entry_keys(key, len(entries), spec), entries)
            for position, key, entries in zip(positions, places, encoded, strict=True)
        ]

    def _record(self, group: list[_Work], token_budget: int) -> int:
        """Compute and put some documents; return their tokens."""
        keys = [key for work in group for key in work.keys]
        entries = [entry for work in group for entry in work.entries]
        rows: list[Any] = [None] * len(entries)
        for batch in plan_batches([len(entry.token_ids) for entry in entries], token_budget):
            some = [entries[i] for i in batch]
            computed = self._lower.run([entry.token_ids for entry in some], [entry.type_ids for entry in some])
            for i, array in zip(batch, computed, strict=True):
                rows[i] = array
        extras: dict[str, Any] = {name: [getattr(entry, name) for entry in entries] for name in self._extras}
        try:
            # One call, so that all windows of a document become visible together.
            self._space.put(keys, rows, [entry.token_ids for entry in entries], **extras)
        except NonFiniteError as error:
            owners = [work.position for work in group if any(key.hex() in str(error) for key in work.keys)]
            raise type(error)(f"position {owners[0]} of the texts: {error}" if owners else str(error)) from error
        return sum(work.tokens for work in group)


def _chunks(texts: Iterable[Document]) -> Iterator[list[Document]]:
    iterator = iter(texts)
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        yield chunk


def _groups(work: list[_Work], tokens: int) -> Iterator[list[_Work]]:
    """Cut work, longest first, into groups of about so many tokens: what is held in memory before it is put."""
    group: list[_Work] = []
    held = 0
    for one in sorted(work, key=lambda one: -len(one.entries[0].token_ids)):
        group.append(one)
        held += one.tokens
        if held >= tokens:
            yield group
            group, held = [], 0
    if group:
        yield group

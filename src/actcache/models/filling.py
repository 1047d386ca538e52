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
    layers: tuple[int, ...]  # where it is missing

    @property
    def tokens(self) -> int:
        return sum(len(entry.token_ids) for entry in self.entries)


class Filler:
    """Fills the spaces of one model's layers in one pass. Not thread-safe.

    Args:
        parts: each layer's space and lower half.
        extras: of ``spans``, ``word_ids``, ``type_ids``, what is stored beside the token ids.
    """

    def __init__(
        self, parts: Sequence[tuple[Space, LowerHalf]], encoder: DocumentEncoder, extras: Sequence[str]
    ) -> None:
        self._spaces = {lower.layer: space for space, lower in parts}
        self._lowers = {lower.layer: lower for _, lower in parts}
        self._encoder, self._extras = encoder, tuple(extras)

    @classmethod
    def together(cls, fillers: Sequence[Filler]) -> Filler:
        """Return one filler of what several fill, with the first one's tokenizer and extras."""
        parts = [(filler._spaces[layer], lower) for filler in fillers for layer, lower in filler._lowers.items()]
        return cls(parts, fillers[0]._encoder, fillers[0]._extras)

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
                for space in self._spaces.values():
                    space.flush()
        return FillReport(documents, documents - computed, computed, tokens, time.monotonic() - start)

    def supply(self, texts: Sequence[Document], positions: Sequence[int], token_budget: int) -> None:
        """Compute and put what is missing of a few documents, not flushed; errors name their ``positions``."""
        for group in _groups(self._missing(list(texts), positions), _GROUP * token_budget):
            self._record(group, token_budget)

    def _missing(self, chunk: list[Document], positions: Sequence[int]) -> list[_Work]:
        """Return what is to be computed, tokenized, each document once."""
        keys, spec = document_keys(chunk, positions[0] if chunk else 0), self._encoder.windows
        places: dict[bytes, int] = {}
        missing: dict[bytes, list[int]] = {}
        for layer, space in self._spaces.items():
            for i, found in enumerate(find_entries(space, keys, spec)):
                if not found:
                    places.setdefault(keys[i], i)
                    if layer not in missing.setdefault(keys[i], []):
                        missing[keys[i]].append(layer)
        positions = [positions[i] for i in places.values()]
        encoded = self._encoder.encode([chunk[i] for i in places.values()], positions)
        return [
            _Work(position, entry_keys(key, len(entries), spec), entries, tuple(missing[key]))
            for position, key, entries in zip(positions, places, encoded, strict=True)
        ]

    def _record(self, group: list[_Work], token_budget: int) -> int:
        """Compute and put some documents; return their tokens."""
        entries = [(work, key, entry) for work in group for key, entry in zip(work.keys, work.entries, strict=True)]
        layers = {layer for work in group for layer in work.layers}
        lower = self._lowers[max(layers)]
        rows: dict[int, list[Any]] = {layer: [None] * len(entries) for layer in layers}
        for batch in plan_batches([len(entry.token_ids) for _, _, entry in entries], token_budget):
            some = [entries[i][2] for i in batch]
            inputs = [one.token_ids for one in some], [one.type_ids for one in some]
            computed = lower.run_at(layers, *inputs) if len(layers) > 1 else {lower.layer: lower.run(*inputs)}
            for layer, arrays in computed.items():
                for i, array in zip(batch, arrays, strict=True):
                    rows[layer][i] = array
        for layer in layers:
            chosen = [i for i, (work, _, _) in enumerate(entries) if layer in work.layers]
            self._put(layer, [entries[i] for i in chosen], [rows[layer][i] for i in chosen])
        return sum(work.tokens for work in group)

    def _put(self, layer: int, entries: list[tuple[_Work, bytes, Encoded]], rows: list[Any]) -> None:
        extras: dict[str, Any] = {name: [getattr(entry, name) for *_, entry in entries] for name in self._extras}
        try:
            # One call, so that all windows of a document become visible together.
            self._spaces[layer].put(
                [key for _, key, _ in entries], rows, [entry.token_ids for *_, entry in entries], **extras
            )
        except NonFiniteError as error:
            owners = [work.position for work, key, _ in entries if key.hex() in str(error)]
            raise type(error)(f"position {owners[0]} of the texts: {error}" if owners else str(error)) from error


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

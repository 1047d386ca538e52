"""Counting the vocabulary of a corpus, from documents or from what a store holds of them."""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from actcache.errors import DocumentError, MissingEntryError, UsageError
from actcache.format.arguments import whole, whole_numbers
from actcache.format.keys import Document, Keys, key_array, key_list
from actcache.models import canary
from actcache.models.documents import chunked, streamed
from actcache.models.tokenizing import DocumentEncoder
from actcache.store.collection import Collection
from actcache.store.space import Space

_BLOCK = 256  # documents that a thread tokenizes at once
_ROWS = 1 << 13  # of activations that are in memory at once while a store is counted
_THREADS = 4  # more only wait for the interpreter's lock


@dataclass(frozen=True)
class Vocabulary:
    """Token counts of a corpus. Immutable.

    Args:
        counts: ``[n]`` int64: how often each token id occurs; ids of ``n`` and more do not.
        always: ids to keep though they do not occur (special tokens, canaries).
        documents: how many documents were counted.
        tokenizer: names tokens in errors; None where it is not at hand.
    """

    counts: NDArray[np.int64]
    always: NDArray[np.int64]
    documents: int = 0
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, ids: Iterable[int] | NDArray[np.integer]) -> Vocabulary:
        """Return the vocabulary of token ids, each counted as often as it stands there; raises ``UsageError``."""
        return cls(count_ids(np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))), np.empty(0, np.int64))

    @property
    def ids(self) -> NDArray[np.int64]:
        """``[kept]``: ids that occur or are always kept, ascending."""
        return np.union1d(np.flatnonzero(self.counts), self.always)

    @property
    def tokens(self) -> int:
        """Tokens that were counted, each occurrence."""
        return int(self.counts.sum())

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, token_id: object) -> bool:
        return isinstance(token_id, int | np.integer) and bool(np.isin(token_id, self.ids))

    def __or__(self, other: Vocabulary) -> Vocabulary:
        """Return the vocabulary of two corpora of one tokenizer together."""
        counts = np.zeros(max(len(self.counts), len(other.counts)), np.int64)
        for one in (self, other):
            counts[: len(one.counts)] += one.counts
        always = np.union1d(self.always, other.always)
        return Vocabulary(counts, always, self.documents + other.documents, self.tokenizer or other.tokenizer)

    def __repr__(self) -> str:
        return f"<Vocabulary: {len(self)} ids kept, {self.tokens} tokens of {self.documents} documents>"


def count_ids(ids: NDArray[Any]) -> NDArray[np.int64]:
    """Return how often each id stands in an array; raises ``UsageError`` where they are no token ids."""
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0):
        raise UsageError("token ids are integers from 0 on")
    return np.bincount(ids.ravel().astype(np.int64)).astype(np.int64)


def count_vocabulary(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    special_tokens: bool = True,
    keep: Iterable[int] = (),
    threads: int | None = None,
) -> Vocabulary:
    """Count the tokens of documents of any kind that has a key: texts, pairs, word lists, token ids.

    Documents are streamed and never truncated, so that every window and every ``max_length`` is covered. Always kept,
    besides ``keep``: the tokenizer's special tokens and the tokens of the recycler's canaries, some 130, without which
    a pruned model could not show that it computes what the unpruned one does.

    Args:
        documents: any iterable; a few hundred times ``threads`` of them are in memory at once.
        special_tokens: whether the tokenizer adds its special tokens to texts.
        threads: that tokenize at once; by default up to 4 with a fast tokenizer, which frees the interpreter's lock.

    Raises:
        DocumentError: a document makes no tokens or holds ids that the tokenizer does not know; it names its position.
        UsageError: ``documents`` is one text, a table, an iterator that is used up, ...
    """
    source = streamed(documents)
    if threads is None:
        threads = min(_THREADS, os.cpu_count() or 1) if tokenizer.is_fast else 1
    workers = whole("threads", threads, 1)
    own = threading.local()  # an encoder is not thread-safe

    def count(start: int, block: list[Document]) -> tuple[int, NDArray[np.int64]]:
        if not hasattr(own, "encoder"):
            own.encoder = DocumentEncoder(tokenizer, special_tokens=special_tokens)
        encoded = own.encoder.encode(block, range(start, start + len(block)))
        return len(block), count_ids(np.concatenate([one.token_ids for windows in encoded for one in windows]))

    total, documents_counted = np.zeros(len(tokenizer), np.int64), 0
    running: deque[Future[tuple[int, NDArray[np.int64]]]] = deque()

    def collect(most: int) -> None:
        """Add up the oldest blocks until no more than ``most`` are under way."""
        nonlocal documents_counted
        while len(running) > most:
            size, counts = running.popleft().result()
            total[: len(counts)] += counts
            documents_counted += size

    with ThreadPoolExecutor(workers) as pool:
        try:
            for start, block in chunked(source, _BLOCK):
                running.append(pool.submit(count, start, block))
                collect(2 * workers)
            collect(0)
        finally:
            for job in running:
                job.cancel()
    always = np.union1d(_always(tokenizer), whole_numbers("keep", keep))
    return Vocabulary(total, always, documents_counted, tokenizer)


def count_stored(
    space: Space,
    keys: Keys | Collection | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    keep: Iterable[int] = (),
) -> Vocabulary:
    """Count the tokens of a space's entries, without tokenizing anything.

    Entries are read and verified some thousand tokens at a time. Always kept, besides ``keep``: the tokens of the
    space's canaries and, where a tokenizer is given, its special tokens.

    Args:
        keys: of the entries, or a collection of them; None for the whole space.

    Raises:
        MissingEntryError: a key is not in the space.
        UsageError: an entry was stored without token ids.
        CorruptEntryError: entries fail their checksums.
    """
    wanted = space.key_array() if keys is None else keys.keys if isinstance(keys, Collection) else key_array(keys)
    lengths = space.lengths(wanted)
    if not lengths.all():
        absent = key_list(wanted[lengths == 0])
        raise MissingEntryError(
            f"{len(absent)} of {len(wanted)} entries are not in {space!r}: fill them first, or count the documents",
            absent,
        )
    total = np.zeros(0, np.int64)
    for first, last in _spans(lengths):
        for key, entry in zip(wanted[first:last], space.get(wanted[first:last]), strict=True):
            if entry is None or entry.token_ids is None:
                raise UsageError(f"entry {key.tobytes().hex()} has no token ids: count the documents themselves")
            counts = count_ids(entry.token_ids)
            total = np.pad(total, (0, max(0, len(counts) - len(total))))
            total[: len(counts)] += counts
    blob = space.blob(canary.BLOB_NAME)
    always = whole_numbers("keep", keep)
    if blob is not None:
        always = np.union1d(always, canary.token_ids(blob, space.recipe.hidden_size))
    if tokenizer is not None:
        always = np.union1d(always, _always(tokenizer))
    return Vocabulary(total, always, len(wanted), tokenizer)


def _spans(lengths: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield [first, last) of entries that are read at once."""
    group = (np.cumsum(lengths) - 1) // _ROWS
    cuts = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(lengths)]
    return itertools.pairwise(cuts) if len(lengths) else iter(())


def _always(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    special = np.array(tokenizer.all_special_ids, np.int64)
    try:
        canaries = canary.documents(DocumentEncoder(tokenizer))
    except DocumentError:  # a tokenizer that makes nothing of them has no recycler either
        canaries = []
    return np.unique(np.concatenate([special, *(one.token_ids for one in canaries)]))

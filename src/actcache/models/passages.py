"""Documents as lists of passages: which a corpus has, what a fill counts of them, and labels of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import MissingEntryError, ShapeError
from actcache.format.arguments import to_numpy
from actcache.format.keys import KEY_BYTES, Document, first_of_their_like, key_array
from actcache.format.ragged import offsets_of
from actcache.models.documents import chunked, streamed
from actcache.models.partition import Part
from actcache.models.tokenizing import DocumentEncoder, Passage
from actcache.reader.labels import IGNORED, of_entries, out_of_column
from actcache.store.document_entries import entry_keys

_CUT = 128  # documents that are cut at a time
_NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class Outline:
    """The passages of a corpus, document by document. A passage that several places have stands at each of them.

    Attributes:
        keys: ``[passages, 32]`` uint8.
        documents: ``[passages]`` int64, position of the document that each is of.
        own: ``[passages, 2]`` int32, where its own tokens begin and end in what the model is given.
        lengths: ``[passages]`` int64, tokens that the model is given.
        count: documents.
    """

    keys: NDArray[np.uint8]
    documents: NDArray[np.int64]
    own: NDArray[np.int32]
    lengths: NDArray[np.int64]
    count: int

    @classmethod
    def joined(cls, parts: Sequence[Outline]) -> Outline:
        """Return the outline of several corpora, one after another."""
        before = offsets_of(np.array([one.count for one in parts], np.int64))
        return cls(
            np.concatenate([one.keys for one in parts] or [np.empty((0, 32), np.uint8)]),
            np.concatenate(
                [one.documents + start for one, start in zip(parts, before.tolist(), strict=False)] or [_NONE]
            ),
            np.concatenate([one.own for one in parts] or [np.empty((0, 2), np.int32)]),
            np.concatenate([one.lengths for one in parts] or [_NONE]),
            int(before[-1]),
        )

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def distinct(self) -> NDArray[np.int64]:
        """Positions of the passages that stand first of their like, ascending."""
        return first_of_their_like(self.keys)

    def tokens(self) -> NDArray[np.int64]:
        """Return how many tokens of its own each document has, ``[count]``."""
        own = np.zeros(self.count, np.int64)
        np.add.at(own, self.documents, self.own[:, 1] - self.own[:, 0])
        return own


def outline_of(encoder: DocumentEncoder, texts: Iterable[Document]) -> Outline:
    """Return the passages of documents, which are streamed; where documents are not cut so, their entries.

    Raises:
        UsageError, DocumentError: see ``DocumentEncoder.cut``, and ``encode``.
    """
    chunks = chunked(streamed(texts), _CUT)
    return Outline.joined([_outlined(encoder, chunk, range(first, first + len(chunk))) for first, chunk in chunks])


def _outlined(encoder: DocumentEncoder, documents: list[Document], positions: Sequence[int]) -> Outline:
    keys: list[bytes] = []
    own: list[tuple[int, int]] = []
    lengths: list[int] = []
    counts = []
    if encoder.passages is not None:
        for cut in encoder.cut(documents, positions):
            keys += [one.key() for one in cut]
            own += [(one.begin, one.end) for one in cut]
            lengths += [len(one.token_ids) for one in cut]
            counts.append(len(cut))
    else:
        whole = encoder.keys(documents, positions[0] if documents else 0)
        for key, entries in zip(whole, encoder.encode(documents, positions), strict=True):
            keys += entry_keys(key, len(entries), encoder.windows)
            lengths += [one.length for one in entries]
            own += [(0, one.length) for one in entries]
            counts.append(len(entries))
    return Outline(
        key_array(keys),
        np.repeat(np.arange(len(documents)), counts),
        np.array(own, np.int32).reshape(-1, 2),
        np.array(lengths, np.int64),
        len(documents),
    )


def check_outline_found(outline: Outline, there: NDArray[np.bool_]) -> None:
    """Refuse documents of which passages are missing, with a ``MissingEntryError`` that holds the passages' keys."""
    if not there.all():
        documents, keys = _missing(outline, there)
        raise MissingEntryError(
            f"{len(documents)} of {outline.count} documents have passages that are not in the space "
            f"({len(keys)} of {len(outline)}), the first at position {documents[0]}: fill them first, or have a reader "
            "skip these passages (on_missing='skip')",
            keys,
        )


def check_revised(outline: Outline, there: NDArray[np.bool_]) -> None:
    """Refuse a revision of documents that are not stored, with a ``MissingEntryError`` that holds the missing keys."""
    if not there.all():
        documents, keys = _missing(outline, there)
        raise MissingEntryError(
            f"{len(documents)} of the {outline.count} documents that were revised are not in the space, the first at "
            f"position {documents[0]}: fill them first, cut in the same way, or fill the revision as it is",
            keys,
        )


def _missing(outline: Outline, there: NDArray[np.bool_]) -> tuple[NDArray[np.int64], list[bytes]]:
    """Return the documents that lack passages, ascending, and these passages' keys."""
    return np.unique(outline.documents[~there]), [bytes(key) for key in outline.keys[~there]]


@dataclass(frozen=True)
class Revision:
    """What a revision of a corpus costs. Passages (of whole documents: entries) and tokens are counted as the model is
    given them, special tokens and context included."""

    documents: int  # of the revision
    unchanged: int  # of these, whose passages all are in the old corpus
    passages: int
    tokens: int  # of them, wherever they stand
    new_passages: int  # different ones that are not in the old corpus: to be computed, and stored
    new_tokens: int
    new_nbytes: int  # about, of their rows and token ids
    old_passages: int  # different ones of the old corpus that are not in the revision: what pruning gives back
    old_nbytes: int

    @property
    def reused_tokens(self) -> int:
        """Tokens that are not computed: those of passages that are in the old corpus, or stand there before."""
        return self.tokens - self.new_tokens

    @property
    def reused(self) -> float:
        """The share of the tokens that are not computed."""
        return self.reused_tokens / self.tokens if self.tokens else 1.0


_BESIDE = 4  # bytes of a token beside its row: its id


def compare(old: Outline, new: Outline, row_bytes: float) -> Revision:
    """Return what a revision costs, of rows of so many bytes."""
    there = ~_lacking(new, old)
    changed = np.zeros(new.count, bool)
    changed[new.documents[~there]] = True
    first = new.distinct
    added = first[~there[first]]
    gone = old.distinct
    gone = gone[_lacking(old, new)[gone]]
    row = row_bytes + _BESIDE
    return Revision(
        documents=new.count,
        unchanged=new.count - int(changed.sum()),
        passages=len(new),
        tokens=int(new.lengths.sum()),
        new_passages=len(added),
        new_tokens=int(new.lengths[added].sum()),
        new_nbytes=round(float(new.lengths[added].sum() * row)),
        old_passages=len(gone),
        old_nbytes=round(float(old.lengths[gone].sum() * row)),
    )


def _lacking(some: Outline, others: Outline) -> NDArray[np.bool_]:
    """Return which passages are not among others, ``[n]``."""
    kind = np.dtype((np.void, KEY_BYTES))
    mine, theirs = (np.ascontiguousarray(one.keys).view(kind).reshape(-1) for one in (some, others))
    lacking: NDArray[np.bool_] = ~np.isin(mine, theirs)
    return lacking


def labels_of_passages(given: Any, outline: Outline, around: tuple[int, int]) -> Any:
    """Return labels of passages from labels of their documents, as a reader takes them.

    A document's label is that of each of its passages. Labels of a document's tokens (one for each, with or without the
    special tokens of a whole document, so many of them before and after: ``around``) go to the passage whose own the
    token is; special tokens and context have -100.

    Raises:
        ShapeError: the labels are not one a document, or not one a token.
    """
    given = out_of_column(given)
    tokens = outline.tokens()
    if not (isinstance(given, list | tuple) and len(given) == outline.count and given and np.ndim(given[0]) == 1):
        return of_entries(given, outline.documents, outline.count)
    arrays = [to_numpy(one) for one in given]
    sizes = np.array([one.size for one in arrays], np.int64)
    fits = (sizes == tokens) | (sizes == tokens + sum(around))
    if not fits.all():
        if len(set(sizes.tolist())) == 1 and not fits.any():  # several numbers a document
            return of_entries(given, outline.documents, outline.count)
        i = int(np.argmin(fits))
        raise ShapeError(
            f"position {i}: {tokens[i]} tokens and {sizes[i]} labels; labels of tokens are one for each token of the "
            "document, with or without its special tokens"
        )
    inner = [
        one if len(one) == count else one[around[0] : around[0] + count]
        for one, count in zip(arrays, tokens, strict=True)
    ]
    own = outline.own[:, 1] - outline.own[:, 0]
    begins = offsets_of(own)  # among the tokens of all documents
    flat = np.concatenate(inner)
    result = []
    for i, (begin, end) in enumerate(outline.own.tolist()):
        labels = np.full(outline.lengths[i], IGNORED, flat.dtype if flat.dtype.kind == "f" else np.int64)
        labels[begin:end] = flat[begins[i] : begins[i + 1]]
        result.append(labels)
    return result


def passages_in(encoder: DocumentEncoder, texts: Iterable[Document]) -> Iterator[Document]:
    """Yield the passages of documents, which are streamed; raises as ``outline_of``."""
    for first, chunk in chunked(streamed(texts), _CUT):
        yield from flattened(encoder, chunk, range(first, first + len(chunk)))[1]


def flattened(
    encoder: DocumentEncoder, documents: Sequence[Document], positions: Sequence[int]
) -> tuple[list[int], list[Document]]:
    """Return the passages of some documents, one after another, and the position of the document that each is of."""
    cut = encoder.cut(documents, positions)
    owners = [position for position, passages in zip(positions, cut, strict=True) for _ in passages]
    return owners, [one for passages in cut for one in passages]


class PassageParts(Iterable[Part]):
    """The passages of some documents, as a fill takes documents; and what became of the documents.

    A part's documents are counted when the fill asks for the next one. Not thread-safe.

    Args:
        parts: the documents.
        encoder: cuts them.
        lacking: of passages' keys, those that are missing where they are wanted.
        advance: told of documents that were done, and how many of them have been computed.
    """

    def __init__(
        self,
        parts: Iterable[Part],
        encoder: DocumentEncoder,
        lacking: Callable[[list[bytes]], Iterable[bytes]],
        advance: Callable[[int, int], object],
    ) -> None:
        self._parts, self._encoder, self._lacking, self._advance = parts, encoder, lacking, advance
        self._documents: list[list[Passage]] = []  # that were cut, of the part that is at work
        self.documents = self.present = self.left_out = self.passages = self.tokens = 0

    def __iter__(self) -> Iterator[Part]:
        positions: list[int] = []
        passages: list[Document] = []
        for names, chunk in self._parts:
            if not chunk:
                yield names, chunk
            for start in range(0, len(chunk), _CUT):
                some = slice(start, start + _CUT)
                for position, cut in zip(names[some], self._encoder.cut(chunk[some], names[some]), strict=True):
                    self._documents.append(cut)
                    positions += [position] * len(cut)
                    passages += cut
                if len(passages) >= self._encoder.chunk:
                    yield from self._counted(positions, passages)
                    positions, passages = [], []
            if passages:  # who asks for the next part may take this one as done
                yield from self._counted(positions, passages)
                positions, passages = [], []

    def _counted(self, positions: list[int], passages: list[Document]) -> Iterator[Part]:
        documents = [[one.key() for one in cut] for cut in self._documents]
        keys = [key for cut in documents for key in cut]
        before = {*self._lacking(keys)}
        yield positions, passages
        after = {*self._lacking(keys)} if before else set()
        present = sum(before.isdisjoint(cut) for cut in documents)
        left_out = sum(not after.isdisjoint(cut) for cut in documents)
        self.documents += len(documents)
        self.present += present
        self.left_out += left_out
        self.passages += len(keys)
        known = (one for cut in self._documents for one in cut if one.key() not in after)
        self.tokens += sum(len(one.token_ids) for one in known)
        self._documents = []
        self._advance(len(documents), len(documents) - present - left_out)

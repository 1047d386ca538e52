"""Passages: documents cut at places that their content decides, so that a revision keeps most of them.

Format version 4 of a space's description. A passage is a document of token ids: what the model is given for it, special
tokens and neighbouring tokens included, so its key is that of these ids (``actcache.format.keys``). The rule by which
documents are cut decides what is found, never what is right.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from actcache.errors import DocumentError, RecipeError
from actcache.format.arguments import is_whole

By = Literal["paragraphs", "sentences", "tokens"]

_REACH = 8  # tokens on either side of a place that its hash is of, at most
_PARAGRAPH, _SENTENCE, _WORD, _INSIDE = range(4)  # the ranks of places: the lower, the rather a cut is there

_PARAGRAPHS = re.compile(r"\n[^\S\n]*\n\s*")  # blank lines, up to what follows
_SENTENCES = re.compile(r"(?<=[.!?\u2026])[\"'\u201d\u2019)\]]*\s+|[\u3002\uff01\uff1f]+\s*|\n\s*")
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True)
class Passages:
    """How documents are cut by their content: passages of at most ``max_length`` tokens, each an entry of its own.

    A document that fits is one passage. Else there is a cut before a token where no place within ``least`` tokens is
    better: the begin of a paragraph is better than that of a sentence or line, this than that of a word, and of equals
    the one whose hash of the tokens around is smaller. So where a document is cut does not depend on what is further
    away, and what was cut from unchanged text is found again in a revision, and in other documents. What is still
    longer than the most is cut by its length, from its end on.

    Args:
        max_length: tokens of a passage as the model is given it, special tokens and context included, at most.
        context: tokens of its document that stand before, and after, a passage's own in what the model is given.
        by: ``"paragraphs"``; ``"sentences"``, for which the begin of a paragraph is as good as one of a sentence; or
            ``"tokens"``, for which all words are alike.
        least: own tokens of a passage, but for what is left over where one was cut by its length; on average there are
            about twice as many. A quarter of the most by default.

    Raises:
        DocumentError: these are no whole numbers, or leave no room for a passage's own tokens.
    """

    max_length: int
    context: int = 0
    by: By = "paragraphs"
    least: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_length", "context", "least"):
            value = getattr(self, name)
            if name == "least" and value is None:
                continue
            if not is_whole(value):
                raise DocumentError(f"{name} of passages is a whole number of tokens, not {value!r:.80}")
            object.__setattr__(self, name, int(value))
        if self.by not in get_args(By):
            raise DocumentError(f"passages are cut by {', '.join(get_args(By))}, not by {self.by!r:.80}")
        if self.context < 0 or (self.least is not None and self.least < 1):
            raise DocumentError("context of passages is 0 tokens or more, and least is 1 or more")
        if 2 * self.context >= self.max_length:
            raise DocumentError(
                f"a context of {self.context} tokens on either side leaves no room in passages of {self.max_length}: "
                "give a shorter context, or longer passages"
            )

    def limits(self, added: int) -> tuple[int, int]:
        """Return how many tokens of its own a passage has at least and at most, where ``added`` are special tokens.

        Raises:
            RecipeError: there is no room for them.
        """
        most = self.max_length - added - 2 * self.context
        least = max(1, most // 4) if self.least is None else self.least
        if most < 2 * least:
            raise RecipeError(
                f"passages of {self.max_length} tokens, {added} special ones and {2 * self.context} of context among "
                f"them, leave room for {max(most, 0)} of their own, which is less than twice the least ({least}): "
                "give longer passages, or a smaller least"
            )
        return least, most


def passages(max_length: int, context: int = 0, *, by: By = "paragraphs", least: int | None = None) -> Passages:
    """Return the spec by which documents are cut where their content says so; see ``Passages``."""
    return Passages(max_length, context, by, least)


def cut(ids: NDArray[np.integer], ranks: NDArray[np.uint8], least: int, most: int) -> NDArray[np.int64]:
    """Return where passages begin and end, ``[passages + 1]``, from 0 to ``n``.

    None has more than ``most`` tokens. Fewer than ``least`` has only what is left over, before the cuts by length, of a
    stretch that is too long: a document's first passage, or the first one behind a cut of its own.

    Args:
        ids: a document's tokens, ``[n]``.
        ranks: of the place before each token, ``[n]``; see ``ranks_of``.
        least, most: with ``2 * least <= most``.
    """
    count = len(ids)
    if count <= most:
        return np.array([0, count], np.int64)
    # So that one passage holds what lies before the first cut of a document's own after an insertion before it.
    reach = min(_REACH, most - 2 * least + 1)
    worth = _worth(ids, ranks, reach)  # the smaller, the rather a cut is there
    first, last = least + reach, count - least - reach  # all that decides lies within the document
    bounds = [0]
    if first <= last:
        smallest, places = _minima(worth, least), np.arange(first, last + 1)
        bounds += places[(worth[places] < smallest[places - least]) & (worth[places] <= smallest[places + 1])].tolist()
    bounds.append(count)
    result = [0]
    for begin, end in itertools.pairwise(bounds):
        # Towards a document's own begin or end, where something may be added, so that cuts further in stay.
        if end == count and begin > 0:
            result += _forward(worth, begin, end, least, most, reach)
        else:
            result += _backward(worth, begin, end, least, most, reach)
        result.append(end)
    return np.array(result, np.int64)


def _forward(worth: NDArray[np.uint64], begin: int, end: int, least: int, most: int, reach: int) -> list[int]:
    """Cut a document's last stretch, which is too long, from its begin on; return the cuts."""
    cuts: list[int] = []
    while end - begin > most:
        some = worth[begin + least : min(begin + most, end - max(least, reach)) + 1]
        begin += least + int(len(some) - 1 - np.argmin(some[::-1]))  # of equal ones the last
        cuts.append(begin)
    return cuts


def _backward(worth: NDArray[np.uint64], begin: int, end: int, least: int, most: int, reach: int) -> list[int]:
    """Cut a stretch that is too long, by chance or where many places are equal, from its end on; return the cuts.

    Where the stretch begins decides when this ends, and no cut: the cuts of a stretch that begins later are the last
    ones of these. What is left over may therefore be short.
    """
    cuts: list[int] = []
    while end - begin > most:
        first = max(end - most, reach)  # before that the worth is not known: it depends on what may be added
        end = first + int(np.argmin(worth[first : end - least + 1]))  # of equal ones the first
        cuts.append(end)
    return cuts[::-1]


def _worth(ids: NDArray[np.integer], ranks: NDArray[np.uint8], reach: int) -> NDArray[np.uint64]:
    """Return a number for the place before each token, ``[n]``: its rank, then a hash of the tokens around.

    ``reach`` of them on either side.
    """
    mixed = _mix(ids.astype(np.uint64) + np.uint64(1))
    padded = np.concatenate([np.zeros(reach, np.uint64), mixed, np.zeros(reach, np.uint64)])
    total = np.zeros(len(ids), np.uint64)
    for i in range(2 * reach):
        total = total * np.uint64(0x9E3779B97F4A7C15) + padded[i : i + len(ids)]
    return (ranks.astype(np.uint64) << np.uint64(60)) | (_mix(total) >> np.uint64(4))


def _mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return numbers of which each bit depends on all bits (the finalizer of splitmix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _minima(values: NDArray[np.uint64], width: int) -> NDArray[np.uint64]:
    """Return the smallest of each ``width`` neighbours, ``[n - width + 1]``, by where they begin.

    By van Herk: within blocks of ``width``, running minima from the left and from the right.
    """
    count = len(values)
    padded = np.concatenate([values, np.full(-count % width, np.iinfo(np.uint64).max, np.uint64)]).reshape(-1, width)
    left = np.minimum.accumulate(padded, axis=1).ravel()[:count]
    right = np.minimum.accumulate(padded[:, ::-1], axis=1)[:, ::-1].ravel()[:count]
    return np.minimum(right[: count - width + 1], left[width - 1 :])


def ranks_of(
    text: str | None, spans: NDArray[np.int32], word_ids: NDArray[np.int32], by: By, words: list[str] | None = None
) -> NDArray[np.uint8]:
    """Return the rank of the place before each token, ``[n]``: what begins there, a paragraph, a sentence, a word.

    Args:
        text: the document, where it is one.
        spans: of its tokens, ``[n, 2]`` characters.
        word_ids: the word that each token belongs to, ``[n]``.
        words: the document, where it is words.
    """
    ranks = np.full(len(word_ids), _INSIDE, np.uint8)
    ranks[1:][word_ids[1:] != word_ids[:-1]] = _WORD
    if words is not None and by != "tokens":
        ends = np.array(
            [word.rstrip("\"'\u201d\u2019)]")[-1:] in tuple(".!?\u2026\u3002\uff01\uff1f") for word in words]
        )
        begins = (ranks == _WORD) & np.append(False, ends[word_ids[:-1]])
        ranks[begins] = _SENTENCE
    if text is None:
        return ranks
    last = np.maximum.accumulate(spans[:, 1])

    def mark(pattern: re.Pattern[str], rank: int) -> None:
        ends = np.array([match.end() for match in pattern.finditer(text)], np.int64)
        places = np.searchsorted(last, ends, side="right")  # the token that holds what follows
        ranks[places[places < len(ranks)]] = rank

    mark(_SPACES, _WORD)
    if by != "tokens":
        mark(_SENTENCES, _SENTENCE)
        mark(_PARAGRAPHS, _PARAGRAPH if by == "paragraphs" else _SENTENCE)
    return ranks

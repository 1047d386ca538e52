"""Where documents are cut into passages: by content alone, within limits, and the same around an edit."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from actcache.errors import DocumentError, RecipeError
from actcache.format.passages import Passages, _minima, _worth, cut, passages, ranks_of

RNG = np.random.default_rng(7)
LEAST, MOST = 20, 80


def _ids(count: int) -> NDArray[np.int64]:
    return RNG.integers(0, 5000, count)


def _cut(ids: NDArray[np.int64], ranks: NDArray[np.uint8] | None = None) -> list[int]:
    return [*map(int, cut(ids, np.zeros(len(ids), np.uint8) if ranks is None else ranks, LEAST, MOST))]


def _contents(ids: NDArray[np.int64]) -> list[bytes]:
    return [ids[a:b].tobytes() for a, b in itertools.pairwise(_cut(ids))]


@pytest.mark.parametrize("count", [1, MOST, MOST + 1, MOST + 2, 500, 20_000])
def test_passages_cover_a_document_within_their_limits(count: int) -> None:
    ids = _ids(count)
    bounds = _cut(ids)
    lengths = np.diff(bounds)
    assert bounds[0] == 0
    assert bounds[-1] == count
    assert lengths.max() <= MOST
    if count == 20_000:
        assert np.mean(lengths < LEAST) < 0.03  # what was left over before cuts by length
        assert 1.6 * LEAST < lengths.mean() < 2.4 * LEAST


def test_a_document_that_fits_is_one_passage() -> None:
    assert _cut(_ids(MOST)) == [0, MOST]


@st.composite
def _documents(draw: st.DrawFn) -> _Document:
    """Documents longer than the most, of few and of many different tokens, random, repeated or both, ranked and not."""
    least = draw(st.integers(1, 24))
    most = 2 * least + draw(st.one_of(st.integers(0, 9), st.just(2 * least), st.just(3 * least)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = most + draw(st.integers(1, 30 * most))
    ids = rng.integers(0, draw(st.sampled_from([1, 2, 3, 6, 5000])), count)
    if draw(st.booleans()):
        begin, period = draw(st.integers(0, count - 1)), draw(st.integers(1, 3 * most))
        ids[begin:] = np.resize(ids[begin : begin + period], count - begin)
    ranks = np.zeros(count, np.uint8)
    kind = draw(st.sampled_from(["alike", "random", "rising", "falling"]))
    if kind != "alike":
        ranks = rng.choice(4, count, p=[0.02, 0.08, 0.5, 0.4]).astype(np.uint8)
    if kind in ("rising", "falling"):
        ranks = np.sort(ranks)[:: 1 if kind == "rising" else -1].copy()
    return _Document(ids, ranks, least, most)


@dataclass(frozen=True)
class _Document:
    ids: NDArray[np.int64]
    ranks: NDArray[np.uint8]
    least: int
    most: int

    @property
    def bounds(self) -> list[int]:
        return [*map(int, cut(self.ids, self.ranks, self.least, self.most))]

    @property
    def contents(self) -> list[bytes]:
        return [self.ids[a:b].tobytes() for a, b in itertools.pairwise(self.bounds)]

    @property
    def reach(self) -> int:
        return min(8, self.most - 2 * self.least + 1)

    def own_cuts(self) -> list[int]:
        """The places that no other one within the least is as good as: told one by one, from the definition."""
        worth = _worth(self.ids, self.ranks, self.reach).tolist()
        edge = self.least + self.reach
        return [
            place
            for place in range(edge, len(worth) - edge + 1)
            if worth[place] < min(worth[place - self.least : place])
            and worth[place] <= min(worth[place + 1 : place + self.least + 1])
        ]

    def with_more(self, ids: NDArray[np.int64], ranks: NDArray[np.uint8], place: int) -> _Document:
        parts = [(self.ids[:place], self.ranks[:place]), (ids, ranks), (self.ids[place:], self.ranks[place:])]
        joined, ranked = (np.concatenate(some) for some in zip(*parts, strict=True))
        return replace(self, ids=joined, ranks=ranked)


def _added(document: _Document, data: st.DataObject) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Draw what is inserted: up to ``least`` tokens."""
    ids = st.one_of(st.integers(0, 6), st.integers(0, 5000))
    drawn = data.draw(st.lists(st.tuples(ids, st.integers(0, 3)), min_size=1, max_size=document.least))
    return np.array([one for one, _ in drawn]), np.array([rank for _, rank in drawn], np.uint8)


@given(document=_documents())
def test_passages_of_any_document_cover_it_within_their_limits(document: _Document) -> None:
    bounds, own = document.bounds, document.own_cuts()
    lengths = np.diff(bounds)
    assert (bounds[0], bounds[-1]) == (0, len(document.ids))
    assert lengths.min() >= 1
    assert lengths.max() <= document.most
    assert {*own} <= {*bounds}
    # Short is only what is left over before cuts by length, and there is one of them in a stretch at most.
    for (begin, end), length in zip(itertools.pairwise(bounds), lengths, strict=True):
        if length < document.least:
            assert begin in (0, *own)
            assert end not in (*own, len(document.ids))


@given(document=_documents(), data=st.data())
def test_an_insertion_at_the_front_makes_at_most_two_new_passages(document: _Document, data: st.DataObject) -> None:
    """Of any document that has a cut of its own, and of any tokens, as many as the least at most."""
    assume(document.own_cuts())
    before = set(document.contents)
    document.ranks[0] = data.draw(st.integers(0, 3))  # what stood first stands within now
    revised = document.with_more(*_added(document, data), place=0)
    assert sum(one not in before for one in revised.contents) <= 2


@pytest.mark.parametrize("seed", [272, 808, 1173, 1189, 1247, 1458, 2732, 2778])
def test_old_beginnings_that_were_cut_by_their_length_keep_these_cuts(seed: int) -> None:
    """Of 6,000 random documents, some of those that got three new passages while such cuts heeded where they began."""
    rng = np.random.default_rng(seed)
    old, added = rng.integers(0, 5000, 600), rng.integers(0, 5000, 1 + seed % LEAST)
    before = set(_contents(old))
    assert sum(one not in before for one in _contents(np.concatenate([added, old]))) <= 2


@given(document=_documents(), data=st.data())
def test_an_insertion_behind_makes_at_most_two_new_passages(document: _Document, data: st.DataObject) -> None:
    """But where it completes a stretch that is too long: its cuts by length are counted from its end from then on."""
    own = document.own_cuts()
    assume(own)
    before = set(document.contents)
    revised = document.with_more(*_added(document, data), place=len(document.ids))
    new = sum(one not in before for one in revised.contents)
    completed = [one for one in revised.own_cuts() if one > own[-1]]
    if completed and completed[0] - own[-1] > document.most:
        assert new <= 2 + (completed[0] - own[-1]) // document.least
    else:
        assert new <= 2


@given(document=_documents(), data=st.data())
def test_an_edit_changes_no_passage_beyond_the_next_cuts_of_the_documents_own(
    document: _Document, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(document.ids)))
    ids, ranks = _added(document, data)
    revised = document.with_more(ids, ranks, place)
    near = document.least + document.reach
    left = [0, *(one for one in document.own_cuts() if one < place - near)][-1]
    right = [*(one for one in document.own_cuts() if one > place + near), len(document.ids)][0]
    before = {bound for bound in document.bounds if bound <= left}
    behind = {bound + len(ids) for bound in document.bounds if bound >= right}
    found = {*revised.bounds}
    if left > 0:
        assert before == {bound for bound in found if bound <= left}
    if right < len(document.ids):
        assert behind == {bound for bound in found if bound >= right + len(ids)}


def test_an_edit_changes_only_what_is_near_it() -> None:
    for place in (700, 1500, 2900):
        old = _ids(3000)
        edited = np.concatenate([old[:place], _ids(3), old[place + 5 :]])
        before, after = set(_cut(old)), {bound + 2 if bound > place else bound for bound in _cut(edited)}
        assert all(abs(bound - place) <= 2 * MOST for bound in before ^ after)  # 2: of cuts by the most, rarely


def test_a_place_of_a_lower_rank_is_taken_before_any_other_within_reach() -> None:
    ids, ranks = _ids(2000), np.full(2000, 3, np.uint8)
    ranks[::50] = 0  # further apart than the least
    inner = _cut(ids, ranks)[1:-1]
    assert set(range(50, 1951, 50)) <= {*inner}


def test_equal_tokens_are_cut_to_equal_passages() -> None:
    contents = _contents(np.full(5000, 9))
    assert len(set(contents)) <= 2
    assert len(contents) <= 5000 // MOST + 1


def test_minima_are_those_of_each_window() -> None:
    values = RNG.integers(0, 99, 101).astype(np.uint64)
    for width in (1, 2, 7, 100, 101):
        expected = [values[i : i + width].min() for i in range(len(values) - width + 1)]
        assert _minima(values, width).tolist() == expected


def test_ranks_tell_paragraphs_sentences_words_and_what_is_inside() -> None:
    text = "One two. Three\n\nFour fi\nve"
    starts = [0, 4, 7, 9, 16, 21, 24, 25]  # One|two|.|Three|Four|fi|v|e
    spans = np.array([(a, b) for a, b in zip(starts, [3, 7, 8, 14, 20, 23, 25, 26], strict=True)], np.int32)
    words = np.array([0, 1, 2, 3, 4, 5, 6, 6], np.int32)
    assert ranks_of(text, spans, words, "paragraphs").tolist() == [3, 2, 2, 1, 0, 2, 1, 3]
    assert ranks_of(text, spans, words, "sentences").tolist() == [3, 2, 2, 1, 1, 2, 1, 3]
    assert ranks_of(text, spans, words, "tokens").tolist() == [3, 2, 2, 2, 2, 2, 2, 3]


def test_ranks_of_words_go_by_the_words_ends() -> None:
    word_ids = np.array([0, 1, 1, 2, 3], np.int32)
    spans = np.zeros((5, 2), np.int32)
    found = ranks_of(None, spans, word_ids, "paragraphs", ["Yes", 'well."', "So", "on"])
    assert found.tolist() == [3, 2, 3, 1, 2]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"max_length": 0}, "leaves no room"),
        ({"max_length": 2.5}, "whole number"),
        ({"max_length": 64, "context": -1}, "0 tokens or more"),
        ({"max_length": 64, "context": 32}, "a context of 32 tokens on either side leaves no room in passages of 64"),
        ({"max_length": 64, "context": 100}, "shorter context"),
        ({"max_length": 64, "least": 0}, "1 or more"),
        ({"max_length": 64, "by": "pages"}, "paragraphs, sentences, tokens"),
    ],
)
def test_specs_that_are_none_are_refused(given: dict[str, object], match: str) -> None:
    with pytest.raises(DocumentError, match=match):
        Passages(**given)  # type: ignore[arg-type]


def test_limits_leave_room_for_special_tokens_and_context() -> None:
    assert passages(128, context=16).limits(2) == (23, 94)
    with pytest.raises(RecipeError, match="less than twice the least"):
        passages(128, least=64).limits(2)

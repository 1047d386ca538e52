"""Where documents are cut into passages: by content alone, within limits, and the same around an edit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from actcache.errors import DocumentError, RecipeError
from actcache.format.passages import Passages, _minima, cut, passages, ranks_of

RNG = np.random.default_rng(7)
LEAST, MOST = 20, 80


def _ids(count: int) -> NDArray[np.int64]:
    return RNG.integers(0, 5000, count)


def _cut(ids: NDArray[np.int64], ranks: NDArray[np.uint8] | None = None) -> list[int]:
    return cut(ids, np.zeros(len(ids), np.uint8) if ranks is None else ranks, LEAST, MOST).tolist()


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
    assert count <= MOST or lengths.min() >= LEAST
    if count == 20_000:
        assert 1.6 * LEAST < lengths.mean() < 2.4 * LEAST


def test_a_document_that_fits_is_one_passage() -> None:
    assert _cut(_ids(MOST)) == [0, MOST]


@pytest.mark.parametrize("count", [1, 10, LEAST])
def test_an_insertion_at_the_front_makes_at_most_two_new_passages(count: int) -> None:
    """Three, now and then, where the first of the old ones were cut by their length alone."""
    new = []
    for _ in range(100):
        old = _ids(3000)
        before = set(_contents(old))
        new.append(sum(one not in before for one in _contents(np.concatenate([_ids(count), old]))))
    assert max(new) <= 3
    assert np.mean(np.array(new) > 2) <= 0.02


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
    assert all(len(one) // 8 >= LEAST for one in contents)


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

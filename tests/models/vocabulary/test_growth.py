"""How a vocabulary grows: counted by hand, fitted to numbers that follow the law, and told ahead of real text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actcache.errors import UsageError
from actcache.models.vocabulary import Growth, grown_vocabulary


def test_parts_are_counted(tokenizer: Any) -> None:
    texts = [f"word {i} of {i % 5} and {'more ' * (i % 4)}" for i in range(40)]
    tokens, used = grown_vocabulary(texts, tokenizer, 5, seed=3)
    order = np.random.default_rng(3).permutation(40)
    wanted = []
    for count in (2, 5, 10, 19, 40):  # from 40 // 16 documents on, each time as many times more
        ids = [i for j in order[:count] for i in tokenizer(texts[j], add_special_tokens=False)["input_ids"]]
        wanted.append((len(ids), len(set(ids))))
    assert (tokens[0], used[0]) == wanted[0]
    assert (tokens[-1], used[-1]) == wanted[-1]
    assert (np.diff(tokens) > 0).all()
    assert (np.diff(used) >= 0).all()


@pytest.mark.parametrize("size", [None, 30_522])
def test_what_follows_the_law_is_found_again(size: int | None) -> None:
    n = np.geomspace(1e3, 1e6, 7)
    law = Growth(9.0, 0.55, size)
    found = Growth.fit(n, law.used(n), size)
    assert found.scale == pytest.approx(9, rel=1e-6)
    assert found.exponent == pytest.approx(0.55, rel=1e-6)
    assert found.size == size
    if size is None:
        assert law.used(10_000) == pytest.approx(9 * 10_000**0.55)
    else:
        assert law.used(1e12) == pytest.approx(size)
        assert law.used(100) == pytest.approx(9 * 100**0.55, rel=0.01)  # while it is small, Heaps' own


def test_a_larger_sample_of_real_text_is_told_ahead(docstrings: list[str], tokenizer: Any) -> None:
    tokens, used = grown_vocabulary(docstrings, tokenizer, 10)
    known = np.flatnonzero(tokens <= tokens[-1] / 2)[-4:]
    told = {size: Growth.fit(tokens[known], used[known], size).used(tokens[-1]) for size in (None, len(tokenizer))}
    errors = {size: float(abs(of / used[-1] - 1)) for size, of in told.items()}
    assert errors[len(tokenizer)] < errors[None] < 0.25  # growth slows down: what has an end comes nearer


def test_wrong_counts_are_refused(tokenizer: Any) -> None:
    for tokens, used, size in (
        ([10], [5], None),
        ([10, 10], [5, 6], None),
        ([10, 20], [5, 21], None),
        ([10, 20], [5, 0], None),
        ([100, 200], [5, 30], 30),
        ([10, 20], [5], None),
    ):
        with pytest.raises(UsageError):
            Growth.fit(tokens, used, size)
    with pytest.raises(UsageError, match="too few"):
        grown_vocabulary(["one", "two"], tokenizer, 3)

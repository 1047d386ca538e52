"""Ragged blocks: how entries are cut into parts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.format.ragged import runs


def cut(sizes, most):
    return [(part.start, part.stop) for part in runs(np.array(sizes, np.int64), most)]


def test_runs_end_where_the_next_multiple_is_reached():
    assert cut([3, 3, 3, 3, 3], 6) == [(0, 2), (2, 4), (4, 5)]
    assert cut([10, 1, 1, 10], 4) == [(0, 1), (1, 3), (3, 4)]
    assert cut([5], 1) == [(0, 1)]
    assert cut([], 4) == []
    assert cut([0, 0], 4) == [(0, 2)]  # absent entries have no rows, and are items all the same


@given(st.lists(st.integers(0, 40)), st.integers(1, 50))
def test_runs_hold_every_item_once_and_are_no_larger_than_said(sizes, most):
    parts = cut(sizes, most)
    assert [i for begin, end in parts for i in range(begin, end)] == list(range(len(sizes)))
    assert all(end > begin for begin, end in parts)
    for begin, end in parts:
        assert sum(sizes[begin : end - 1]) < most + max(sizes)
    assert len(parts) <= 1 + sum(sizes) / most + 1


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
def test_runs_take_any_whole_numbers(dtype):
    assert list(runs(np.array([2, 2, 2], dtype), 4)) == [slice(0, 2), slice(2, 3)]

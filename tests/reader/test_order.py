"""The order of an epoch: each document once, on any number of ranks, taken up again anywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.reader.order import Order

orders = st.builds(
    Order,
    batch_size=st.integers(1, 9),
    max_tokens=st.none() | st.integers(1, 120),
    shuffle=st.booleans(),
    bucket=st.booleans(),
    seed=st.integers(0, 3),
)
lengths_of = st.lists(st.integers(1, 40), max_size=70).map(lambda values: np.array(values, np.int64))


@given(orders, lengths_of, st.integers(1, 5), st.integers(0, 3))
def test_each_document_once_and_as_many_batches_on_every_rank(order, lengths, ranks, epoch):
    plan = order.of_epoch(lengths, epoch)
    assert sorted(plan.sequence.tolist()) == list(range(len(lengths)))
    if 0 < len(lengths) < ranks:
        with pytest.raises(ValueError, match="ranks"):
            list(plan.rounds(ranks))
        return
    seen = []
    for batches in plan.rounds(ranks):
        assert len(batches) == ranks
        for begin, end in batches:
            assert begin < end
            seen += plan.sequence[begin:end].tolist()
            # One document more where there are too few for a round of their own.
            assert end - begin <= order.batch_size + (ranks > 1)
            longest = int(lengths[plan.sequence[begin:end]].max())
            if order.max_tokens and ranks == 1:
                assert longest * (end - begin) <= order.max_tokens or end - begin == 1
    assert seen == plan.sequence.tolist()


@given(orders, lengths_of, st.integers(1, 4), st.integers(1, 4), st.data())
def test_an_epoch_is_taken_up_again_at_any_round(order, lengths, ranks, others, data):
    plan = order.of_epoch(lengths, 0)
    if len(lengths) < max(ranks, others):
        return
    rounds = list(plan.rounds(ranks))
    for i, batches in enumerate(rounds):  # by as many ranks: exactly the same batches
        assert list(plan.rounds(ranks, batches[-1][1])) == rounds[i + 1 :]
    if rounds:  # by another number of ranks: each document that is left once
        done = data.draw(st.sampled_from(rounds))[-1][1]
        if len(lengths) - done in range(1, others):
            with pytest.raises(ValueError, match="left"):
                list(plan.rounds(others, done))
        else:
            rest = [j for batches in plan.rounds(others, done) for begin, end in batches for j in range(begin, end)]
            assert rest == list(range(done, len(lengths)))


@given(orders, lengths_of, st.integers(1, 4))
def test_dropping_the_last(order, lengths, ranks):
    order = Order(**{**vars(order), "drop_last": True})
    plan = order.of_epoch(lengths, 0)
    for batches in plan.rounds(ranks):
        assert len(batches) == ranks
        if not order.max_tokens:
            assert all(end - begin == order.batch_size for begin, end in batches)


def test_order_given_shuffled_and_by_length():
    lengths = np.random.default_rng(0).integers(1, 500, 5000)
    assert Order(32).of_epoch(lengths, 3).sequence.tolist() == list(range(5000))
    shuffled = [Order(32, shuffle=True, seed=1).of_epoch(lengths, epoch).sequence for epoch in (0, 1, 0)]
    assert not np.array_equal(shuffled[0], shuffled[1])
    np.testing.assert_array_equal(shuffled[0], shuffled[2])
    assert not np.array_equal(shuffled[0], Order(32, shuffle=True, seed=2).of_epoch(lengths, 0).sequence)

    def padding(order):
        plan = order.of_epoch(lengths, 0)
        padded = sum((j - i) * int(lengths[plan.sequence[i:j]].max()) for ((i, j),) in plan.rounds(1))
        return padded / lengths.sum() - 1

    assert padding(Order(32, shuffle=True)) > 0.8
    assert padding(Order(32, shuffle=True, bucket=True)) < 0.06
    assert padding(Order(32, bucket=True)) < 0.02
    bucketed = [Order(32, shuffle=True, bucket=True).of_epoch(lengths, epoch) for epoch in (0, 1)]
    firsts = [lengths[plan.sequence[i]] for plan in bucketed for i in plan.cuts[:-1]]
    assert np.corrcoef(firsts[:-1], firsts[1:])[0, 1] < 0.2  # batches do not come by length
    # Other companions in another epoch.
    assert not {tuple(bucketed[0].sequence[:32])} & {
        tuple(bucketed[1].sequence[i : i + 32]) for i in range(0, 4968, 32)
    }


def test_no_documents():
    plan = Order(4, max_tokens=10, shuffle=True, bucket=True).of_epoch(np.empty(0, np.int64), 0)
    assert list(plan.rounds(3)) == []

"""Rows mixed across documents, against a dictionary of all of them."""

from __future__ import annotations

import collections
import gc
import pickle
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import actcache
from actcache.errors import CorruptEntryError, MissingEntryError, ShapeError, UsageError
from actcache.reader.dealing import Deal, counted, remaining
from actcache.reader.mixing import Mixing, documents_mixed
from actcache.reader.rows import RowReader
from tests.support import HIDDEN, ids, key, length, put, recipe, rows

COUNT = 40
ROW = 4 * HIDDEN
EVERY = ("documents", "positions", "token_ids")


@pytest.fixture
def space(tmp_path):
    with actcache.open(tmp_path) as store, store.space(recipe()) as space:
        for first in range(0, COUNT, 10):  # four segments
            put(space, range(first, first + 10))
            space.flush()
        yield space


def keys(count=COUNT):
    return [key(n) for n in range(count)]


def small(**options):
    """Options of a reader whose buffer holds some documents alone."""
    return {"batch_size": 7, "buffer": 64 * ROW, "stretch": 8 * ROW, **options}


def check(batch, seen, given=None):
    """Compare each row of a batch with what was put; note which it is."""
    for row, document, position, token in zip(
        batch.rows, batch.documents, batch.positions, batch.token_ids, strict=True
    ):
        number = int(document) if given is None else given.index(int(document))
        np.testing.assert_array_equal(np.asarray(row), rows(number)[int(position)])
        assert int(token) == ids(number)[int(position)]
        seen[number, int(position)] += 1


ALL = {(n, p) for n in range(COUNT) for p in range(length(n))}


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("depth", [0, 2])
def test_each_row_comes_once_an_epoch_in_another_order(space, device, depth):
    reader = space.rows(keys(), beside=EVERY, device=device, depth=depth, **small())
    orders = []
    for _ in range(3):
        seen = collections.Counter()
        sizes = []
        for batch in reader:
            check(batch, seen)
            sizes.append(len(batch))
        assert seen == collections.Counter(ALL)
        assert sizes[:-1] == [7] * (len(ALL) // 7)
        assert len(sizes) == len(reader)
        orders.append(list(seen))
    assert orders[0] != orders[1] != orders[2]
    again = space.rows(keys(), beside=EVERY, **small())
    seen = collections.Counter()
    for batch in again:
        check(batch, seen)
    assert list(seen) == orders[0]
    assert (reader.stats().epochs, reader.stats().tokens) == (3, 3 * len(ALL))


def test_rows_alone_are_arrays_and_all_documents_are_the_default(space):
    batches = list(space.rows(batch_size=50))
    assert {type(batch) for batch in batches} == {np.ndarray}
    found = np.concatenate(batches)
    wanted = np.concatenate([rows(n) for n in range(COUNT)])
    np.testing.assert_array_equal(np.sort(found.view("V32").ravel()), np.sort(wanted.view("V32").ravel()))


def test_batches_that_are_kept_stay_what_they_are(space):
    reader = space.rows(keys(), beside=EVERY, **small())
    kept = [batch for _ in range(2) for batch in reader]
    seen = collections.Counter()
    for batch in kept:
        check(batch, seen)
    assert set(seen.values()) == {2}


def test_numbers_of_the_caller_are_delivered(space):
    given = [100 - n for n in range(COUNT)]
    seen = collections.Counter()
    for batch in space.rows(keys(), documents=given, beside=EVERY, **small()):
        check(batch, seen, given)
    assert set(seen) == ALL


# --- leaving out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_is_excluded_does_not_come(space, ranks):
    tokens = [int(ids(n)[0]) for n in range(0, COUNT, 3)] + [-5]
    exclude = {"token_ids": tokens, "positions": [1, -1]}
    wanted = {(n, p) for n, p in ALL if p != 1 and p != length(n) - 1 and int(ids(n)[p]) not in tokens}
    seen = collections.Counter()
    counts = []
    for rank in range(ranks):
        reader = space.rows(keys(), exclude=exclude, beside=EVERY, ranks=(rank, ranks), **small())
        batches = list(reader)
        for batch in batches:
            check(batch, seen)
        counts.append(len(batches))
        assert len(reader) == len(batches)
    assert seen == collections.Counter(wanted)
    assert len(set(counts)) == 1


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("sites", [1, 2])
def test_rows_of_great_norms_are_left_out(tmp_path, ranks, sites):
    """Attention sinks: a few rows a hundred times as long as others, at any site."""
    with actcache.open(tmp_path) as store:
        spaces = [store.space(recipe(layer=layer)) for layer in range(1, sites + 1)]
        arrays = [[np.random.default_rng([n, s]).standard_normal((8, HIDDEN)).astype(np.float32) for n in range(30)]
                  for s in range(sites)]  # fmt: skip
        sinks = {(3 + s, s) for s in range(sites)} | {(9, 7)}
        for number, position in sinks:
            arrays[position % sites][number][position] *= 100
        for space, given in zip(spaces, arrays, strict=True):
            space.put([key(n) for n in range(30)], given)
        mean = [np.linalg.norm(np.concatenate(given), axis=1).mean() for given in arrays]
        wanted = {
            (n, p)
            for n in range(30)
            for p in range(8)
            if all(np.linalg.norm(given[n][p]) <= 5 * one for given, one in zip(arrays, mean, strict=True))
        }
        assert len(wanted) == 240 - len(sinks)
        found = []
        for rank in range(ranks):
            reader = RowReader(
                spaces if sites > 1 else spaces[0], [key(n) for n in range(30)], batch_size=16,
                exclude={"norm": 5}, beside=EVERY[:2], ranks=(rank, ranks), buffer=sites * 80 * ROW,
            )  # fmt: skip
            for batch in reader:
                found += zip(batch.documents.tolist(), batch.positions.tolist(), strict=True)
        assert collections.Counter(found) == collections.Counter(wanted)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("sites", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "float8_e4m3", "bfloat16+zstd", "int8+zstd"])
def test_normalized_rows_are_alike(tmp_path, device, sites, dtype):
    with actcache.open(tmp_path) as store:
        spaces = [store.space(recipe(layer=layer, dtype=dtype)) for layer in range(1, sites + 1)]
        for number, space in enumerate(spaces):
            put(space, range(COUNT))
            space.put(
                [key(n) for n in range(COUNT)], [rows(n) * (number + 2) + 7 for n in range(COUNT)], overwrite=True
            )
        given = spaces if sites > 1 else spaces[0]
        for kind in ("mean-norm", "standard"):
            batches = [np.asarray(batch) for batch in RowReader(given, normalize=kind, device=device, batch_size=50)]
            found = np.concatenate(batches).reshape(-1, sites, HIDDEN)
            assert found.dtype == np.float32
            if kind == "mean-norm":
                norms = np.linalg.norm(found, axis=2).mean(axis=0)
                np.testing.assert_allclose(norms, HIDDEN**0.5, rtol=1e-5)
            else:
                np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-5)
                np.testing.assert_allclose(found.std(axis=0), 1, rtol=1e-5)


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclude", [None, {"token_ids": [int(ids(3)[0])], "positions": [2]}])
def test_a_reader_goes_on_at_exactly_the_next_row(space, exclude):
    options = small(exclude=exclude, beside=EVERY)
    whole = [batch.rows.copy() for _ in range(2) for batch in space.rows(keys(), **options)]
    reader, states = space.rows(keys(), **options), []
    whole = []
    states.append(reader.state_dict())
    for _ in range(2):
        for batch in reader:
            whole.append(batch.rows.copy())
            states.append(reader.state_dict())
    other = space.rows(keys(), **options)
    for number, state in enumerate(states[:-1]):
        other.load_state_dict(pickle.loads(pickle.dumps(state)))  # noqa: S301
        following = []
        while len(following) < 3 and number + len(following) < len(whole):
            following += [batch.rows.copy() for batch in (next(other, None) for _ in range(1)) if batch is not None]
        for found, wanted in zip(following, whole[number:], strict=False):
            np.testing.assert_array_equal(found, wanted)


def test_another_number_of_ranks_goes_on(space):
    """Three ranks, then two, then one: no row twice, none left out."""
    seen = collections.Counter()
    state = None
    for ranks, batches in ((3, 4), (2, 3), (2, 2), (1, None)):
        readers = [
            space.rows(keys(), ranks=(rank, ranks), beside=EVERY, **small(batch_size=4)) for rank in range(ranks)
        ]
        for reader in readers:
            if state is not None:
                reader.load_state_dict(state)
            for number, batch in enumerate(iter(lambda reader=reader: next(reader, None), None)):
                check(batch, seen)
                if batches is not None and number + 1 == batches:
                    break
        states = [reader.state_dict() for reader in readers]
        assert all(one == states[0] for one in states)
        state = states[0]
    assert seen == collections.Counter(ALL)
    assert state["epoch"] == 1


def test_for_ever_goes_from_epoch_to_epoch(space):
    reader = space.rows(keys(), forever=True, beside=EVERY, drop_last=True, **small())
    seen = collections.Counter()
    for _ in range(2 * (len(ALL) // 7)):
        batch = next(reader)
        assert len(batch) == 7
        check(batch, seen)
    assert max(seen.values()) == 2
    assert reader.state_dict()["epoch"] == 1
    reader.set_epoch(5)
    next(reader)
    assert reader.state_dict()["epoch"] == 5
    reader.close()
    reader.close()
    assert len(next(reader)) == 7


def test_a_reader_is_picklable_and_goes_on_elsewhere(space):
    reader = space.rows(keys(), **small())
    first = [next(reader).copy() for _ in range(3)]
    other = pickle.loads(pickle.dumps(reader))  # noqa: S301
    np.testing.assert_array_equal(next(other), next(reader))
    again = space.rows(keys(), **small())
    np.testing.assert_array_equal(first[0], next(again))
    other._documents.sources[0].close()


# --- several sites ----------------------------------------------------------------------------------------------------


def test_several_spaces_are_aligned_row_by_row(tmp_path):
    with actcache.open(tmp_path) as store:
        spaces = [store.space(recipe(layer=layer)) for layer in (1, 2, 3)]
        for number, one in enumerate(spaces):
            shuffled = np.random.default_rng(number).permutation(COUNT).tolist()
            one.put([key(n) for n in shuffled], [rows(n) + 1000 * number for n in shuffled], [ids(n) for n in shuffled])
            one.flush()
        seen = collections.Counter()
        for batch in RowReader(spaces, keys(), beside=EVERY, **small(buffer=3 * 64 * ROW)):
            assert batch.rows.shape[1:] == (3, HIDDEN)
            for site in range(1, 3):
                np.testing.assert_array_equal(batch.rows[:, site], batch.rows[:, 0] + 1000 * site)
            batch.rows = batch.rows[:, 0]
            check(batch, seen)
        assert seen == collections.Counter(ALL)
        # Spaces of other documents.
        spaces[1].put([key(999)], [rows(5)], [ids(5)])
        with pytest.raises(MissingEntryError, match="other documents"):
            RowReader([spaces[1], spaces[0]])
        spaces[2].put([key(999)], [rows(6)], [ids(6)])
        with pytest.raises(ShapeError, match=f"{length(5)} rows in the first one and {length(6)}"):
            RowReader([spaces[1], spaces[2]], [key(999)])
        with store.space(recipe(hidden_size=2)) as narrow, pytest.raises(ShapeError, match="2 numbers of float32"):
            RowReader([spaces[0], narrow])
        with pytest.raises(UsageError):
            RowReader([])


# --- what a buffer buys -----------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=60),
    st.integers(30, 200),
    st.integers(1, 50),
    st.integers(0, 3),
)
def test_a_mix_fits_its_buffer_and_each_document_is_in_one(lengths, capacity, stretch, epoch):
    mixing = Mixing(np.array(lengths), capacity, stretch, 0)
    mixes = mixing.of_epoch(epoch)
    members = [mixes.documents(number) for number in range(len(mixes))]
    assert sorted(np.concatenate(members).tolist()) == list(range(len(lengths)))
    totals = [int(mixing.lengths[some].sum()) for some in members]
    assert max(totals) <= capacity
    assert mixes.totals(mixing.lengths).tolist() == totals


def test_documents_mixed_is_what_is_found():
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 49, 500)
    of_row = np.repeat(np.arange(500), lengths)
    found = [len(set(rng.permutation(of_row)[:256].tolist())) for _ in range(40)]
    assert abs(np.mean(found) / documents_mixed(lengths, 256) - 1) < 0.02
    assert documents_mixed(lengths, 10**6) == 500


def test_what_a_buffer_buys_is_what_batches_mix(tmp_path):
    """Documents in the order of a subject: a larger buffer mixes more of them, as many as the reader says."""
    count, each = 400, 16
    with actcache.open(tmp_path) as store, store.space(recipe(hidden_size=2)) as space:
        space.put_packed(
            [key(n) for n in range(count)], np.ones((count * each, 2), np.float32), np.arange(count + 1) * each
        )
        mixed = {}
        for share in (8, 2, 1):
            reader = space.rows(
                [key(n) for n in range(count)], batch_size=64, buffer=count * each * 8 // share, beside="documents"
            )
            found = [len(set(batch.documents.tolist())) for batch in reader if len(batch) == 64]
            assert abs(np.mean(found) / reader.documents_mixed - 1) < 0.05
            mixed[share] = np.mean(found)
        assert mixed[8] < mixed[2] < mixed[1]
        assert mixed[1] > 55  # of 64 rows


@given(st.integers(1, 200), st.integers(1, 5), st.integers(1, 9), st.booleans())
@settings(max_examples=200)
def test_deals_are_even_and_leave_nothing(total, ranks, size, drop):
    deal = Deal(total, ranks, size, drop)
    if total < ranks and not drop:
        with pytest.raises(UsageError):
            deal.sizes(0)
        return
    sizes = [deal.sizes(rank) for rank in range(ranks)]
    assert len({len(one) for one in sizes}) == 1
    assert all(0 < batch <= size + (size == 1) for one in sizes for batch in one)
    assert max(map(sum, sizes)) - min(map(sum, sizes)) <= 1
    if not drop:
        assert sum(map(sum, sizes)) == total
    spans = counted(np.array([total // 3, total - total // 3]))
    for rounds in range(deal.rounds + 1):
        left = sum(span.end - span.begin for span in remaining(spans, deal, rounds))
        assert left == sum(sum(one[rounds:]) for one in sizes)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(space):
    for options, error, said in (
        ({"buffer": 10 * ROW, "batch_size": 12}, UsageError, "buffer holds 10 rows of 32 bytes, and a batch has 12"),
        ({"buffer": 8 * ROW, "batch_size": 2}, UsageError, "a document has 9"),
        ({"batch_size": 0}, UsageError, "batch_size"),
        ({"beside": "colour"}, UsageError, "there is no column 'colour'"),
        ({"exclude": {"colour": 1}}, UsageError, "exclude is a mapping"),
        ({"exclude": {"norm": 0}}, UsageError, "norm is a number above 0"),
        ({"exclude": {"norm": True}}, UsageError, "norm is a number above 0"),
        ({"normalize": "loud"}, UsageError, "normalize"),
        ({"exclude": {"positions": [0.5]}}, UsageError, "positions"),
        ({"exclude": {"positions": list(range(9))}}, UsageError, "every row of these documents is left out"),
        ({"documents": [1]}, ShapeError, "give each a number"),
        ({"ranks": (3, 2)}, UsageError, "rank 3"),
    ):
        with pytest.raises(error, match=said):
            space.rows(keys(), **small(**options))
    with pytest.raises(MissingEntryError):
        space.rows([key(1000)])
    with pytest.raises(UsageError, match="no documents"):
        space.rows([])
    every = sorted({int(token) for n in range(COUNT) for token in ids(n)})
    for forever in (True, False):
        with pytest.raises(UsageError, match="every row of these documents is left out"):
            next(space.rows(keys(), exclude={"token_ids": every}, forever=forever, **small()))
    with pytest.raises(UsageError, match="every row"):
        len(space.rows(keys(), exclude={"token_ids": every}, **small()))
    with pytest.raises(UsageError, match="no batch is full"):
        next(space.rows(keys(1), batch_size=100, drop_last=True, forever=True))
    reader = space.rows(keys(), **small())
    for state in ({}, {**reader.state_dict(), "order": "0"}, {**reader.state_dict(), "epoch": -1}):
        with pytest.raises(UsageError):
            reader.load_state_dict(state)


def test_a_space_without_token_ids_gives_none(tmp_path):
    with actcache.open(tmp_path) as store, store.space(recipe()) as space:
        space.put([key(0)], [rows(0)])
        assert len(list(space.rows())) == 1
        for options in ({"beside": "token_ids"}, {"exclude": {"token_ids": [1]}}):
            with pytest.raises(UsageError, match="without token ids"):
                space.rows(**options)


def test_what_goes_wrong_meanwhile_is_said(space):
    reader = space.rows(keys(), **small(depth=0))
    next(reader)
    space.delete(keys())
    with pytest.raises(MissingEntryError, match="deleted since"):
        list(reader)
    put(space, range(COUNT), version=1)
    with pytest.raises(ShapeError, match="replaced by one of another length"):
        list(reader)


def test_a_flipped_byte_is_never_delivered(tmp_path):
    with actcache.open(tmp_path) as store, store.space(recipe()) as space:
        put(space, range(COUNT))
    (segment,) = tmp_path.glob("spaces/*/segments/*")
    data = bytearray(segment.read_bytes())
    data[data.index(rows(5).tobytes())] ^= 1
    segment.write_bytes(data)
    with actcache.open(tmp_path) as store, store.space(recipe()) as space:
        with pytest.raises(CorruptEntryError) as caught:
            list(space.rows(keys(), **small()))
        assert caught.value.keys == [key(5)]


def test_a_reader_that_nobody_holds_goes_without_the_collector(space):
    """The collector comes anywhere: in the middle of something for which the reader's thread waits."""
    reader = space.rows(keys(), depth=2, **small())
    next(reader)
    gone = weakref.ref(reader)
    gc.disable()
    try:
        del reader
        assert gone() is None
    finally:
        gc.enable()

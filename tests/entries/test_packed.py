"""``put_packed`` against ``put``, and both against what should be stored: however entries come, the same is there."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import actcache
from actcache.errors import (
    ActcacheError,
    CodecOverflowError,
    KeyFormatError,
    NonFiniteError,
    ReadOnlyError,
    ShapeError,
)
from actcache.format import codec
from actcache.format.ragged import offsets_of
from tests.support import HIDDEN, MEMORY_FOLDER, ids, key, make_store, recipe, rows
from tests.support.backends import each

EXTRAS = {"spans": ((2,), np.int64), "word_ids": ((), np.int16), "type_ids": ((), np.uint8)}
RECIPES = [recipe(), recipe(dtype="float16"), recipe(dtype="bfloat16"), recipe(dtype="bfloat16", via=("float16",))]


def arrays_of(number: int, version: int, seed: int) -> dict[str, np.ndarray]:
    """All arrays of a document, its rows of numbers that every codec rounds."""
    values = rows(number, version) + np.random.default_rng([seed, number, version]).random((1, HIDDEN))
    count = len(values)
    extras = {name: np.full((count, *trailing), number % 100, dtype) for name, (trailing, dtype) in EXTRAS.items()}
    return {"values": values, "token_ids": ids(number, version), **extras}


batches = st.lists(
    st.fixed_dictionaries(
        {
            "numbers": st.lists(st.integers(0, 30), unique=True, max_size=12),
            "version": st.integers(0, 2),
            "overwrite": st.booleans(),
            "names": st.sampled_from([(), ("token_ids",), ("token_ids", "spans", "word_ids", "type_ids")]),
            "dtype": st.sampled_from(["float16", "float32", "float64", "torch.float32", "torch.bfloat16"]),
            "as_array": st.booleans(),
            "flush": st.integers(0, 3),
        }
    ),
    min_size=1,
    max_size=8,
)


def as_given(array: np.ndarray, dtype: str) -> object:
    if not dtype.startswith("torch."):
        return array.astype(dtype)
    torch = pytest.importorskip("torch")
    return torch.from_numpy(array.astype(np.float32)).to(getattr(torch, dtype.removeprefix("torch.")))


def numbers_of(given: object, into: codec.Codec) -> np.ndarray:
    """Return what should be read again, entry by entry, by the codec alone."""
    array = given.float().numpy() if hasattr(given, "float") else given
    return into.decode(into.stored_rows(array))


@each(everyday={"hdf5", "lmdb"})
@settings(max_examples=settings().max_examples // 4)
@given(which=st.sampled_from(RECIPES), sequence=batches, blocks=st.sampled_from([200, 3000, 1 << 20]))
def test_packed_is_the_same(kind, which, sequence, blocks):
    into, oracle = codec.get(which.dtype, which.via), {}
    with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER) as folder, ExitStack() as stack:
        stores = [stack.enter_context(actcache.open(kind.url(f"{folder}/{name}"))) for name in ("lists", "packed")]
        lists, packed = (stack.enter_context(store.space(which, segment_bytes=blocks)) for store in stores)
        for seed, batch in enumerate(sequence):
            numbers, names = batch["numbers"], batch["names"]
            made = {n: arrays_of(n, batch["version"], seed) for n in numbers}
            values = [as_given(made[n]["values"], batch["dtype"]) for n in numbers]
            others = {name: [made[n][name] for n in numbers] for name in names}
            keys = [key(n) for n in numbers]
            count = lists.put(keys, values, overwrite=batch["overwrite"], **others)
            offsets = offsets_of(np.array([len(array) for array in values], np.int64))
            joined = np.concatenate([made[n]["values"] for n in numbers] or [np.empty((0, HIDDEN))])
            together = {
                name: np.concatenate(given or [np.empty((0, *EXTRAS.get(name, ((),))[0]), int)])
                for name, given in others.items()
            }
            if batch["as_array"]:
                keys = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)
            stored = as_given(joined, batch["dtype"])
            assert packed.put_packed(keys, stored, offsets, overwrite=batch["overwrite"], **together) == count
            for n, given_values in zip(numbers, values, strict=True):
                if n not in oracle or batch["overwrite"]:
                    oracle[n] = (numbers_of(given_values, into), {name: made[n][name] for name in names})
            if not batch["flush"]:
                lists.flush()
                packed.flush()
        for space in (lists, packed):
            hold(space, oracle)
            space.flush()
            hold(space, oracle)
        names = [key(n) for n in sorted(oracle)]
        assert (lists.stored_checksums(names) == packed.stored_checksums(names)).all()
        assert lists.usage().segments == packed.usage().segments  # the same blocks


def hold(space: actcache.Space, oracle: dict) -> None:
    assert len(space) == len(oracle)
    for number, entry in enumerate(space.get([key(n) for n in range(31)])):
        assert (entry is not None) == (number in oracle)
        if entry is not None:
            values, others = oracle[number]
            np.testing.assert_array_equal(entry.activations, values)
            found = entry.extras | ({} if entry.token_ids is None else {"token_ids": entry.token_ids})
            assert found.keys() == others.keys()
            for name, array in others.items():
                np.testing.assert_array_equal(found[name], array)


def spoiled(row: int, column: int, value: float) -> np.ndarray:
    array = np.ones((9, HIDDEN))
    array[row, column] = value
    return array


FULL = {"values": np.ones((9, HIDDEN)), "offsets": [0, 3, 4, 9], "token_ids": np.arange(9)}


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"values": spoiled(5, 2, np.nan)}, NonFiniteError, f"{key(2).hex()} holds nan at token 1, column 2"),
        ({"values": spoiled(3, 7, -np.inf)}, NonFiniteError, f"{key(1).hex()} holds -inf at token 0, column 7"),
        ({"values": spoiled(0, 0, 7e4)}, CodecOverflowError, f"{key(0).hex()} holds 70000 at token 0, column 0"),
        ({"values": np.ones((9, HIDDEN), int)}, ShapeError, "activations must be floating point, not int64"),
        ({"values": np.ones((9, HIDDEN + 1))}, ShapeError, "must be \\[tokens >= 1, 8\\], not \\[3, 9\\]"),
        ({"values": np.ones((9, 2, 4))}, ShapeError, "values must be \\[tokens, hidden\\], not \\[9, 2, 4\\]"),
        ({"values": 5.0}, ShapeError, "values must be \\[tokens, hidden\\], not \\[\\]"),
        ({"values": None}, ShapeError, "no array"),
        ({"values": [[1.0], [1.0, 2.0]]}, ShapeError, "no array"),
        ({"offsets": [0, 3, 9]}, ShapeError, "3 keys and 3 offsets"),
        ({"offsets": [0, 3, 4, 8]}, ShapeError, "from 0 to the 9 rows of values, not from 0 to 8"),
        ({"offsets": [1, 3, 4, 9]}, ShapeError, "not from 1 to 9"),
        ({"offsets": [0, 5, 4, 9]}, ShapeError, "must rise"),
        ({"offsets": [0, 3, 3, 9]}, ShapeError, f"{key(1).hex()}: values must be .tokens >= 1, 8., not .0, 8."),
        ({"offsets": [0, 3.0, 4, 9]}, ShapeError, "whole numbers"),
        ({"offsets": None}, ShapeError, "offsets"),
        ({"token_ids": np.arange(8)}, ShapeError, "token_ids must be \\[9\\], not \\[8\\]"),
        ({"token_ids": np.ones(9)}, ShapeError, f"{key(0).hex()}: token_ids must be integers"),
        ({"token_ids": np.arange(9) + 2**31 - 6}, ShapeError, f"{key(2).hex()}: token_ids must fit int32"),
        ({"spans": np.ones((9, 3), int)}, ShapeError, "spans must be \\[9, 2\\], not \\[9, 3\\]"),
        ({"type_ids": np.full(9, 200)}, ShapeError, "type_ids must fit int8"),
        ({"keys": [key(0), key(1), key(0)]}, KeyFormatError, "twice"),
        ({"keys": [b"short", key(1), key(2)]}, KeyFormatError, "no key"),
        ({"keys": [key(0), key(1)]}, ShapeError, "2 keys and 4 offsets"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("blocks", [48, 1 << 20], ids=["many-blocks", "one-block"])
def test_one_that_is_wrong_stores_none(tmp_path, changes, error, says, blocks):
    """Also where the good ones before it fill blocks."""
    with actcache.open(tmp_path / "s") as store, store.space(recipe(dtype="float16"), segment_bytes=blocks) as space:
        with pytest.raises(error, match=says) as caught:
            space.put_packed(**{"keys": [key(0), key(1), key(2)], **FULL, **changes})
        assert isinstance(caught.value, ActcacheError)
        assert len(space) == 0
        space.flush()
        assert space.usage().segments == 0
        assert space.put_packed([key(n) for n in range(3)], **FULL) == 3
        assert [len(entry.activations) for entry in space.get([key(n) for n in range(3)])] == [3, 1, 5]


@pytest.mark.parametrize(
    "changes",
    [{"values": spoiled(5, 2, np.nan)}, {"values": spoiled(0, 0, 7e4)}, {"token_ids": np.arange(9) + 2**31 - 6}],
    ids=["nan", "overflow", "ids"],
)
def test_put_says_the_same(tmp_path, changes):
    keys, given = [key(n) for n in range(3)], FULL | changes
    with actcache.open(tmp_path / "s") as store, store.space(recipe(dtype="float16")) as space:
        said = []
        cut = {name: np.split(given[name], [3, 4]) for name in ("values", "token_ids")}
        for put in (
            lambda: space.put_packed(keys, **given),
            lambda: space.put(keys, cut["values"], cut["token_ids"]),
        ):
            with pytest.raises(ActcacheError) as caught:
                put()
            said.append((type(caught.value), str(caught.value)))
        assert said[0] == said[1]


def test_rows_with_fewer_digits_than_the_model_gave(tmp_path):
    torch = pytest.importorskip("torch")
    ours = recipe(dtype="float16", weights="0" * 64, compute_dtype="float32")
    with actcache.open(tmp_path / "s") as store, store.space(ours) as space:
        with pytest.raises(ShapeError, match=r"values holds bfloat16.*the digits are gone"):
            space.put_packed([key(0)], torch.ones(2, HIDDEN, dtype=torch.bfloat16), [0, 2])
        assert space.put_packed([key(0)], np.ones((2, HIDDEN), np.float16), [0, 2]) == 1


def test_what_stands_is_not_looked_at(tmp_path):
    """As by ``put``: entries that are skipped may hold anything."""
    with actcache.open(tmp_path / "s") as store, store.space(recipe()) as space:
        for number in (1, 4):
            space.put([key(number)], [np.full((2, HIDDEN), float(number))])
        values = np.repeat(np.arange(6.0), 2)[:, None] * np.ones(HIDDEN)
        values[[2, 8]] = np.nan
        keys, offsets = [key(n) for n in range(6)], np.arange(7) * 2
        assert space.put_packed(keys, values, offsets) == 4
        assert space.put_packed(keys, values, offsets) == 0
        for number, entry in enumerate(space.get(keys)):
            np.testing.assert_array_equal(entry.activations, np.full((2, HIDDEN), number))
        with pytest.raises(NonFiniteError, match=key(1).hex()):
            space.put_packed(keys, values, offsets, overwrite=True)


def test_the_arrays_are_the_callers_again(tmp_path):
    given = {
        "keys": np.frombuffer(key(0) + key(1), np.uint8).reshape(2, 32).copy(),
        "values": np.ones((3, HIDDEN), np.float32),
        "offsets": np.array([0, 1, 3]),
        "token_ids": np.arange(3, dtype=np.int32),
    }
    with actcache.open(tmp_path / "s") as store, store.space(recipe()) as space:
        space.put_packed(**given)
        for array in given.values():
            array[...] = 77
        space.flush()
        one, two = space.get([key(0), key(1)])
        assert (one.token_ids.tolist(), two.token_ids.tolist()) == ([0], [1, 2])
        assert (two.activations == 1).all()


def test_read_only(tmp_path):
    make_store(tmp_path / "s", range(3))
    with actcache.open(tmp_path / "s", "r") as store, store.space(recipe()) as space, pytest.raises(ReadOnlyError):
        space.put_packed([key(5)], np.ones((1, HIDDEN)), [0, 1])

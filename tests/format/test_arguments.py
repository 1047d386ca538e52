"""NumPy's numbers and truth values where Python's are taken; and what is neither."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import actcache
from actcache.errors import ActcacheError, DocumentError, KeyFormatError, RecipeError, UsageError
from actcache.format.arguments import whole, whole_numbers
from tests.support import key, make_store, recipe, rows


def test_a_dtype_is_a_name():
    """NumPy's and torch's dtypes are taken by their names; in an identity they would be none."""
    for name in ("dtype", "compute_dtype"):
        for value in (np.dtype("float16"), np.float16, torch.float16):
            made = recipe(**{name: value})
            assert made.identity()[name] == "float16"
            assert type(getattr(made, name)) is str
        for value in (None, np.dtype("int64"), np.float128, torch.int64, 16, float):
            with pytest.raises(RecipeError, match=f"^{name} .* is not one of"):
                recipe(**{name: value})
        assert recipe(**{name: np.str_("float16")}).fingerprint == recipe(**{name: "float16"}).fingerprint


WHOLE = [3, np.int64(3), np.int32(3), np.uint8(3)]
NOT_WHOLE = [3.0, np.float64(3), True, np.True_, "3", None, np.timedelta64(3), np.array([3])]


@pytest.mark.parametrize("three", WHOLE, ids=lambda value: type(value).__name__)
def test_a_recipe_of_numpys_numbers_is_the_same(three):
    same = recipe(layer=three, hidden_size=three, max_length=three, special_tokens=np.bool_(True))
    plain = recipe(layer=3, hidden_size=3, max_length=3)
    assert same.fingerprint == plain.fingerprint
    assert json.loads(json.dumps(same.to_json())) == plain.to_json()
    assert all(type(number) is int for number in (same.layer, same.hidden_size, same.max_length))
    assert same.special_tokens is True


def test_a_configuration_of_numpys_numbers_is_the_same():
    given = {"heads": np.int64(4), "eps": np.float64(1e-5), "on": np.bool_(False), "parts": [np.int8(1), (np.int8(2),)]}
    plain = {"heads": 4, "eps": 1e-5, "on": False, "parts": [1, [2]]}
    assert recipe(config=given).fingerprint == recipe(config=plain).fingerprint
    assert recipe(config={"part": given}).config == {"part": plain}


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_what_is_no_whole_number(value, tmp_path):
    for name in ("layer", "hidden_size", "max_length"):
        if (name, value) != ("max_length", None):
            with pytest.raises(RecipeError, match=name):
                recipe(**{name: value})
    for lengths in ((value,), (8, value))[value is None :]:  # windows() are as long as the model takes
        with pytest.raises(DocumentError):
            actcache.windows(*lengths)
    with actcache.open(tmp_path / "store") as store:
        with pytest.raises(UsageError, match="segment_bytes"):
            store.space(recipe(), segment_bytes=value)
        with store.space(recipe()) as space:
            space.put([key(0)], [rows(0)])
            for options in ({"batch_size": value}, {"seed": value}, {"depth": value}, {"ranks": (value, 4)}):
                with pytest.raises(UsageError):
                    space.reader([key(0)], **options)
            if value is not None:
                with pytest.raises(UsageError, match="sample"):
                    space.verify(sample=value)
            with pytest.raises(UsageError, match="target_bytes"):
                space.compact(target_bytes=value)
            with pytest.raises(UsageError, match="epoch"):
                space.reader([key(0)]).set_epoch(value)


@pytest.mark.parametrize("value", [1, 0, None, "yes", np.int64(1)], ids=repr)
def test_what_is_no_truth_value(value, tmp_path):
    with pytest.raises(RecipeError, match="special_tokens"):
        recipe(special_tokens=value)
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        for name in ("shuffle", "bucket", "drop_last"):
            with pytest.raises(UsageError, match=name):
                space.reader([], **{name: value})


def test_readers_of_numpys_numbers_go_on_with_each_others_states(tmp_path):
    make_store(tmp_path / "store", range(12))
    keys = [key(n) for n in range(12)]
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        plain = space.reader(keys, batch_size=4, max_tokens=20, shuffle=True, bucket=True, seed=5, drop_last=False)
        other = space.reader(
            np.stack([np.frombuffer(one, np.uint8) for one in keys]),
            batch_size=np.int64(4),
            max_tokens=np.uint16(20),
            shuffle=np.True_,
            bucket=np.bool_(True),
            seed=np.int32(5),
            drop_last=np.False_,
            depth=np.int8(1),
            ranks=(np.int64(0), np.int64(1)),
            documents=np.arange(12, dtype=np.uint8),
        )
        other.set_epoch(np.int64(2))
        plain.set_epoch(2)
        next(iter(other))
        state = json.loads(json.dumps(other.state_dict()))
        plain.load_state_dict(state)
        assert [batch.documents.tolist() for batch in plain] == [
            batch.documents.tolist() for batch in list(_whole_epoch(other))[1:]
        ]
        assert space.verify(sample=np.int64(3)).entries == 3
        space.compact(target_bytes=np.int64(1 << 20))
    spec = actcache.windows(np.int64(8), np.int32(2))
    assert spec == actcache.windows(8, 2)
    assert spec.keys(key(0), 2) == actcache.windows(8, 2).keys(key(0), 2)


def _whole_epoch(reader):
    reader.set_epoch(0)
    reader.set_epoch(2)
    return reader


def test_numbers_are_never_cut():
    assert whole("n", np.int64(5), 5) == 5
    with pytest.raises(UsageError, match="n is a whole number of 5 or more"):
        whole("n", 4, 5)
    for given in ([1, 2], (1, 2), range(1, 3), {1, 2}, np.array([1, 2], np.uint8), iter([1, 2])):
        assert whole_numbers("n", given).tolist() == [1, 2]
    assert whole_numbers("n", []).dtype == np.int64
    for bad in ([1.5], [True, 2], [True], np.array([True]), "12", 5, [[1]], [None], [1, [2]]):
        with pytest.raises(UsageError, match="n are whole numbers"):
            whole_numbers("n", bad)
    with actcache.open("memory://plain-numbers") as store, store.space(recipe()) as space:
        space.put([key(0)], [rows(0)])
        with pytest.raises(UsageError, match="documents are whole numbers"):
            space.reader([key(0)], documents=[0.5])


def test_an_iterator_of_keys_that_is_used_up(tmp_path):
    make_store(tmp_path / "store", range(3))
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        keys = (key(n) for n in range(3))
        assert len(space.reader(keys, batch_size=1)) == 3
        for use in (space.reader, space.get, space.delete, space.lengths):
            with pytest.raises(KeyFormatError, match="the iterator gave no keys"):
                use(keys)
        assert len(space.reader([])) == 0  # none, on purpose
        assert len(space) == 3
        with pytest.raises(ActcacheError):
            store.put_collection("none", keys)

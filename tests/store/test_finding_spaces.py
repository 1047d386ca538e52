"""From a store to its spaces without a model, and what they print."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import actcache
from actcache import errors
from tests.support import ids, key, recipe, rows


@pytest.fixture
def store(tmp_path):
    with actcache.open(tmp_path / "store") as store:
        for layer in (3, 6):
            store.space(recipe(layer=layer))
        yield store


def test_by_fields(store):
    assert [space.recipe.layer for space in store.spaces(layer=6)] == [6]
    assert [space.recipe for space in store.spaces()] == store.recipes() == [space.recipe for space in store]
    assert store.spaces(layer=6, model="another") == []
    dtype = recipe().dtype
    assert len(store.spaces(dtype=getattr(torch, dtype))) == len(store.spaces(dtype=np.dtype(dtype))) == len(store) == 2
    with pytest.raises(errors.UsageError, match="no field banana"):
        store.spaces(banana=1)


def test_by_the_beginning_of_a_fingerprint(store):
    wanted = recipe(layer=3)
    assert store[wanted.fingerprint[:12]].recipe == wanted
    assert store[wanted.fingerprint.upper()].recipe == wanted
    with pytest.raises(errors.SpaceNotFoundError, match=wanted.fingerprint):
        store["zz"]
    for wrong in ("", 3, None):
        with pytest.raises(errors.UsageError, match="beginning of a fingerprint"):
            store[wrong]
    store.driver.spaces = lambda: [wanted.fingerprint, wanted.fingerprint[:4] + "0" * 28]
    with pytest.raises(errors.UsageError, match="begins 2 spaces"):
        store[wanted.fingerprint[:4]]


def test_a_store_without_spaces_is_one(tmp_path):
    with actcache.open(tmp_path / "empty") as store:
        assert store
        assert len(store) == 0
        assert list(store) == []
    assert "closed" in repr(store)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_batch_prints_one_line(tmp_path, layout):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        space.put([key(i) for i in range(5)], [rows(i) for i in range(5)], [ids(i) for i in range(5)])
        for device, where in ((None, "NumPy"), ("cpu", "cpu")):
            batch = next(iter(space.reader([key(i) for i in range(5)], device=device, layout=layout, depth=0)))
            assert "5 entries" in repr(batch)
            assert where in repr(batch)
            assert str(list(batch.activations.shape)) in repr(batch)
            assert len(repr(batch)) < 200


def test_dtypes_as_people_type_them():
    for given in (torch.float16, np.float16, np.dtype("float16"), "float16"):
        made = actcache.Recipe(model="m", layer=np.int64(3), hidden_size=8, dtype=given, compute_dtype=torch.float32)
        assert (made.dtype, made.compute_dtype, made.layer) == ("float16", "float32", 3)
        assert made == actcache.Recipe(model="m", layer=3, hidden_size=8)
    for wrong in (torch.int64, np.float64, "floating"):
        with pytest.raises(errors.RecipeError, match=r"is not one of float16, float32"):
            actcache.Recipe(model="m", layer=3, hidden_size=8, dtype=wrong)


def test_what_there_is_shows():
    assert {"Recycler", "Recyclers", "open", "Store"} <= set(dir(actcache))

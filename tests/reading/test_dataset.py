"""Entries through torch's loaders, with and without workers, and through the Trainer."""

from __future__ import annotations

import numpy as np
import pytest
from torch.utils.data import DataLoader

import actcache
from tests.support import key, length, put, recipe, rows

COUNT = 30


@pytest.fixture
def reader(tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        put(space, range(COUNT))
        space.flush()
        yield space.reader([key(n) for n in range(COUNT)], labels=np.arange(COUNT), batch_size=4)


def check(batches):
    seen = []
    for batch in batches:
        for i, n in enumerate(batch["labels"].tolist()):
            seen.append(n)
            assert int(batch["attention_mask"][i].sum()) == length(n)
            np.testing.assert_array_equal(batch["activations"][i, : length(n)].numpy(), rows(n))
    return seen


def test_items(reader):
    data = reader.dataset()
    assert len(data) == COUNT
    np.testing.assert_array_equal(data[3].activations[0].numpy(), rows(3))
    np.testing.assert_array_equal(data[-1].activations[0].numpy(), rows(COUNT - 1))
    with pytest.raises(IndexError):
        data[COUNT]


@pytest.mark.parametrize("how", [{}, {"num_workers": 2, "multiprocessing_context": "fork"}])
def test_a_loader(reader, how):
    data = reader.dataset()
    loader = DataLoader(data, batch_size=7, shuffle=True, collate_fn=data.collate, **how)
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == 5
        assert sorted(check(batches)) == list(range(COUNT))


def test_a_loader_whose_workers_are_spawned(reader):
    data = reader.dataset()
    loader = DataLoader(data, batch_size=7, collate_fn=data.collate, num_workers=2, multiprocessing_context="spawn")
    assert sorted(check(loader)) == list(range(COUNT))


def test_it_is_one_read_a_batch(reader, monkeypatch):
    data = reader.dataset()
    reads = []
    read = data._work.source.read_into

    def counting(keys, *args, **options):
        reads.append(len(keys))
        return read(keys, *args, **options)

    monkeypatch.setattr(data._work.source, "read_into", counting)
    list(DataLoader(data, batch_size=10, collate_fn=data.collate))
    assert reads == [10, 10, 10]


def test_a_loader_that_asks_one_by_one_is_told(reader):
    data = reader.dataset()
    with pytest.raises(ValueError, match="one by one"):
        data.collate([data[0], data[1]])

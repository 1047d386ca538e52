"""Labels of documents and of tokens, in both layouts and through a loader."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import actcache
from actcache.errors import ShapeError
from tests.support import key, length, put, recipe

COUNT = 30
KEYS = [key(n) for n in range(COUNT)]
LABELS = [np.arange(length(n)) + 100 * n for n in range(COUNT)]  # one a token


@pytest.fixture
def space(tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        put(space, range(COUNT))
        space.flush()
        yield space


def check(batch):
    for i, n in enumerate(np.asarray(batch.documents).tolist()):
        if isinstance(batch, actcache.entries.batch.PackedBatch):
            found = batch.labels[int(batch.offsets[i]) : int(batch.offsets[i + 1])]
        else:
            found = batch.labels[i, : length(n)]
            assert (np.asarray(batch.labels[i, length(n) :]) == -100).all()
            assert tuple(batch.labels.shape) == tuple(batch.attention_mask.shape)
        np.testing.assert_array_equal(found, LABELS[n])
    return len(batch)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("as_given", [list, tuple, lambda x: [torch.tensor(one) for one in x]], ids=range(3))
def test_labels_of_tokens(space, layout, device, as_given):
    options = {"batch_size": 7, "shuffle": True, "layout": layout, "device": device}
    reader = space.reader(KEYS, labels=as_given(LABELS), **options)
    assert sum(check(batch) for _ in range(2) for batch in reader) == 2 * COUNT
    assert "int64" in str(next(iter(reader)).labels.dtype)


def test_documents_that_are_skipped_take_their_labels_along(space):
    keys = [key(1000), *KEYS[:4], key(1001), *KEYS[4:]]
    labels = [np.zeros(3), *LABELS[:4], np.zeros(50), *LABELS[4:]]
    numbers = [-1, *range(4), -1, *range(4, COUNT)]
    reader = space.reader(keys, labels=labels, documents=numbers, batch_size=4, on_missing="skip")
    assert sum(check(batch) for batch in reader) == COUNT


def test_entries_of_equal_lengths(space):
    """A rectangle of labels is one of tokens where it has as many columns as each entry has tokens, else not."""
    same = [n for n in range(COUNT) if length(n) == 4]
    assert len(same) > 2
    keys = [key(n) for n in same]
    labels = [LABELS[n] for n in same]
    (packed,) = space.reader(keys, labels=labels, documents=same, layout="packed")
    assert packed.labels.shape == (4 * len(same),)
    (packed,) = space.reader(keys, labels=np.stack(labels), layout="packed")  # an array is as it is
    assert packed.labels.shape == (len(same), 4)
    (batch,) = space.reader(KEYS, labels=[[n, 1, 0] for n in range(COUNT)])  # of several classes
    assert batch.labels.shape == (COUNT, 3)


def test_what_does_not_fit_is_refused(space):
    wrong = [*LABELS[:7], LABELS[7][:-1] if length(7) > 1 else np.zeros(9), *LABELS[8:]]
    for labels, message in (
        (wrong, f"position 7: {length(7)} tokens and {len(wrong[7])} labels"),
        (LABELS[1:], "give one a document|no array"),
        ([["a"], ["b", "c"]] * (COUNT // 2), "position|numbers"),
        (["a"] * COUNT, "numbers"),
        (3, "give one a document"),
    ):
        with pytest.raises(ShapeError, match=message):
            space.reader(KEYS, labels=labels)
    with pytest.raises(ShapeError, match="position"):
        space.reader(KEYS, documents=[1, 2])


def test_an_entry_that_is_replaced_meanwhile(space):
    reader = space.reader(KEYS, labels=LABELS, batch_size=10, depth=0)
    put(space, [15], version=1, overwrite=True)
    iterator = iter(reader)
    next(iterator)
    with pytest.raises(ShapeError, match=f"position 15: {length(15, 1)} tokens and {length(15)}"):
        next(iterator)


def test_a_loader(space):
    data = space.reader(KEYS, labels=LABELS).dataset()
    seen = 0
    for batch in DataLoader(data, batch_size=7, collate_fn=data.collate):
        for labels, mask in zip(batch["labels"], batch["attention_mask"], strict=True):
            np.testing.assert_array_equal(labels[mask.bool()], LABELS[seen])
            assert (labels[~mask.bool()] == -100).all()
            seen += 1
    assert seen == COUNT

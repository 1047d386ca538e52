"""Entries through torch's loaders, with and without workers, and through the Trainer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    Subset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)
from transformers import DefaultDataCollator, default_data_collator

import actcache
from actcache.entries.batch import Batch, Inputs
from actcache.errors import ShapeError, UsageError
from actcache.reader.epoch import MissComputer
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


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_is_told_nothing(reader, workers):
    """torch's default_collate puts items together by their own ``collate``, and other things as ever."""
    data = reader.dataset()
    options = {"num_workers": workers, "multiprocessing_context": "spawn"} if workers else {}
    assert check(DataLoader(data, batch_size=7, **options)) == list(range(COUNT))
    assert check(DataLoader(ConcatDataset([data, data]), batch_size=13)) == [*range(COUNT)] * 2
    assert check(DataLoader(data, batch_size=None)) == list(range(COUNT))
    pairs = next(iter(DataLoader([(data[n], n) for n in range(4)], batch_size=4)))
    assert check([pairs[0]]) == pairs[1].tolist() == [0, 1, 2, 3]
    assert default_collate([{"a": torch.ones(2)}] * 3)["a"].shape == (3, 2)


@pytest.mark.parametrize("collator", [default_data_collator, DefaultDataCollator(return_tensors="np")])
def test_the_trainers_own_collator_is_told_of_collate(reader, collator):
    with pytest.raises(UsageError, match=r"data_collator=dataset\.collate"):
        collator([reader.dataset()[n] for n in range(3)])


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


def test_slices_lists_and_arrays_are_read_as_one_batch(reader):
    data = reader.dataset()
    for which, numbers in (
        (slice(2, 9, 3), [2, 5, 8]),
        (slice(-2, None), [COUNT - 2, COUNT - 1]),
        ([4, -1, 4], [4, COUNT - 1, 4]),
        (np.array([7]), [7]),
        (torch.tensor([3, 1]), [3, 1]),
    ):
        assert check([data[which].model_inputs()]) == numbers
    for wrong in (np.int64(COUNT), [0, COUNT], -COUNT - 1):
        with pytest.raises(IndexError):
            data[wrong]
    with pytest.raises(TypeError):
        data["3"]
    assert data[np.int64(3)].labels.tolist() == data[torch.tensor(3)].labels.tolist() == [3]


def test_a_mask_of_truth_values_chooses(reader):
    data = reader.dataset()
    even = np.arange(COUNT) % 2 == 0
    for mask in (even, torch.from_numpy(even), even.tolist()):
        assert check([data[mask].model_inputs()]) == list(range(0, COUNT, 2))
    for wrong in (even[1:], [True, False]):
        with pytest.raises(IndexError, match=f"{len(wrong)} truth values for {COUNT} documents"):
            data[wrong]
    for wrong in (True, np.True_, torch.tensor(True), 1.5, "3", None, [1.0, 2.0], [[1, 2]], ["3"], [True, 2.5]):
        with pytest.raises(TypeError, match="mask of truth values"):
            data[wrong]
    with pytest.raises(TypeError, match="mask of truth values"):
        list(DataLoader(Subset(data, even), batch_size=3))


def test_an_item_is_read_when_something_is_asked_of_it(reader, monkeypatch):
    data = reader.dataset()
    for item in (data[5], pickle.loads(pickle.dumps(data[5]))):  # noqa: S301
        assert isinstance(item, Mapping)
        assert sorted(item) == ["activations", "attention_mask", "labels", "token_ids"]
        assert len(item["input_ids"]) == length(5)
        np.testing.assert_array_equal(item["activations"][0].numpy(), rows(5))
        with pytest.raises(KeyError):
            item["nothing"]
        with pytest.raises(AttributeError):
            item.nothing  # noqa: B018
    monkeypatch.setattr(data._work.source, "read_into", None)
    assert [len(item["input_ids"]) for item in data] == [length(n) for n in range(COUNT)]


def test_it_is_a_data_set_of_torch(reader):
    data = reader.dataset()
    assert isinstance(data, Dataset)
    first, second = random_split(data, [20, 10])
    loaders = [DataLoader(part, batch_size=6, collate_fn=data.collate) for part in (first, second)]
    assert sorted(check(loaders[0]) + check(loaders[1])) == list(range(COUNT))
    some = Subset(data, [9, 3, 27])
    assert check(DataLoader(some, batch_size=3, collate_fn=data.collate)) == [9, 3, 27]
    weighted = WeightedRandomSampler([1.0] * 5 + [0.0] * 25, 12, generator=torch.Generator().manual_seed(1))
    assert set(check(DataLoader(data, batch_size=4, sampler=weighted, collate_fn=data.collate))) <= set(range(5))


@pytest.mark.parametrize("workers", [0, 2])
def test_data_sets_of_several_readers_put_together(tmp_path, workers):
    """Each is read by one batched read; batches have the order that the sampler asks for."""
    with actcache.open(tmp_path / "one") as one, actcache.open(f"zarr:{tmp_path}/two") as two:
        spaces = [one.space(recipe()), two.space(recipe())]
        for space, numbers in zip(spaces, (range(12), range(12, COUNT)), strict=True):
            put(space, numbers)
            space.flush()
        parts = [
            space.reader([key(n) for n in numbers], labels=np.array(numbers)).dataset()
            for space, numbers in zip(spaces, (range(12), range(12, COUNT)), strict=True)
        ]
        both = parts[0] + parts[1]
        assert isinstance(both, ConcatDataset)
        options = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
        seen = check(DataLoader(both, batch_size=7, shuffle=True, collate_fn=parts[1].collate, **options))
        assert sorted(seen) == list(range(COUNT))
        backwards = DataLoader(both, batch_size=7, sampler=range(COUNT - 1, -1, -1), collate_fn=parts[0].collate)
        assert check(backwards) == list(range(COUNT - 1, -1, -1))


def test_labels_of_tokens_of_several_readers(reader):
    space = reader._work.source
    labels = [np.arange(length(n)) for n in range(COUNT)]
    parts = [space.reader([key(n)], labels=[labels[n]]).dataset() for n in (0, 1, 2)]
    batch = next(iter(DataLoader(ConcatDataset(parts), batch_size=3, collate_fn=parts[0].collate)))
    expected = np.full((3, max(length(n) for n in range(3))), -100)
    for n in range(3):
        expected[n, : length(n)] = labels[n]
    np.testing.assert_array_equal(batch["labels"], expected)
    unlike = [space.reader([key(0)]).dataset(), parts[1]]
    with pytest.raises(ShapeError, match="do not fit"):
        parts[0].collate([unlike[0][0], unlike[1][0]])


def test_accelerate_prepares_a_loader(reader):
    accelerate = pytest.importorskip("accelerate")
    data = reader.dataset()
    loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(data, batch_size=7, collate_fn=data.collate))
    assert check(loader) == list(range(COUNT))
    batches = list(loader)
    assert all(type(batch) is Inputs for batch in batches)


def test_it_computes_what_is_missing_in_one_process(reader, tmp_path):
    """As the reader that it is made from; what was computed is durable when all has been asked for."""
    space, supplied, settled = reader._work.source, [], []
    space.delete([key(4), key(9)])

    def supply(positions, corrupt):
        supplied.extend(positions.tolist())
        put(space, positions.tolist())

    def settle():
        settled.append(1)
        space.flush()

    miss_computer = MissComputer(lambda positions: np.array([length(n) for n in positions]), supply, settle)
    options = {"labels": np.arange(COUNT), "on_missing": "compute", "miss_computer": miss_computer}
    data = space.reader([key(n) for n in range(COUNT)], **options).dataset()
    assert data.lengths.tolist() == [length(n) for n in range(COUNT)]
    with pytest.raises(UsageError, match="one process"):
        pickle.dumps(data)
    workers = DataLoader(data, batch_size=10, collate_fn=data.collate, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(UsageError, match="one process"):
        list(workers)
    assert supplied == settled == []
    for _ in range(2):
        assert check(DataLoader(data, batch_size=7, collate_fn=data.collate)) == list(range(COUNT))
    assert (supplied, len(settled)) == ([4, 9], 1)
    with actcache.open(tmp_path / "store", "r") as other:
        assert len(other.space(recipe())) == COUNT
    assert check([data.collate([one]) for one in pickle.loads(pickle.dumps(data))]) == list(range(COUNT))  # noqa: S301


def test_no_documents_at_all(reader):
    data = reader.dataset()
    for nothing in (slice(5, 5), []):
        assert len(data[nothing]) == 0


def numbers(batches):
    return [batch.documents.tolist() for batch in batches]


def test_batches_are_an_iterable_data_set(reader):
    """A loader hands over the reader's own batches, epoch after epoch; in a worker it would read all of them twice."""
    space, keys = reader._work.source, reader._work.keys
    options = {"batch_size": 7, "shuffle": True, "device": "cpu"}
    expected = space.reader(keys, **options)
    loader = DataLoader(space.reader(keys, **options).batches(), batch_size=None)
    assert len(loader) == len(expected)
    assert numbers(loader) == numbers(expected)
    second = numbers(expected)
    assert numbers(loader) == second
    loader.dataset.set_epoch(0)
    assert numbers(loader) != second
    with pytest.raises(UsageError, match="num_workers=0"):
        next(iter(DataLoader(loader.dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")))


@pytest.mark.filterwarnings("ignore")  # torchdata's own
def test_a_stateful_loader_goes_on_in_the_middle(reader):
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    space, keys = reader._work.source, reader._work.keys
    options = {"batch_size": 3, "shuffle": True, "device": "cpu"}
    expected = space.reader(keys, **options)
    first, second = numbers(expected), numbers(expected)
    for steps in (1, 4, len(first)):
        loader = stateful(space.reader(keys, **options).batches(), batch_size=None)
        begun = iter(loader)
        assert numbers(next(begun) for _ in range(steps)) == first[:steps]
        again = stateful(space.reader(keys, **options).batches(), batch_size=None)
        again.load_state_dict(copy.deepcopy(loader.state_dict()))
        assert numbers(again) == (first[steps:] if steps < len(first) else [])
        assert numbers(again) == second
    data = space.reader(keys, **options).dataset()  # of items: the loader's own sampler keeps the place
    loader = stateful(data, batch_size=3, collate_fn=data.collate)
    begun = iter(loader)
    before = [next(begun)["activations"].shape for _ in range(2)]
    again = stateful(data, batch_size=3, collate_fn=data.collate)
    again.load_state_dict(loader.state_dict())
    assert [*before, *(one["activations"].shape for one in again)] == [one["activations"].shape for one in loader]


def test_accelerate_prepares_the_batches(reader):
    accelerate = pytest.importorskip("accelerate")
    space, keys = reader._work.source, reader._work.keys
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Linear(space.recipe.hidden_size, 1)
    stream = space.reader(keys, batch_size=7, device="cpu").batches()
    model, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        DataLoader(stream, batch_size=None, collate_fn=Batch.model_inputs),
    )
    seen, stepped = [], []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch["activations"].float()).mean())
            stepped.append(accelerator.sync_gradients)
            optimizer.step()
            optimizer.zero_grad()
        seen += batch["attention_mask"].sum(1).tolist()
    assert seen == [length(n) for n in range(COUNT)]
    assert stepped == [n % 2 == 1 or n == len(stepped) - 1 for n in range(len(stepped))]

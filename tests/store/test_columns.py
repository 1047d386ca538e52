"""Columns of the caller's own: put, read, migrated, exported, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import actcache
from actcache.admin.exchange import export_space, import_file
from actcache.admin.migration import migrate
from actcache.errors import CorruptEntryError, FormatError, ShapeError, UsageError
from tests.support import ids, key, length, put, recipe, rows
from tests.support.backends import each

COUNT = 20
KEYS = [key(n) for n in range(COUNT)]


def mask(number, version=0):
    return np.random.default_rng([number, version, 5]).random(length(number, version)) < 0.5


def weights(number, version=0):
    return np.random.default_rng([number, version, 6]).random((length(number, version), 2)).astype(np.float32)


def columns(numbers, version=0):
    numbers = list(numbers)
    return {"loss_mask": [mask(n, version) for n in numbers], "weights": [weights(n, version) for n in numbers]}


def check(space, numbers, version=0):
    numbers = list(numbers)
    for number, entry in zip(numbers, space.get([key(n) for n in numbers]), strict=True):
        np.testing.assert_array_equal(entry.activations, rows(number, version))
        np.testing.assert_array_equal(entry.columns["loss_mask"], mask(number, version))
        np.testing.assert_array_equal(entry.columns["weights"], weights(number, version))


@pytest.fixture
def space(tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        put(space, range(10), columns=columns(range(10)))
        space.flush()
        put(space, range(10, COUNT), columns=columns(range(10, COUNT)))
        space.flush()
        yield space


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_reader_delivers_them(space, device, layout):
    names = ["loss_mask", "weights"]
    reader = space.reader(KEYS, batch_size=7, shuffle=True, columns=names, layout=layout, device=device)
    kind = np.ndarray if device is None else torch.Tensor
    seen = 0
    for batch in reader:
        own = {name: np.asarray(array) for name, array in batch.columns.items()}
        assert all(isinstance(array, kind) for array in batch.columns.values())
        for i, document in enumerate(np.asarray(batch.documents).tolist()):
            for name, wanted in (("loss_mask", mask(document)), ("weights", weights(document))):
                if layout == "padded":
                    np.testing.assert_array_equal(own[name][i, : len(wanted)], wanted)
                    assert not own[name][i, len(wanted) :].any()
                else:
                    begin, end = np.asarray(batch.offsets)[i : i + 2]
                    np.testing.assert_array_equal(own[name][begin:end], wanted)
            seen += 1
        moved = batch.to("cpu")
        assert torch.equal(moved.columns["weights"], torch.as_tensor(batch.columns["weights"]))
    assert seen == COUNT


def test_rows_come_with_them_and_are_chosen_by_them(space):
    wanted = {(n, p) for n in range(COUNT) for p in range(length(n)) if mask(n)[p]}
    for ranks in (1, 2):
        found = []
        for rank in range(ranks):
            reader = space.rows(
                KEYS,
                batch_size=8,
                exclude={"mask": "loss_mask"},
                beside=["documents", "positions", "weights"],
                ranks=(rank, ranks),
            )
            for batch in reader:
                for document, position, weight in zip(
                    batch.documents, batch.positions, batch.columns["weights"], strict=True
                ):
                    np.testing.assert_array_equal(weight, weights(document)[position])
                    found.append((int(document), int(position)))
        assert sorted(found) == sorted(wanted)


@each()
def test_they_are_migrated_and_exported(kind, tmp_path, space):
    with actcache.open(tmp_path / "store", "r") as source, actcache.open(kind.url(tmp_path / "target")) as target:
        migrate(source, target)
        with target.space(recipe()) as there:
            check(there, range(COUNT))
            assert there.verify().intact
    for suffix in (".npz", ".safetensors"):
        export_space(space, tmp_path / f"file{suffix}")
        with actcache.open(kind.url(tmp_path / suffix[1:])) as target:
            assert import_file(target, tmp_path / f"file{suffix}").stored == COUNT
            with target.space(recipe()) as there:
                check(there, range(COUNT))


def test_what_does_not_fit_is_refused_and_stores_nothing(space, tmp_path):
    new = [key(100)]
    for own, error, said in (
        ({"loss_mask": [mask(5)]}, UsageError, "own columns are loss_mask, weights, not loss_mask"),
        ({"loss_mask": [mask(5)], "weights": [weights(6)]}, ShapeError, f"{new[0].hex()}: column weights must be"),
        ({"loss_mask": [], "weights": []}, ShapeError, "1 arrays and 0 of column loss_mask"),
        ({"loss_mask": [mask(5) * 0.5], "weights": [weights(5)]}, ShapeError, "does not fit bool"),
        ({}, UsageError, "mapping of names"),
    ):
        with pytest.raises(error, match=said):
            space.put(new, [rows(5)], columns=own)
    with pytest.raises(ShapeError, match="column loss_mask must be"):
        space.put_packed(new, rows(5), [0, len(rows(5))], columns={"loss_mask": [True], "weights": weights(5)})
    assert new[0] not in space
    with actcache.open(tmp_path / "other") as store, store.space(recipe()) as fresh:
        for own in ({"values": [mask(5)]}, {"x": [np.array([None] * length(5))]}, {"x": [mask(6)]}):
            with pytest.raises((UsageError, ShapeError)):
                fresh.put(new, [rows(5)], columns=own)
        assert fresh.schema is None  # a mistake declares nothing
        fresh.put(new, [rows(5)], columns={"other": [np.arange(length(5))]})
        fresh.flush()
        with (
            actcache.open(tmp_path / "store", "r") as source,
            pytest.raises(UsageError, match="other columns of its own"),
        ):
            migrate(source, store)


def test_a_column_that_some_documents_lack_is_said(space):
    space.put([key(50)], [rows(50)], [ids(50)])
    some = [*KEYS, key(50)]
    for ask in (
        lambda: space.reader(some, columns="loss_mask"),
        lambda: space.rows(some, beside="loss_mask"),
        lambda: space.rows(some, exclude={"mask": "loss_mask"}),
    ):
        with pytest.raises(UsageError, match=f"1 of 21 documents were stored without .* {key(50).hex()}"):
            ask()
    for ask, said in (
        (lambda: space.reader(KEYS, columns="labels"), "no column 'labels'; there are loss_mask, weights"),
        (lambda: space.rows(KEYS, exclude={"mask": "weights"}), "a mask is one number"),
        (lambda: space.rows(KEYS, exclude={"mask": 3}), "mask is the name of a column"),
        (lambda: space.reader(KEYS, columns="loss_mask", ram_cache=1000), "neither ram_cache"),
    ):
        with pytest.raises(UsageError, match=said):
            ask()


def test_texts_are_columns_but_no_tensors(tmp_path):
    with actcache.open(tmp_path) as store, store.space(recipe()) as space:
        words = np.array([f"w{n}" for n in range(length(5))])
        space.put([key(5)], [rows(5)], columns={"words": [words]})
        (batch,) = space.reader([key(5)], columns="words")
        assert batch.columns["words"][0].tolist() == words.tolist()
        with pytest.raises(UsageError, match="which no tensor does"):
            space.reader([key(5)], columns="words", device="cpu")


def test_a_flipped_byte_of_a_column_is_never_delivered(tmp_path, space):
    needle = np.concatenate([weights(13).view(np.uint8).reshape(length(13), -1)], axis=1)[0].tobytes()
    files = [file for file in (tmp_path / "store").glob("spaces/*/segments/*") if needle in file.read_bytes()]
    space.close()
    for file in files:
        data = bytearray(file.read_bytes())
        data[data.index(needle)] ^= 1
        file.write_bytes(data)
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as again:
        for ask in (
            lambda: again.get(KEYS),
            lambda: again.read_columns(KEYS),
            lambda: list(again.reader(KEYS, columns="weights")),
            lambda: list(again.rows(KEYS, beside="weights")),
        ):
            with pytest.raises(CorruptEntryError) as caught:
                ask()
            assert caught.value.keys == [key(13)]
        assert len(list(again.reader(KEYS))) == 1  # the rows are what they were
        assert again.verify().corrupt == [key(13)]


def test_a_damaged_schema_is_said(tmp_path, space):
    space.close()
    (file,) = (tmp_path / "store").glob("spaces/*/columns.json")
    file.write_bytes(file.read_bytes().replace(b"loss_mask", b"lass_mask"))
    with actcache.open(tmp_path / "store") as store, pytest.raises(FormatError, match=r"columns\.json is damaged"):
        store.space(recipe())


def test_whoever_declares_first_decides(tmp_path):
    with (
        actcache.open(tmp_path) as one,
        actcache.open(tmp_path) as two,
        one.space(recipe()) as a,
        two.space(recipe()) as b,
    ):
        a.put([key(1)], [rows(1)], columns={"mask": [np.ones(length(1), np.uint8)]})
        with pytest.raises(UsageError, match="own columns are mask, not other"):
            b.put([key(2)], [rows(2)], columns={"other": [np.ones(length(2))]})
        b.put([key(2)], [rows(2)], columns={"mask": [np.full(length(2), 7)]})
        b.flush()
        a.flush()
        for n, entry in zip((1, 2), a.get([key(1), key(2)]), strict=True):
            assert entry.columns["mask"].dtype == np.uint8
            assert set(entry.columns["mask"].tolist()) == {1 if n == 1 else 7}

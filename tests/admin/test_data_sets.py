"""A space as a data set of Hugging Face, and back; and as SAELens reads cached activations (tests/models/clients)."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

import actcache
from actcache.admin.exchange import export_sae_lens, put_dataset, to_dataset
from actcache.errors import CorruptEntryError, FormatError, MissingEntryError, ShapeError, UsageError
from tests.support import HIDDEN, check, ids, key, length, make_store, put, recipe, rows, segment_files

datasets = pytest.importorskip("datasets")
COUNT = 20
KEYS = [key(n) for n in range(COUNT)]


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


@pytest.fixture
def space(tmp_path: Path) -> Iterator[Any]:
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        put(space, range(COUNT))
        space.flush()
        yield space


def test_there_and_back(space: Any, tmp_path: Path) -> None:
    """In the order of the keys, with all dtypes, also by way of a data set on disk and its plain lists."""
    made = to_dataset(space, KEYS)
    for n, row in enumerate(made):
        assert row["key"] == KEYS[n]
        np.testing.assert_array_equal(row["activations"], rows(n))
        np.testing.assert_array_equal(row["token_ids"], ids(n))
    assert n == COUNT - 1
    on_disk = datasets.Dataset.from_generator(lambda: iter(made), made.features, cache_dir=str(tmp_path / "cache"))
    kinds = {
        "plain": made,
        "disk": on_disk,
        "numpy": on_disk.with_format("numpy"),
        "torch": on_disk.with_format("torch"),
    }
    for name, dataset in kinds.items():
        with actcache.open(tmp_path / name) as store, store.space(recipe()) as other:
            assert put_dataset(other, dataset) == COUNT
            assert put_dataset(other, dataset) == 0
            check(other, dict.fromkeys(range(COUNT), 0), range(COUNT))
    with actcache.open(tmp_path / "half") as store, store.space(recipe(dtype="bfloat16")) as half:
        put(half, range(COUNT))
        np.testing.assert_array_equal(next(iter(to_dataset(half, KEYS)))["activations"], rows(0))  # small whole numbers


def test_it_travels_to_workers_and_goes_on(space: Any) -> None:
    made = pickle.loads(pickle.dumps(to_dataset(space, KEYS, shards=3)))  # noqa: S301
    loader = DataLoader(made, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert sorted(row["key"] for row in loader) == sorted(KEYS)
    iterator = iter(made)
    for _ in range(5):
        next(iterator)
    state = made.state_dict()
    again = to_dataset(space, KEYS, shards=3)
    again.load_state_dict(state)
    assert [row["key"] for row in again] == KEYS[5:]
    assert {row["key"] for row in to_dataset(space).shuffle(seed=1, buffer_size=4)} == set(KEYS)


def test_what_is_no_row_or_no_entry(space: Any) -> None:
    with pytest.raises(MissingEntryError):
        to_dataset(space, [key(99)])
    with pytest.raises(UsageError, match="no entries"):
        to_dataset(space, [])
    good = {"key": key(50), "activations": rows(50), "token_ids": ids(50)}
    for bad in ({}, {**good, "key": b"short"}, {**good, "key": None}, "row", {**good, "activations": "x"}):
        with pytest.raises((FormatError, ShapeError)):
            put_dataset(space, [bad])
    with pytest.raises(ShapeError):
        put_dataset(space, [{**good, "activations": rows(50)[:, :3]}])
    assert put_dataset(space, [good]) == 1


def test_cached_activations(space: Any, tmp_path: Path) -> None:
    """All tokens in the order of the documents, but for those after the last full context."""
    total = sum(length(n) for n in range(COUNT))
    done = export_sae_lens(space, tmp_path / "cached", KEYS, context_size=7, hook_name="blocks.1.hook_resid_post")
    assert (done.contexts, done.tokens, done.left_out) == (total // 7, total // 7 * 7, total % 7)
    made = datasets.load_from_disk(str(tmp_path / "cached")).with_format("numpy")
    assert made.features["blocks.1.hook_resid_post"].shape == (7, HIDDEN)
    every = np.concatenate([rows(n) for n in range(COUNT)])
    np.testing.assert_array_equal(np.concatenate(list(made["blocks.1.hook_resid_post"])), every[: done.tokens])
    tokens = np.concatenate([ids(n) for n in range(COUNT)])
    np.testing.assert_array_equal(np.concatenate(list(made["token_ids"])), tokens[: done.tokens])
    with pytest.raises(UsageError, match="stands already"):
        export_sae_lens(space, tmp_path / "cached", context_size=7, hook_name="x")
    with pytest.raises(UsageError, match="fewer than one context"):
        export_sae_lens(space, tmp_path / "other", KEYS[:1], context_size=700, hook_name="x")


def test_a_flipped_byte_is_not_exported(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "store", range(COUNT))
    file = segment_files(folder)[0]
    data = bytearray(file.read_bytes())
    data[data.index(rows(3).tobytes())] ^= 1
    file.write_bytes(data)
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        with pytest.raises(CorruptEntryError):
            export_sae_lens(space, tmp_path / "cached", context_size=7, hook_name="x")
        with pytest.raises(CorruptEntryError):
            list(to_dataset(space))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]

"""The suite that every backend has to pass, a third party's too::

    class TestMine(BackendConformance):
        @pytest.fixture
        def url(self, tmp_path):
            return f"mine:{tmp_path}/store"

The oracle is a dictionary. Nothing here knows how a backend stores.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

import actcache
from actcache import errors
from actcache.format import codec

HIDDEN = 24

_ACTIONS = {"put": 0.3, "overwrite": 0.2, "delete": 0.1, "flush": 0.2, "reopen": 0.1, "read": 0.1}


_dtype = "float32"  # of the class whose test runs


def recipe(**changes: Any) -> actcache.Recipe:
    return actcache.Recipe(**{"model": "conformance", "layer": 1, "hidden_size": HIDDEN, "dtype": _dtype, **changes})


class Documents:
    """Documents by number: key, rows and token ids, always the same for a (number, version)."""

    def key(self, number: int) -> bytes:
        return actcache.document_key(f"document {number}")

    def rows(self, number: int, version: int = 0) -> NDArray[np.float32]:
        rng = np.random.default_rng([number, version])
        rows = rng.integers(-127, 128, (int(rng.integers(1, 30)), HIDDEN)).astype(np.float32)
        rows[:, 0] = 127  # so that int8 has a scale of 1: these numbers are exact in every codec
        return rows

    def ids(self, number: int, version: int = 0) -> NDArray[np.int64]:
        return np.random.default_rng([number, version, 1]).integers(0, 30000, len(self.rows(number, version)))

    def put(self, space: actcache.Space, numbers: Any, version: int = 0, **options: Any) -> int:
        numbers = list(numbers)
        keys, rows = [self.key(n) for n in numbers], [self.rows(n, version) for n in numbers]
        return space.put(keys, rows, [self.ids(n, version) for n in numbers], **options)

    def check(self, space: actcache.Space, versions: dict[int, int], numbers: Any) -> None:
        """Compare a ``get`` of ``numbers`` with the oracle ``number -> version``."""
        numbers = list(numbers)
        for number, entry in zip(numbers, space.get([self.key(n) for n in numbers]), strict=True):
            if number not in versions:
                assert entry is None
                continue
            assert entry is not None
            np.testing.assert_array_equal(entry.activations, self.rows(number, versions[number]))
            np.testing.assert_array_equal(entry.token_ids, self.ids(number, versions[number]))


class BackendConformance:
    """Subclass it and give it a ``url`` fixture: the URL of a store that does not exist yet."""

    documents = Documents()
    #: options for ``actcache.open``
    options: ClassVar[dict[str, Any]] = {}
    #: how rows are stored; a codec in which whole numbers up to 127 are exact
    dtype: ClassVar[str] = "float32"
    #: how many random operations are compared with a dictionary
    steps: ClassVar[int] = 150

    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError("a subclass of BackendConformance has a fixture 'url'")

    @pytest.fixture(autouse=True)
    def _codec(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(globals(), "_dtype", self.dtype)

    @pytest.fixture
    def store(self, url: str) -> Iterator[actcache.Store]:
        with actcache.open(url, **self.options) as store:
            yield store

    @pytest.fixture
    def space(self, store: actcache.Store) -> actcache.Space:
        return store.space(recipe(), segment_bytes=8192)

    def reopened(self, url: str, mode: str = "r") -> actcache.Space:
        return actcache.open(url, mode, **self.options).space(recipe())

    # --- entries -----------------------------------------------------------------------------------------------------

    def test_get_returns_what_was_put(self, space: actcache.Space) -> None:
        assert self.documents.put(space, range(50)) == 50
        self.documents.check(space, dict.fromkeys(range(50), 0), range(50))
        space.flush()
        self.documents.check(space, dict.fromkeys(range(50), 0), range(50))

    def test_results_are_aligned_and_misses_explicit(self, space: actcache.Space) -> None:
        self.documents.put(space, range(0, 40, 2))
        space.flush()
        self.documents.put(space, range(40, 50))  # not flushed: reads see it all the same
        held = dict.fromkeys([*range(0, 40, 2), *range(40, 50)], 0)
        for seed in range(5):
            numbers = np.random.default_rng(seed).integers(0, 60, 80).tolist()  # keys may repeat in a request
            self.documents.check(space, held, numbers)
            keys = [self.documents.key(n) for n in numbers]
            np.testing.assert_array_equal(space.contains(keys), [n in held for n in numbers])
        assert space.get([]) == []
        assert self.documents.key(0) in space
        assert self.documents.key(1) not in space

    def test_flushed_entries_are_seen_by_others(self, url: str, space: actcache.Space) -> None:
        self.documents.put(space, range(30))
        space.flush()
        other = self.reopened(url)
        self.documents.check(other, dict.fromkeys(range(30), 0), range(35))
        self.documents.put(space, range(30, 35))
        space.flush()
        self.documents.check(other, dict.fromkeys(range(30), 0), range(35))  # its snapshot stands
        other.refresh()
        self.documents.check(other, dict.fromkeys(range(35), 0), range(35))

    def test_closing_flushes(self, url: str) -> None:
        with actcache.open(url, **self.options) as store, store.space(recipe()) as space:
            self.documents.put(space, range(10))
        self.documents.check(self.reopened(url), dict.fromkeys(range(10), 0), range(12))

    def test_present_keys_are_skipped_unless_overwritten(self, url: str, space: actcache.Space) -> None:
        self.documents.put(space, range(10))
        assert self.documents.put(space, range(12), version=1) == 2
        space.flush()
        assert self.documents.put(space, range(12), version=2) == 0
        held = {**dict.fromkeys(range(10), 0), 10: 1, 11: 1}
        self.documents.check(space, held, range(12))
        assert self.documents.put(space, [3, 11], version=3, overwrite=True) == 2
        held.update({3: 3, 11: 3})
        self.documents.check(space, held, range(12))
        space.flush()
        self.documents.check(space, held, range(12))
        self.documents.check(self.reopened(url), held, range(12))
        assert len(space) == 12

    def test_delete(self, url: str, space: actcache.Space) -> None:
        self.documents.put(space, range(20))
        space.flush()
        self.documents.put(space, [4], version=1, overwrite=True)  # a second copy, which must go as well
        self.documents.put(space, range(20, 25))
        gone = [0, 4, 19, 22]
        assert space.delete([self.documents.key(n) for n in [*gone, 99]]) == len(gone)
        held = {n: 0 for n in range(25) if n not in gone}
        self.documents.check(space, held, range(25))
        self.documents.check(self.reopened(url), held, range(25))
        assert len(space) == len(held)
        self.documents.put(space, [4], version=5)  # and what is put again stays
        space.flush()
        self.documents.check(self.reopened(url), {**held, 4: 5}, range(25))
        assert space.delete([]) == 0

    def test_two_writers(self, url: str, space: actcache.Space) -> None:
        other = self.reopened(url, "a")
        self.documents.put(space, range(20))
        self.documents.put(other, range(10, 30))
        space.flush()
        other.flush()
        space.refresh()
        for one in (space, other):
            self.documents.check(one, dict.fromkeys(range(30), 0), range(30))
            assert len(one) == 30
        other.close()

    def test_random_operations_against_a_dictionary(self, url: str) -> None:
        rng = np.random.default_rng(11)
        store = actcache.open(url, **self.options)
        space = store.space(recipe(), segment_bytes=4096)
        held: dict[int, int] = {}
        for step in range(self.steps):
            numbers = rng.choice(60, int(rng.integers(1, 8)), replace=False).tolist()
            match rng.choice(list(_ACTIONS), p=list(_ACTIONS.values())):
                case "put":
                    self.documents.put(space, numbers, version=step)
                    held = {**dict.fromkeys(numbers, step), **held}
                case "overwrite":
                    self.documents.put(space, numbers, version=step, overwrite=True)
                    held.update(dict.fromkeys(numbers, step))
                case "delete":
                    assert space.delete([self.documents.key(n) for n in numbers]) == len(held.keys() & set(numbers))
                    held = {n: version for n, version in held.items() if n not in numbers}
                case "flush":
                    space.flush()
                case "reopen":
                    store.close()
                    store = actcache.open(url, **self.options)
                    space = store.space(recipe(), segment_bytes=4096)
                case "read":
                    self.documents.check(space, held, rng.integers(0, 60, 100).tolist())
        self.documents.check(space, held, range(60))
        assert sorted(space.keys()) == sorted(self.documents.key(n) for n in held)
        store.close()

    def test_an_entry_larger_than_a_segment(self, url: str, space: actcache.Space) -> None:
        rows = np.random.default_rng(0).integers(-127, 128, (5000, HIDDEN)).astype(np.float32)
        rows[:, 0] = 127
        self.documents.put(space, range(3))
        space.put([self.documents.key(100)], [rows])
        self.documents.put(space, range(3, 6))
        space.flush()
        entry = self.reopened(url).get([self.documents.key(100)])[0]
        assert entry is not None
        np.testing.assert_array_equal(entry.activations, rows)

    def test_optional_arrays(self, url: str, space: actcache.Space) -> None:
        rows = [self.documents.rows(n) for n in range(6)]
        extras: dict[str, Any] = {
            "spans": [np.arange(2 * len(r)).reshape(-1, 2) for r in rows],
            "word_ids": [np.arange(len(r)) - 1 for r in rows],
            "type_ids": [np.arange(len(r)) % 2 for r in rows],
        }
        keys = [self.documents.key(n) for n in range(6)]
        ids = [self.documents.ids(n) for n in range(6)]
        space.put(keys[:2], rows[:2])
        space.put(keys[2:4], rows[2:4], ids[2:4])
        space.put(keys[4:], rows[4:], ids[4:], **{name: values[4:] for name, values in extras.items()})
        for flushed in (False, True):
            if flushed:
                space.flush()
            one = self.reopened(url) if flushed else space
            np.testing.assert_array_equal(one.has("token_ids", keys), [False, False, True, True, True, True])
            np.testing.assert_array_equal(one.has("spans", keys), [False, False, False, False, True, True])
            for i in (5, 2, 0, 4, 1, 3):
                entry = one.get([keys[i], self.documents.key(77), keys[(i + 3) % 6]])[0]
                assert entry is not None
                np.testing.assert_array_equal(entry.activations, rows[i])
                assert (entry.token_ids is None) == (i < 2)
                assert set(entry.extras) == (set(extras) if i > 3 else set())
                for name, array in entry.extras.items():
                    np.testing.assert_array_equal(array, extras[name][i])

    def test_columns_of_the_callers_own(self, url: str, space: actcache.Space) -> None:
        """Some entries have them, some have other optional arrays besides, some none; whoever has the space open sees
        what others declare."""
        count = 9
        rows = [self.documents.rows(n) for n in range(count)]
        keys = [self.documents.key(n) for n in range(count)]
        rng = np.random.default_rng(0)
        columns: dict[str, list[NDArray[Any]]] = {
            "loss_mask": [rng.random(len(r)) < 0.5 for r in rows],
            "weights": [rng.standard_normal((len(r), 3)) for r in rows],
            "labels": [rng.integers(-100, 30000, len(r)) for r in rows],
            "words": [np.array([f"w{i}" for i in range(len(r))], "U7") for r in rows],
        }
        other = self.reopened(url)
        space.put(keys[:2], rows[:2])
        space.put(keys[2:5], rows[2:5], columns={name: given[2:5] for name, given in columns.items()})
        spans = [np.arange(2 * len(r)).reshape(-1, 2) for r in rows]
        packed = {name: np.concatenate(given[5:8]) for name, given in columns.items()}
        offsets = np.cumsum([0, *(len(r) for r in rows[5:8])])
        ids = np.concatenate([self.documents.ids(n) for n in range(5, 8)])
        space.put_packed(
            keys[5:8], np.concatenate(rows[5:8]), offsets, ids, spans=np.concatenate(spans[5:8]), columns=packed
        )
        for flushed in (False, True):
            if flushed:
                space.flush()
                other.refresh()
            for one in (space, other, self.reopened(url)) if flushed else (space,):
                np.testing.assert_array_equal(one.has("loss_mask", keys), [1 < n < 8 for n in range(count)])
                for i in (5, 2, 0, 4, 1, 3, 7):
                    entry = one.get([keys[i], self.documents.key(77), keys[(i + 3) % count]])[0]
                    assert entry is not None
                    np.testing.assert_array_equal(entry.activations, rows[i])
                    assert set(entry.columns) == (set(columns) if i > 1 else set())
                    assert set(entry.extras) == ({"spans"} if i > 4 else set())
                    for name, array in entry.columns.items():
                        np.testing.assert_array_equal(array, columns[name][i])
                        assert array.dtype == columns[name][i].dtype
                wanted = [7, 0, 8, 3, 2]
                own = one.read_columns([keys[i] for i in wanted])
                assert own.lengths.tolist() == [len(rows[i]) if 1 < i < 8 else 0 for i in wanted]
                for name, given in columns.items():
                    np.testing.assert_array_equal(own.arrays[name], np.concatenate([given[i] for i in (7, 3, 2)]))
        space.compact(waste=0.0, grace=0.0)
        entry = self.reopened(url).get(keys[6:7])[0]
        assert entry is not None
        for name, array in entry.columns.items():
            np.testing.assert_array_equal(array, columns[name][6])
        assert space.verify().intact

    @pytest.mark.parametrize(
        ("dtype", "relative"),
        [
            *(("float32", 0.0), ("float16", 2**-11), ("bfloat16", 2**-8), ("int8", 0.02), ("float8_e4m3", 0.05)),
            *(("float16+zstd", 2**-11), ("int8+zstd", 0.02)),
        ],
    )
    def test_codecs(self, store: actcache.Store, dtype: str, relative: float) -> None:
        """Each brings back nearly what was put, the same after a compaction, and of every form that one asks for."""
        space = store.space(recipe(dtype=dtype), segment_bytes=4096)
        keys = [self.documents.key(n) for n in range(20)]
        given = [np.random.default_rng(n).standard_normal((1 + n, HIDDEN)).astype(np.float32) for n in range(20)]
        space.put(keys, given)
        before = space.get(keys)
        space.flush()
        space.delete(keys[:3])
        space.compact(waste=0.0, grace=0.0)
        for rows, entry, unpublished in zip(given[3:], space.get(keys[3:]), before[3:], strict=True):
            assert entry is not None
            assert unpublished is not None
            assert np.linalg.norm(entry.activations - rows) <= relative * np.linalg.norm(rows)
            np.testing.assert_array_equal(entry.activations, unpublished.activations)
        wide = np.empty((17, 20, HIDDEN), np.float32)
        space.read_into(keys[3:], wide, dtype="float32")
        for rows, entry in zip(wide, space.get(keys[3:]), strict=True):
            assert entry is not None
            np.testing.assert_array_equal(rows[: len(entry.activations)], entry.activations)
            assert not rows[len(entry.activations) :].any()
        assert space.verify().intact

    # --- whole spaces ------------------------------------------------------------------------------------------------

    def test_a_space_is_deleted_with_all_that_belongs_to_it(self, url: str, store: actcache.Store) -> None:
        other = recipe(layer=2)
        with store.space(recipe()) as space, store.space(other) as kept:
            self.documents.put(space, range(20))
            space.delete([self.documents.key(3)])
            space.put_blob("note.txt", b"x")
            self.documents.put(kept, range(5))
        reader = self.reopened(url)
        files = store.driver.listing()
        name = f"spaces/{recipe().fingerprint}/"
        assert sum(file.nbytes for path, file in files.items() if path.startswith(name)) > 20 * HIDDEN * 4
        assert all(file.nbytes >= 0 and (0 <= file.age < 3600 or file.age == np.inf) for file in files.values())
        assert [store.delete_space(recipe().fingerprint) for _ in range(2)] == [True, False]
        assert (store.recipes(), store.fingerprints()) == ([other], [other.fingerprint])
        assert not [path for path in store.driver.listing() if path.startswith(name)]
        reader.refresh()
        assert len(reader) == 0
        self.documents.check(store.space(other), dict.fromkeys(range(5), 0), range(9))
        with store.space(recipe()) as again:
            assert again.created
            assert again.blob("note.txt") is None
            self.documents.put(again, range(2, 6), version=1)
        self.documents.check(self.reopened(url), dict.fromkeys(range(2, 6), 1), range(40))

    def test_a_writer_whose_space_is_deleted_goes_on(self, url: str, space: actcache.Space) -> None:
        self.documents.put(space, range(10))
        space.flush()
        with actcache.open(url, **self.options) as other:
            assert other.delete_space(recipe().fingerprint)
        self.documents.put(space, range(10, 20))
        space.flush()
        self.documents.put(space, [3], version=1)
        space.flush()
        held = {**dict.fromkeys(range(10, 20), 0), 3: 1}
        self.documents.check(space, held, range(25))
        self.documents.check(self.reopened(url), held, range(25))

    # --- buffers -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("flushed", [True, False])
    def test_read_into(self, space: actcache.Space, flushed: bool) -> None:
        self.documents.put(space, range(30))
        space.flush()
        self.documents.put(space, range(30, 40))
        if flushed:
            space.flush()
        numbers = [39, 2, 77, 3, 31, 30, 0, 2, 88]
        keys = [self.documents.key(n) for n in numbers]
        rows = [self.documents.rows(n) if n < 40 else np.empty((0, HIDDEN), np.float32) for n in numbers]
        ids = [self.documents.ids(n) if n < 40 else np.empty(0, np.int64) for n in numbers]
        lengths = [len(r) for r in rows]

        packed, packed_ids = np.full((sum(lengths) + 5, HIDDEN), 7, np.float32), np.full(sum(lengths) + 5, 7, np.int32)
        report = space.read_into(keys, packed, token_ids=packed_ids, dtype="float32")
        np.testing.assert_array_equal(report.lengths, lengths)
        np.testing.assert_array_equal(report.found, [n < 40 for n in numbers])
        np.testing.assert_array_equal(report.offsets, np.cumsum([0, *lengths]))
        np.testing.assert_array_equal(packed[: sum(lengths)], np.concatenate(rows))
        np.testing.assert_array_equal(packed_ids[: sum(lengths)], np.concatenate(ids))
        assert (packed[sum(lengths) :] == 7).all()

        padded, padded_ids = np.full((len(keys), 30, HIDDEN), 7, np.float32), np.full((len(keys), 30), 7, np.int32)
        space.read_into(keys, padded, token_ids=padded_ids, dtype="float32")
        for i, length in enumerate(lengths):
            np.testing.assert_array_equal(padded[i, :length], rows[i])
            np.testing.assert_array_equal(padded_ids[i, :length], ids[i])
            assert not padded[i, length:].any()
            assert not padded_ids[i, length:].any()

    @pytest.mark.parametrize("flushed", [True, False])
    def test_scatter_into(self, space: actcache.Space, flushed: bool) -> None:
        self.documents.put(space, range(20))
        space.flush()
        self.documents.put(space, range(20, 30))
        if flushed:
            space.flush()
        keys = [self.documents.key(n) for n in (29, 2, 3, 21, 20, 0, 2)]
        stored = space.read_packed(keys)
        rows, total = stored.columns["values"], int(stored.lengths.sum())
        targets = np.random.default_rng(1).permutation(total + 3)[:total]
        out = np.full((total + 3, 2, rows.shape[1]), 7, rows.dtype)
        ids = np.empty(total, np.int32)
        space.scatter_into(keys, out[:, 1], targets, token_ids=ids)
        np.testing.assert_array_equal(out[targets, 1], rows)
        np.testing.assert_array_equal(ids, stored.columns["token_ids"])
        out[targets, 1] = 7
        assert (out == 7).all()

    def test_buffers_that_do_not_fit_are_refused(self, space: actcache.Space) -> None:
        self.documents.put(space, range(3))
        keys = [self.documents.key(n) for n in range(3)]
        tokens = int(space.lengths(keys).sum())
        for bad in (
            np.empty((tokens - 1, HIDDEN), np.float32),
            np.empty((tokens, HIDDEN), np.float16),
            np.empty((tokens, HIDDEN + 1), np.float32),
            np.empty((3, 1, HIDDEN), np.float32),
            np.empty((2, 40, HIDDEN), np.float32),
            np.empty((HIDDEN, tokens), np.float32).T,
            np.empty(tokens * HIDDEN, np.float32),
        ):
            with pytest.raises(errors.ShapeError):
                space.read_into(keys, bad, dtype="float32")
        wrong = np.empty(tokens, np.int64)
        with pytest.raises(errors.ShapeError):
            space.read_into(keys, np.empty((tokens, HIDDEN), np.float32), token_ids=wrong, dtype="float32")

    def test_reader(self, space: actcache.Space) -> None:
        self.documents.put(space, range(23))
        keys = [self.documents.key(n) for n in range(23)]
        reader = space.reader(keys, batch_size=5, shuffle=True, seed=3, labels=np.arange(23) * 10)
        assert len(reader) == 5
        epochs = [list(reader) for _ in range(2)]  # batches that are kept stay right
        orders = []
        for batches in epochs:
            order = np.concatenate([batch.documents for batch in batches]).tolist()
            assert sorted(order) == list(range(23))
            orders.append(order)
            for batch in batches:
                np.testing.assert_array_equal(batch.labels, batch.documents * 10)
                for i, number in enumerate(batch.documents.tolist()):
                    length = int(batch.lengths[i])
                    assert batch.keys[i] == keys[number]
                    np.testing.assert_array_equal(batch.activations[i, :length], self.documents.rows(number))
                    np.testing.assert_array_equal(batch.token_ids[i, :length], self.documents.ids(number))
                    assert batch.attention_mask[i].tolist() == [j < length for j in range(batch.activations.shape[1])]
        assert orders[0] != orders[1]
        with pytest.raises(errors.MissingEntryError) as caught:
            space.reader([*keys, self.documents.key(50)])
        assert caught.value.keys == [self.documents.key(50)]
        skipping = space.reader([self.documents.key(50), *keys], on_missing="skip", batch_size=100)
        assert next(iter(skipping)).documents.tolist() == list(range(1, 24))

    # --- refusals ----------------------------------------------------------------------------------------------------

    def test_packed_rows_are_the_same_entries(self, space: actcache.Space) -> None:
        versions: dict[int, int] = {}
        for version, numbers in enumerate((range(20), range(10, 30), range(0, 30, 3))):
            rows = [self.documents.rows(n, version) for n in numbers]
            offsets = np.cumsum([0, *map(len, rows)])
            keys, ids = [self.documents.key(n) for n in numbers], [self.documents.ids(n, version) for n in numbers]
            overwrite = version == 2
            count = space.put_packed(keys, np.concatenate(rows), offsets, np.concatenate(ids), overwrite=overwrite)
            fresh = [n for n in numbers if overwrite or n not in versions]
            assert count == len(fresh)
            versions |= dict.fromkeys(fresh, version)
            self.documents.check(space, versions, range(31))
            space.flush()
            self.documents.check(space, versions, range(31))

    def test_a_bad_put_stores_nothing(self, space: actcache.Space) -> None:
        good = self.documents.rows(0)
        key, other = self.documents.key(0), self.documents.key(1)
        nan, huge = good.copy(), good.astype(np.float64)
        nan[0, 3], huge[0, 2] = np.nan, 1e300
        refused: list[tuple[Any, ...]] = [
            (errors.NonFiniteError, [other, key], [good, nan]),
            (errors.CodecOverflowError, [other, key], [good, huge]),
            *((errors.ShapeError, [other, key], [good, bad]) for bad in (good[:, 1:], good[0], good[:0])),
            (errors.ShapeError, [other, key], [good, good.astype(np.int32)]),
            (errors.KeyFormatError, [key, key], [good, good]),
            (errors.KeyFormatError, [b"short"], [good]),
            (errors.ShapeError, [key], [good, good]),
            (errors.ShapeError, [key], [good], [np.arange(len(good) + 1)]),
            (errors.ShapeError, [key], [good], [np.full(len(good), 2**40)]),
        ]
        for error, keys, *arrays in refused:
            with pytest.raises(error):
                space.put(keys, *arrays)
            assert len(space) == 0
        assert self.documents.put(space, [0]) == 1

    def test_overflow_names_document_and_value(self, store: actcache.Store) -> None:
        space = store.space(recipe(dtype="float16"))
        rows = np.ones((2, HIDDEN), np.float32)
        rows[1, 5] = 70000
        with pytest.raises(
            errors.CodecOverflowError, match=rf"{self.documents.key(0).hex()}.*70000.*token 1, column 5"
        ):
            space.put([self.documents.key(0)], [rows])

    def test_read_only(self, url: str, space: actcache.Space) -> None:
        self.documents.put(space, range(3))
        space.flush()
        reading = self.reopened(url)
        key = self.documents.key(0)
        for call in (lambda: self.documents.put(reading, [5]), lambda: reading.delete([key]), reading.flush):
            with pytest.raises(errors.ReadOnlyError):
                call()
        self.documents.check(reading, dict.fromkeys(range(3), 0), range(4))

    def test_absent_stores_and_spaces(self, url: str) -> None:
        with pytest.raises(errors.StoreNotFoundError):
            actcache.open(url, "r", **self.options)
        actcache.open(url, **self.options).close()
        reading = actcache.open(url, "r", **self.options)
        with pytest.raises(errors.SpaceNotFoundError):
            reading.space(recipe())
        writing = actcache.open(url, **self.options)
        writing.space(recipe(layer=4)).close()
        with pytest.raises(errors.SpaceNotFoundError, match="differs in layer: 1 here, 4 there"):
            reading.space(recipe())

    def test_closed(self, url: str) -> None:
        store = actcache.open(url, **self.options)
        space = store.space(recipe())
        self.documents.put(space, [1])
        store.close()
        store.close()
        for call in (lambda: space.get([]), space.flush, lambda: self.documents.put(space, [1]), space.usage):
            with pytest.raises(errors.ClosedError):
                call()
        with pytest.raises(errors.ClosedError):
            store.space(recipe())

    # --- the store ---------------------------------------------------------------------------------------------------

    def test_spaces_are_apart(self, store: actcache.Store) -> None:
        first, second = store.space(recipe()), store.space(recipe(layer=2))
        assert first.created
        assert not store.space(recipe()).created
        self.documents.put(first, range(5))
        first.flush()
        assert len(second) == 0
        assert {r.fingerprint for r in store.recipes()} == {first.recipe.fingerprint, second.recipe.fingerprint}
        nearest = [differences for _, differences in store.nearest(recipe(layer=3))]
        assert sorted(nearest, key=str) == [{"layer": (3, 1)}, {"layer": (3, 2)}]

    def test_blobs(self, url: str, space: actcache.Space) -> None:
        assert space.blob("canaries.npz") is None
        assert space.put_blob("canaries.npz", b"one")
        assert not space.put_blob("canaries.npz", b"two")
        assert space.blob("canaries.npz") == b"one"
        assert space.put_blob("canaries.npz", b"three", replace=True)
        assert self.reopened(url).blob("canaries.npz") == b"three"

    def test_collections(self, url: str, store: actcache.Store) -> None:
        keys = [self.documents.key(n) for n in (3, 1, 2, 1)]
        store.put_collection("train", keys, ids=["c", "a", "b", "ä"])
        store.put_collection("dev", keys[:0])
        with actcache.open(url, "r", **self.options) as reading:
            assert reading.collections() == ["dev", "train"]
            train = reading.collection("train")
            assert [key.tobytes() for key in train.keys] == keys
            assert train.ids == ["c", "a", "b", "ä"]
            assert reading.collection("dev").ids is None
            assert len(reading.collection("dev")) == 0
            with pytest.raises(errors.CollectionNotFoundError, match="dev, train"):
                reading.collection("test")
            with pytest.raises(errors.ReadOnlyError):
                reading.delete_collection("train")
        store.put_collection("train", keys[:1])
        assert len(store.collection("train")) == 1
        assert store.delete_collection("train")
        assert not store.delete_collection("train")
        for bad in ("", "../up", "a/b", ".hidden"):
            with pytest.raises(ValueError):
                store.put_collection(bad, keys)

    def test_pickling_carries_the_url_and_the_recipe(self, space: actcache.Space) -> None:
        self.documents.put(space, range(4))
        space.flush()
        travelled = pickle.loads(pickle.dumps(space))  # noqa: S301 - our own bytes
        assert len(pickle.dumps(space)) < 2000
        self.documents.check(travelled, dict.fromkeys(range(4), 0), range(5))

    def test_usage(self, space: actcache.Space) -> None:
        self.documents.put(space, range(20))
        space.flush()
        usage = space.usage()
        assert usage.entries == 20
        assert usage.tokens == sum(len(self.documents.rows(n)) for n in range(20))
        compressed = codec.get(space.recipe.dtype).compressed  # to what size, nobody can say beforehand
        assert usage.nbytes >= usage.tokens * (1 if compressed else space.recipe.row_bytes)
        assert space.damaged() == {}

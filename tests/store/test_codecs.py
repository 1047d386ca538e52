"""Spaces of codecs, from the outside: what a stranger's store may hold, and what every way of reading gives."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import actcache
from actcache.admin.exchange import export_space, import_file
from actcache.admin.migration import migrate
from actcache.backend import Block
from actcache.errors import CodecOverflowError, CorruptEntryError, FormatError, RecipeError, ShapeError, UsageError
from actcache.format import checksum, codec
from actcache.format.ragged import VALUES, offsets_of
from actcache.reader.accelerator import AcceleratorDelivery
from actcache.reader.delivery import BatchMembers
from actcache.reader.fetch import fetch
from tests.support import HIDDEN, check, ids, key, put, recipe, rows, segment_files, stored_as
from tests.support.backends import each
from tests.support.simulated_device import SimulatedDevice

DTYPES = ["int8", "float8_e4m3", "float16+zstd", "int8+zstd"]


def floats(number):
    return np.random.default_rng(number).standard_normal((1 + number, HIDDEN)).astype(np.float32)


@pytest.fixture
def space(kind, tmp_path, dtype):
    with actcache.open(kind.url(tmp_path / "store")) as store, store.space(recipe(dtype=dtype)) as one:
        one.put([key(n) for n in range(8)], [floats(n) for n in range(8)], [np.arange(1 + n) for n in range(8)])
        one.flush()
        yield one


@each(everyday=("hdf5", "lmdb"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_ways_of_reading_give_the_same_numbers(space, dtype, tmp_path):
    keys = [key(n) for n in range(8)]
    expected = [codec.get(dtype).decode(codec.get(dtype).stored_rows(floats(n))).astype(np.float32) for n in range(8)]
    for entry, right in zip(space.get(keys, dtype="float32"), expected, strict=True):
        np.testing.assert_array_equal(entry.activations, right)
    packed = torch.empty(36, HIDDEN, dtype=torch.bfloat16)
    space.read_into(keys, packed, dtype="bfloat16")
    assert torch.equal(packed, torch.from_numpy(np.concatenate(expected)).bfloat16())
    options = [{"ram_cache": "1MiB"}, {"local_cache": tmp_path / "cache", "local_bytes": "64MiB"}, {"device": "cpu"}]
    for given in ({}, *options, {"device": "cpu", "layout": "packed"}):
        reader = space.reader(keys, batch_size=3, dtype="float32", **given)
        for _ in range(2):
            found = {}
            for batch in reader:
                lengths = np.asarray(batch.lengths).tolist()
                values = np.asarray(batch.activations)
                if values.ndim == 2:
                    values = np.split(values, np.cumsum(lengths)[:-1])
                numbers = np.asarray(batch.documents).tolist()
                for number, rows_of_one, length in zip(numbers, values, lengths, strict=True):
                    found[number] = rows_of_one[:length]
                    assert not rows_of_one[length:].any()
            for number, right in enumerate(expected):
                np.testing.assert_array_equal(found[number], right)
    mixed = np.concatenate(list(space.rows(batch_size=7, seed=1)))
    assert sorted(map(bytes, mixed.astype(np.float32))) == sorted(map(bytes, np.concatenate(expected)))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
def test_an_accelerator_widens_what_crosses_the_bus(dtype, tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe(dtype=dtype)) as space:
        space.put([key(n) for n in range(6)], [floats(n) for n in range(6)])
        device = SimulatedDevice()
        device.current = stream = device.new_stream("consumer")
        delivery = AcceleratorDelivery(dtype, device, packed=False, depth=1, deliver="bfloat16")
        keys = np.frombuffer(b"".join(key(n) for n in range(6)), np.uint8).reshape(6, 32)
        read = fetch(space, keys, delivery.buffers, packed=True)
        assert read.values.dtype == np.uint8
        batch = delivery.arrive(delivery.deliver(read, BatchMembers(keys, np.arange(6), None)))
        assert batch.activations.dtype == torch.bfloat16
        shadow, found = device.shadow(batch.activations), []
        stream.queue(lambda: found.append(shadow.clone()))
        device.finish()
        for n, entry in enumerate(space.get([key(n) for n in range(6)])):
            assert torch.equal(found[0][n, : n + 1], torch.from_numpy(entry.activations).bfloat16())
            assert not found[0][n, n + 1 :].any()


@each(everyday=("hdf5", "lmdb"))
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3+zstd"])
@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan, "no shape"])
def test_a_scale_that_is_none_is_corrupt_whatever_its_checksum_says(space, dtype, scale, tmp_path):
    """As a foreign writer may make it: the entry's checksum is right."""
    stored = codec.get(dtype).stored_rows(floats(3))
    if scale == "no shape":
        if dtype != "int8":
            pytest.skip("its scales have no shape")
        stored[1, -4] = 0x0F
    else:
        stored[1, -4:] = np.array([scale], "<f4").view(np.uint8)
    one = space.recipe
    seed = checksum.space_seed(one.fingerprint, one.dtype, one.hidden_size)
    keys, lengths = np.frombuffer(key(50), np.uint8).reshape(1, 32), np.array([4])
    sums, _ = checksum.entry_checksums(seed, keys, np.array([0]), lengths, {VALUES: stored})
    space.put_block(Block(keys, offsets_of(lengths), sums, {VALUES: stored}))
    out = np.empty((5, HIDDEN), np.float32)
    for read in (lambda: space.get([key(3), key(50)]), lambda: space.read_into([key(50)], out, dtype="float32")):
        with pytest.raises(CorruptEntryError) as caught:
            read()
        assert caught.value.keys == [key(50)]
    assert space.verify().corrupt == [key(50)]
    assert space.repair().quarantined == [key(50)]
    assert space.get([key(3), key(50)])[1] is None


@each(everyday=("hdf5", "lmdb"))
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3+zstd"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_others_are_in_place_where_one_is_corrupt(space, dtype, padded):
    """As numbers, too: with a foreign writer's entry among them whose scales are none."""
    stored = codec.get(dtype).stored_rows(floats(3))
    stored[:, -4:] = 255
    one, lengths = space.recipe, np.array([4])
    seed = checksum.space_seed(one.fingerprint, one.dtype, one.hidden_size)
    keys = np.frombuffer(key(50), np.uint8).reshape(1, 32)
    sums, _ = checksum.entry_checksums(seed, keys, np.array([0]), lengths, {VALUES: stored})
    space.put_block(Block(keys, offsets_of(lengths), sums, {VALUES: stored}))
    out = np.full((3, 6, HIDDEN) if padded else (11, HIDDEN), 7, np.float32)
    with pytest.raises(CorruptEntryError) as caught:
        space.read_into([key(1), key(50), key(4)], out, dtype="float32")
    assert caught.value.keys == [key(50)]
    first, last = (out[0, :2], out[2, :5]) if padded else (out[:2], out[6:])
    for found, number in ((first, 1), (last, 4)):
        np.testing.assert_array_equal(found, codec.get(dtype).decode(codec.get(dtype).stored_rows(floats(number))))


@pytest.mark.parametrize("kind", ["hdf5"])
def test_rows_without_scales_do_not_fit_the_space(kind, tmp_path):
    """A segment of plain bytes that stands in a space of int8: refused by its shape, not read as another's."""
    import h5py

    with actcache.open(tmp_path / "store") as store, store.space(recipe(dtype="int8")) as space:
        put(space, range(4))
    folder = tmp_path / "store/spaces" / recipe(dtype="int8").fingerprint
    for index in (folder / "index").glob("*"):
        index.unlink()
    (path,) = segment_files(folder)
    with h5py.File(path, "r+") as file:
        codes = file["values"][:, :HIDDEN]
        del file["values"]
        file.create_dataset("values", data=codes)
    with actcache.open(tmp_path / "store", "r") as store, store.space(recipe(dtype="int8")) as space:
        assert len(space) == 0
        assert "values is |u1" in str(space.damaged())


@each(everyday=("hdf5", "lmdb"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_exports_come_back_as_they_were(kind, space, dtype, tmp_path):
    keys = [key(n) for n in range(8)]
    for suffix in ("safetensors", "npz"):
        path = tmp_path / f"file.{suffix}"
        export_space(space, path)
        with actcache.open(kind.url(tmp_path / f"from-{suffix}")) as other:
            done = import_file(other, path)
            assert (done.entries, done.stored, done.corrupt) == (8, 8, [])
            with other.space(space.recipe) as found:
                np.testing.assert_array_equal(found.stored_checksums(keys), space.stored_checksums(keys))


def test_migration_between_codecs(tmp_path):
    """Lossless ones change no number; lossy ones take what was computed, not what another one has left."""
    with actcache.open(tmp_path / "old") as old:
        with old.space(recipe(dtype="float32")) as space:
            put(space, range(6))
        with actcache.open(f"lmdb:{tmp_path}/zstd") as new:
            assert migrate(old, new, dtype="float32+zstd").equal
            with new.space(recipe(dtype="float32+zstd")) as space:
                check(space, dict.fromkeys(range(6), 0), range(8))
            with actcache.open(f"zarr:{tmp_path}/int8") as lossy:
                assert migrate(new, lossy, dtype="int8+zstd").equal
                assert lossy.recipes() == [recipe(dtype="int8+zstd")]  # as if it had been stored so at once
                with lossy.space(recipe(dtype="int8+zstd")) as space:
                    assert space.verify().intact
                with actcache.open(tmp_path / "again") as again:
                    with pytest.raises(UsageError, match=r"float8_e4m3 would take digits from what int8.* has left"):
                        migrate(lossy, again, dtype="float8_e4m3")
                    assert migrate(lossy, again, dtype="int8").equal
                    assert migrate(lossy, again, dtype="float8_e4m3", force=True).equal
                    names = {one.stored_as for one in again.recipes()}
                    assert names == {"int8", "float8_e4m3 via int8+zstd"} or names == {"int8", "float8_e4m3 via int8"}


def test_what_is_too_large_for_the_dtype_that_is_asked_for(tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe(dtype="int8")) as space:
        space.put([key(0)], [np.full((2, HIDDEN), 1e6, np.float32)])
        with pytest.raises(CodecOverflowError, match="float16"):
            space.get([key(0)], dtype="float16")
        with pytest.raises(CodecOverflowError, match="float16"):
            list(space.reader([key(0)], dtype="float16"))
        assert space.get([key(0)])[0].activations.max() == pytest.approx(1e6, rel=0.01)
        with pytest.raises(ShapeError):
            space.read_into([key(0)], np.empty((2, HIDDEN), np.float32))  # stored form is bytes
        with pytest.raises(UsageError, match="NumPy has no bfloat16"):
            space.reader([key(0)], dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["int9", "zstd", "+zstd", "float16+zstd+zstd", "float16+lz4", "int8 ", 8, None])
def test_codecs_that_there_are_not(dtype):
    with pytest.raises(RecipeError):
        recipe(dtype=dtype)


def test_a_space_of_a_codec_that_is_not_there_is_named(tmp_path):
    """Another package's codec, on a machine without the package."""
    with actcache.open(tmp_path / "store") as store:
        with store.space(recipe()) as space:
            put(space, range(3))
        path = tmp_path / "store/spaces" / recipe().fingerprint / "recipe.json"
        path.write_text(path.read_text().replace('"float32"', '"int3_of_somebody"', 1).replace(": 1,", ": 2,", 1))
    with actcache.open(tmp_path / "store", "r") as store, pytest.raises(FormatError, match="int3_of_somebody"):
        store.recipe(recipe().fingerprint)


class Halved(codec.Codec):
    """What another package may bring: half of each number, as float32."""

    def encode(self, rows, out, *, what="the document"):
        out[:] = rows / 2

    def decode(self, stored):
        return stored * 2

    def bound(self, stored):
        return np.zeros(len(stored))


def test_another_package_brings_a_codec(tmp_path, monkeypatch):
    one = Halved("halved", np.dtype("<f4"), np.dtype("<f4"))
    point = SimpleNamespace(load=lambda: one, value="somebody:halved")
    monkeypatch.setattr(codec, "_plugged_in", lambda: {"halved": point})
    assert "halved" in codec.names()
    with actcache.open(tmp_path / "store") as store, store.space(recipe(dtype="halved+zstd")) as space:
        put(space, range(5))
        space.flush()
        check(space, dict.fromkeys(range(5), 0), range(7))
        np.testing.assert_array_equal(space.read_packed([key(1)]).columns[VALUES], rows(1) / 2)


def test_the_tests_own_knob():
    with stored_as("int8+zstd"):
        assert recipe().dtype == "int8+zstd"
        one = codec.get("int8")
        np.testing.assert_array_equal(one.decode(one.stored_rows(rows(3))), rows(3))
    assert recipe().dtype == "float32"
    assert len(ids(3)) == len(rows(3))

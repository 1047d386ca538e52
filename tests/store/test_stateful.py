"""Any sequence of operations by two handles on one space, against dictionaries."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import actcache
from actcache.testing.memory import backend as memory
from tests.support import ids, key, put, recipe, rows, stored_as
from tests.support.backends import KINDS

pytestmark = pytest.mark.processes

DOCUMENTS = 10
KEYS = [key(n) for n in range(DOCUMENTS)]
#: Nothing here depends on what a disk forgets: in memory it runs ten times as fast.
FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

_HANDLE = st.integers(0, 1)
_NUMBERS = st.lists(st.integers(0, DOCUMENTS - 1), min_size=1, max_size=4, unique=True)


class Handle:
    """One opened space, with what it sees and what it has put and not flushed."""

    def __init__(self, url, seen, options):
        self.store = actcache.open(url, **options)
        self.space = self.store.space(recipe(), segment_seconds=1e6)
        self.seen = dict(seen)
        self.pending = {}
        self.may_look_again = False  # segments that it sees have been removed: reading takes a new snapshot


class Machine(RuleBasedStateMachine):
    """A space and two handles. The test gives each backend a subclass with a ``url``."""

    options: tuple[dict, ...] = ({},)

    def url(self, folder: Path) -> str:
        raise NotImplementedError

    @initialize()
    def start(self):
        self.folder = Path(tempfile.mkdtemp(dir=FOLDER))
        self.durable = {}
        self.version = 0
        self.opened = 0
        self.handles = [self.open(), self.open()]

    def open(self):
        self.opened += 1
        return Handle(self.url(self.folder / "store"), self.durable, self.options[self.opened % len(self.options)])

    def publish(self, handle):
        self.durable.update(handle.pending)
        handle.pending.clear()

    def see(self, handle):
        handle.seen, handle.may_look_again = dict(self.durable), False

    @rule(which=_HANDLE, numbers=_NUMBERS, overwrite=st.booleans())
    def put(self, which, numbers, overwrite):
        handle = self.handles[which]
        self.version += 1
        fresh = numbers if overwrite else [n for n in numbers if n not in handle.seen and n not in handle.pending]
        assert put(handle.space, numbers, self.version, overwrite=overwrite) == len(fresh)
        handle.pending.update(dict.fromkeys(fresh, self.version))

    @rule(which=_HANDLE)
    def flush(self, which):
        handle = self.handles[which]
        handle.space.flush()
        self.publish(handle)
        self.see(handle)

    @rule(which=_HANDLE, numbers=_NUMBERS)
    def delete(self, which, numbers):
        handle = self.handles[which]
        self.publish(handle)  # deleting flushes
        assert handle.space.delete([KEYS[n] for n in numbers]) == len(self.durable.keys() & set(numbers))
        for n in numbers:
            self.durable.pop(n, None)
        self.see(handle)

    @rule(
        which=_HANDLE,
        waste=st.sampled_from([0.0, 0.5, 1.0]),
        kept=st.booleans(),
        most=st.sampled_from([300, 1 << 30]),
    )
    def compact(self, which, waste, kept, most):
        handle, other = self.handles[which], self.handles[1 - which]
        handle.space.compact(waste=waste, grace=60.0 if kept else 0.0, target_bytes=most)
        self.publish(handle)  # compacting flushes
        self.see(handle)
        other.may_look_again |= not kept

    @rule(which=_HANDLE)
    def refresh(self, which):
        self.handles[which].space.refresh()
        self.see(self.handles[which])

    @rule(which=_HANDLE)
    def verify(self, which):
        found = self.handles[which].space.verify()
        assert found.intact
        assert found.entries == len(self.durable)
        self.see(self.handles[which])

    @rule(which=_HANDLE)
    def reopen(self, which):
        self.handles[which].store.close()
        self.publish(self.handles[which])
        self.handles[which] = self.open()

    @rule(which=_HANDLE)
    def kill(self, which):
        """The process ends without flushing."""
        handle = self.handles[which]
        handle.space._writer.abandon()
        handle.pending.clear()
        handle.store.close()
        self.handles[which] = self.open()

    @invariant()
    def handles_see_what_they_should(self):
        for handle in getattr(self, "handles", ()):
            found = {}
            for n, entry in enumerate(handle.space.get(KEYS)):
                if entry is not None:
                    known = {handle.seen.get(n), handle.pending.get(n), self.durable.get(n)} - {None}
                    fits = [v for v in known if np.array_equal(entry.activations, rows(n, v))]
                    assert fits, f"{n} is served with rows that nobody has put"
                    found[n] = fits[0]
                    np.testing.assert_array_equal(entry.token_ids, ids(n, fits[0]))
            if handle.may_look_again and found != {**handle.seen, **handle.pending}:
                self.see(handle)
            assert found == {**handle.seen, **handle.pending}
            assert handle.space.contains(KEYS).tolist() == [n in found for n in range(DOCUMENTS)]
            assert list(handle.space.keys()) == sorted(KEYS[n] for n in found)
            assert handle.space.damaged() == {}

    def teardown(self):
        for handle in getattr(self, "handles", ()):
            handle.store.close()
        if hasattr(self, "folder"):
            memory.forget(str(self.folder / "store"))
            shutil.rmtree(self.folder)


def machine(name):
    kind = KINDS.get(name)
    if kind is not None and not kind.installed:
        pytest.skip(f"{name} is not installed")

    class Chosen(Machine):
        options = kind.options if kind is not None else ({},)

        def url(self, folder):
            return f"{name}:{folder}"

    return Chosen


def run(name, examples, steps):
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine(name), settings=chosen)


@pytest.mark.parametrize("name", ["ram", *KINDS])
def test_any_sequence_of_operations(name):
    run(name, 5, 25)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("hdf5", "int8"), ("safetensors", "float16+zstd"), ("lmdb", "int8+zstd")),
        *(
            pytest.param(name, dtype, marks=pytest.mark.long)
            for name in KINDS
            for dtype in ("int8", "float16+zstd", "int8+zstd")
        ),
    ],
)
def test_any_sequence_of_operations_on_codecs(name, dtype):
    with stored_as(dtype):
        run(name, 2, 25)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["ram", *KINDS])
@pytest.mark.parametrize("dtype", ["float32", "int8", "float32+zstd", "int8+zstd"])
def test_many_sequences_of_operations(name, dtype):
    with stored_as(dtype):
        run(name, 1000 if dtype == "float32" else 250, 50)

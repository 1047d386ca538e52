"""Delivery over a simulated device, which does everything as late as it may and spoils memory as soon as it may.

Each step of the protocol is left out once, and the same machine must then find it out.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

import actcache
from actcache.reader import streams
from actcache.reader.accelerator import AcceleratorDelivery, PinnedBuffers
from actcache.reader.delivery import BatchMembers
from actcache.reader.fetch import HostBatch
from tests.support import HIDDEN as HIDDEN_OF_A_SPACE
from tests.support import ids, key, length, put, recipe, rows
from tests.support.simulated_device import POISON, SimulatedDevice

HIDDEN = 4
DEPTH = 1
#: What is found in a batch, and what has to be.
FIELDS = ("activations", "token_ids", "lengths", "documents", "labels")


def documents(number):
    """Lengths, rows, token ids and labels of a batch: numbers that no other batch has."""
    rng = np.random.default_rng(number)
    lengths = rng.integers(1, 5, rng.integers(1, 4))
    total = int(lengths.sum())
    rows = (1000 * number + np.arange(total * HIDDEN)).astype(np.float32).reshape(total, HIDDEN)
    return lengths, rows, np.arange(total, dtype=np.int32) + 500 * number, np.arange(len(lengths)) + number


class Readers(RuleBasedStateMachine):
    """A thread that reads, consumers on two streams that keep their batches or drop them, and the device between them.

    Everything happens in one thread here, in the order that hypothesis picks; what the device does of what was queued
    is up to it, too.
    """

    make_delivery = AcceleratorDelivery
    padded = True

    def __init__(self):
        super().__init__()
        self.device = SimulatedDevice()
        self.consumers = [self.device.new_stream(f"consumer {n}") for n in range(2)]
        self.delivery = self.make_delivery("float32", self.device, packed=not self.padded, depth=DEPTH)
        self.number = 0
        self.on_the_way = []
        self.kept = []
        self.wrong = []

    @precondition(lambda self: len(self.on_the_way) <= DEPTH)
    @rule()
    def read(self):
        lengths, rows, ids, labels = documents(self.number)
        values = self.delivery.buffers.take(rows.shape, rows.dtype)
        values.view(np.uint8)[:] = POISON  # whoever is still copying out of it shall see that
        values[:] = rows
        members = BatchMembers(np.zeros((len(lengths), 32), np.uint8), labels + 7, labels)
        delivered = self.delivery.deliver(HostBatch(values, ids, lengths), members)
        self.on_the_way.append((self.number, delivered))
        self.number += 1

    @precondition(lambda self: self.on_the_way)
    @rule(consumer=st.integers(0, 1), steps=st.integers(1, 2), keep=st.booleans())
    def consume(self, consumer, steps, keep):
        number, delivered = self.on_the_way.pop(0)
        self.device.current = stream = self.consumers[consumer]
        batch = self.delivery.arrive(delivered)
        del delivered
        for _ in range(steps):
            self.compute(number, batch, stream)
        if keep:
            self.kept.append((number, batch, stream))

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), again=st.booleans())
    def drop(self, data, again):
        number, batch, stream = self.kept.pop(data.draw(st.integers(0, len(self.kept) - 1)))
        if again:
            self.compute(number, batch, stream)

    @precondition(lambda self: self.on_the_way)
    @rule()
    def break_off(self):
        self.on_the_way.clear()

    @precondition(lambda self: any(stream.ready for stream in self.device.streams))
    @rule(data=st.data(), most=st.integers(1, 12))
    def work(self, data, most):
        stream = data.draw(st.sampled_from([s for s in self.device.streams if s.ready]), "stream")
        for _ in range(most):
            if not stream.ready:
                break
            self.device.step(stream)
        self.check()

    @rule()
    def ask_for_times(self):
        self.delivery.spent()

    def compute(self, number, batch, stream):
        """Queue a kernel that looks at all of a batch; what it finds is compared when it runs."""
        shadows = {name: self.device.shadow(getattr(batch, name)) for name in FIELDS}
        if self.padded:
            shadows["attention_mask"] = self.device.shadow(batch.attention_mask)

        def look():
            found = {name: tensor.clone().numpy() for name, tensor in shadows.items()}
            self.wrong += compare(number, found, self.padded)

        stream.queue(look)

    def check(self):
        assert not self.wrong, self.wrong

    def teardown(self):
        self.device.finish()
        self.check()


def compare(number, found, padded):
    """Return what is not as it has to be."""
    lengths, rows, ids, labels = documents(number)
    expected = {"lengths": lengths, "documents": labels + 7, "labels": labels, "activations": rows, "token_ids": ids}
    if padded:
        longest = lengths.max()
        mask = np.arange(longest) < lengths[:, None]
        expected |= {
            "attention_mask": mask,
            "activations": np.zeros((*mask.shape, HIDDEN), np.float32),
            "token_ids": np.zeros(mask.shape, np.int64),
        }
        expected["activations"][mask], expected["token_ids"][mask] = rows, ids
    return [f"{name} of batch {number}" for name, value in expected.items() if not np.array_equal(found[name], value)]


# --- steps that are left out -----------------------------------------------------------------------------------------


class GivesBuffersBackAtOnce(AcceleratorDelivery):
    """A buffer is used again before its copy has ended."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        give_back = self.buffers.give_back
        self.buffers.give_back = lambda array, copied: give_back(array, None)


class BuffersThatDoNotWait(PinnedBuffers):
    def give_back(self, array, copied):
        super().give_back(array, SimpleNamespace(query=copied.query, synchronize=lambda: None))


class DoesNotWaitForBuffers(AcceleratorDelivery):
    """Where no buffer is free, one is taken whose copy still runs."""

    def __init__(self, dtype, device, *, packed, depth):
        super().__init__(dtype, device, packed=packed, depth=depth)
        self.buffers = BuffersThatDoNotWait(depth + 3, device.allocate)


class RecordsTheCopyTooEarly(AcceleratorDelivery):
    """The event at which a buffer is free stands before the copy in its stream."""

    def deliver(self, read, members):
        give_back, before = self.buffers.give_back, self._device.event()
        self.buffers.give_back = lambda array, copied: give_back(array, before)
        try:
            return super().deliver(read, members)
        finally:
            del self.buffers.give_back


class ReadsBeforeTheEvent(AcceleratorDelivery):
    """The consumer's stream does not wait for the batch."""

    def arrive(self, delivered):
        for value in vars(delivered.batch).values():
            if isinstance(value, torch.Tensor):
                self._device.record(value, self._device.consumer())
        return delivered.batch


class WaitsForTheCopyAlone(AcceleratorDelivery):
    """The consumer's stream waits for the rows, but not for what is computed of them and copied after them."""

    def deliver(self, read, members):
        delivered = super().deliver(read, members)
        return type(delivered)(delivered.batch, self._timed[-1][1])


class DoesNotRecord(AcceleratorDelivery):
    """Memory is handed to the consumer's stream, and its own stream uses it again when it is freed."""

    def arrive(self, delivered):
        self._device.wait(self._device.consumer(), delivered.ready)
        return delivered.batch


class RecordsActivationsAlone(AcceleratorDelivery):
    """The same of the small arrays."""

    def arrive(self, delivered):
        stream = self._device.consumer()
        self._device.wait(stream, delivered.ready)
        self._device.record(delivered.batch.activations, stream)
        return delivered.batch


BUGS = [
    GivesBuffersBackAtOnce,
    DoesNotWaitForBuffers,
    RecordsTheCopyTooEarly,
    ReadsBeforeTheEvent,
    WaitsForTheCopyAlone,
    DoesNotRecord,
    RecordsActivationsAlone,
]


def run(delivery, padded, **options):
    machine = type("Machine", (Readers,), {"make_delivery": delivery, "padded": padded})
    run_state_machine_as_test(
        machine, settings=settings(stateful_step_count=30, suppress_health_check=list(HealthCheck), **options)
    )


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
def test_whatever_the_device_does_first_batches_are_right(padded):
    run(AcceleratorDelivery, padded)


@pytest.mark.parametrize("bug", BUGS)
def test_a_step_that_is_left_out_is_found(bug):
    with pytest.raises(AssertionError, match="of batch"):
        run(bug, True, phases=(Phase.generate,), max_examples=300, derandomize=True, database=None)


def test_the_processor_waits_only_where_no_buffer_is_free():
    device = SimulatedDevice()
    delivery = AcceleratorDelivery("float32", device, packed=True, depth=DEPTH)
    on_the_way = []
    for number in range(DEPTH + 3):
        lengths, rows, ids, labels = documents(number)
        values = delivery.buffers.take((100, HIDDEN), np.float32)[: len(rows)]
        values[:] = rows
        members = BatchMembers(np.zeros((len(lengths), 32), np.uint8), labels, labels)
        on_the_way.append(delivery.deliver(HostBatch(values, ids, lengths), members))
    device.current = device.new_stream("consumer")
    delivery.arrive(on_the_way[0])
    delivery.spent()
    assert device.copies.done == 0  # the device has not even begun, and nobody minds
    delivery.buffers.take((100, HIDDEN), np.float32)
    assert device.copies.done == 3  # an event, the oldest copy, and the event after it
    assert delivery.spent() == (0.0, 0.0)  # no batch is there yet
    device.finish()
    assert min(delivery.spent()) > 0


# --- by way of a reader ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def space(request, tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe(dtype=request.param)) as space:
        put(space, range(30))
        space.flush()
        yield space


def simulated(device):
    simulation = SimulatedDevice()
    simulation.current = simulation.new_stream("consumer")
    return simulation


@pytest.mark.parametrize("make", [simulated, lambda device: streams.OneStreamDevice(torch.device("cpu"))])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("depth", [0, 2])
def test_a_reader_delivers_what_is_stored(space, layout, depth, make, monkeypatch):
    made = []
    monkeypatch.setattr(streams, "async_device", lambda device: made.append(make(device)) or made[-1])
    numbers = list(range(30))
    reader = space.reader(
        [key(n) for n in numbers], batch_size=7, shuffle=True, layout=layout, depth=depth, device="meta", labels=numbers
    )
    batches = list(reader)
    if make is simulated:
        made[0].finish()
        assert made[0].copies_done > len(batches)
    seen = []
    for batch in batches:
        assert batch.labels.tolist() == batch.documents.tolist()
        seen += batch.documents.tolist()
        for i, n in enumerate(batch.documents.tolist()):
            if layout == "packed":
                part = slice(int(batch.offsets[i]), int(batch.offsets[i + 1]))
                found, found_ids = batch.activations[part], batch.token_ids[part]
            else:
                found, found_ids = batch.activations[i, : length(n)], batch.token_ids[i, : length(n)]
                assert batch.attention_mask[i].sum() == length(n)
                assert not batch.activations[i, length(n) :].any()
            np.testing.assert_array_equal(found.float().numpy(), rows(n))
            np.testing.assert_array_equal(found_ids.numpy(), ids(n))
    assert sorted(seen) == numbers
    stats = reader.stats()
    assert stats.copy_seconds > 0
    assert stats.decode_seconds > 0


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("normalize", [None, "standard"])
def test_rows_are_delivered_as_they_are_on_the_cpu(space, depth, normalize, monkeypatch):
    """By a device of one stream: the simulated one knows copies alone, and rows are joined on the device."""
    monkeypatch.setattr(streams, "async_device", lambda device: streams.OneStreamDevice(torch.device("cpu")))
    options = {
        "batch_size": 7,
        "buffer": 64 * HIDDEN_OF_A_SPACE * 4,
        "stretch": 8 * HIDDEN_OF_A_SPACE * 4,
        "beside": ("documents", "positions", "token_ids"),
        "normalize": normalize,
    }
    keys = [key(n) for n in range(30)]
    batches = list(space.rows(keys, device="meta", depth=depth, **options))
    expected = list(space.rows(keys, device="cpu", depth=depth, **options))
    assert len(batches) == len(expected) > 3
    for batch, wanted in zip(batches, expected, strict=True):
        for name in ("documents", "positions", "token_ids"):
            np.testing.assert_array_equal(getattr(batch, name).numpy(), getattr(wanted, name).numpy())
        np.testing.assert_allclose(batch.rows.float().numpy(), wanted.rows.float().numpy(), rtol=1e-6, atol=1e-6)


# --- torch's own -----------------------------------------------------------------------------------------------------


class Accelerator:
    """What is asked of ``torch.accelerator``: two devices, of which the first is the current one."""

    def __init__(self):
        self.device = 0
        self.streams = {n: f"the default stream of device {n}" for n in range(2)}
        self.devices = {name: n for n, name in self.streams.items()} | {"copies": 1}

    def current_stream(self, device=None):
        return self.streams[self.device if device is None else device.index]

    def set_stream(self, stream):
        self.device = self.devices[stream]
        self.streams[self.device] = stream


def test_the_stream_for_copies_leaves_no_trace(monkeypatch):
    accelerator = Accelerator()
    monkeypatch.setattr(torch, "accelerator", accelerator)
    monkeypatch.setattr(torch, "Stream", lambda device: "copies")
    device = streams.TorchDevice(torch.device("cuda", 1))
    before = dict(accelerator.streams)
    with device.copying():
        assert (accelerator.device, device.consumer()) == (1, "copies")
    assert (accelerator.device, accelerator.streams) == (0, before)

    def fail():
        with device.copying():
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert (accelerator.device, accelerator.streams) == (0, before)


@pytest.mark.parametrize(
    ("built_for", "asked", "kind"),
    [
        ("cuda", "cuda:1", "TorchDevice"),
        ("xpu", "xpu:0", "TorchDevice"),
        ("mps", "mps", "OneStreamDevice"),
        ("cuda", "meta", "OneStreamDevice"),
        (None, "meta", "OneStreamDevice"),
    ],
)
def test_which_devices_have_streams(built_for, asked, kind, monkeypatch):
    current = None if built_for is None else torch.device(built_for)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: current)
    monkeypatch.setattr(torch, "Stream", lambda device: device)
    assert type(streams.async_device(torch.device(asked))).__name__ == kind

"""A library installs no signal handlers: what a fill loses when its process is killed is bounded by time.

The clock is the test's, and moves with each batch that is computed. What a kill would lose is what another handle on
the store does not see.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import actcache
from actcache import Recycler, Recyclers
from actcache.errors import MissingEntryError, OutOfSpaceError
from actcache.models.filling import Filler
from actcache.models.lower_half import LowerHalf
from tests.entries.test_writer_clock import Hand, until
from tests.support.tiny import save_tiny

BOUND = 60.0  #: seconds, as docs/reliability.md says
STEP = 7.0  #: that a batch takes
TEXTS = [f"text {i} " + "ab " * (i % 11) for i in range(150)]
WORKING = {"token_budget": 64, "progress": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def clock(monkeypatch):
    """A clock for all: a batch takes ``STEP`` seconds."""
    hand = Hand()
    monkeypatch.setattr("actcache.entries.writer.Clock", lambda: hand)
    monkeypatch.setattr(Filler, "_now", staticmethod(hand.now))
    return hand


class Watch:
    """Looks, whenever a batch is computed, at what a kill would lose."""

    def __init__(self, clock: Hand, store, recycler: Recycler, monkeypatch) -> None:
        self.clock, self.store, self.recipe, encoder = clock, store, recycler.recipe, recycler.agreement.encoder
        self.computed: dict[bytes, float] = {}  # token ids -> when
        self.worst = 0.0
        self.batches = 0
        entries = itertools.chain.from_iterable(encoder.encode(TEXTS, range(len(TEXTS))))
        self.ours = {np.asarray(one.token_ids, np.int32).tobytes() for one in entries}  # those of canaries are not
        self.stop_at: int | None = None
        self.bound = BOUND
        monkeypatch.setattr(LowerHalf, "run_at", self._wrapped(LowerHalf.run_at))

    def _wrapped(self, real):
        def run(lower, *given):
            ids = {np.asarray(one, np.int32).tobytes() for one in given[-2]}
            if self.batches == self.stop_at:
                raise KeyboardInterrupt
            result = real(lower, *given)
            if not ids <= self.ours:
                return result
            self.clock.turn(STEP)
            self.batches += 1
            self.computed |= dict.fromkeys(ids, self.clock.now())
            self.look()
            return result

        return run

    def seen(self) -> set[bytes]:
        with actcache.open(self.store, "r") as other, other.space(self.recipe) as space:
            return {entry.token_ids.tobytes() for entry in space.get(list(space.keys()))}

    def look(self) -> None:
        """Find what would be lost now; what is being published, by a thread that nothing holds up, is waited for."""

        def due() -> set[bytes]:
            return {ids for ids, when in self.computed.items() if self.clock.now() - when > self.bound}

        until(lambda: due() <= self.seen())
        there = self.seen()
        ages = [self.clock.now() - when for ids, when in self.computed.items() if ids not in there]
        self.worst = max([self.worst, *ages])


@pytest.mark.parametrize("layers", [[2], [1, 3]])
def test_a_fill_loses_at_most_its_last_minute(layers, model, clock, tmp_path, monkeypatch):
    with Recyclers.from_pretrained(model, layers=layers, store=tmp_path / "s", dtype="float32") as recyclers:
        watches = Watch(clock, tmp_path / "s", recyclers[layers[-1]], monkeypatch)
        report = recyclers.fill(TEXTS, **WORKING)
        assert report.computed == len(TEXTS)
        segments = recyclers[layers[0]].space.usage().segments
    assert watches.batches * STEP > 3 * BOUND
    assert BOUND / 2 < watches.worst <= BOUND
    assert segments <= watches.batches * STEP / 45 + 1  # no more than the time asks for


def test_windows_of_a_document_become_visible_together(model, clock, tmp_path, monkeypatch):
    options = {"max_length": 16, "too_long": actcache.windows(16, 4)}
    with Recycler.from_pretrained(model, layer=2, store=tmp_path / "s", dtype="float32", **options) as recycler:
        watch = Watch(clock, tmp_path / "s", recycler, monkeypatch)
        watch.stop_at, watch.bound = 30, float("inf")
        with pytest.raises(KeyboardInterrupt):
            recycler.fill(TEXTS, **WORKING)
    monkeypatch.undo()
    with Recycler.from_pretrained(model, layer=2, store=tmp_path / "s", dtype="float32", **options) as recycler:
        held = len(recycler.space)
        complete = 0
        for text in TEXTS:
            try:
                complete += len(recycler.keys([text]))
            except MissingEntryError:
                continue
        assert 0 < complete == held
        recycler.fill(TEXTS, **WORKING)
        assert sum(len(recycler.keys([text])) for text in TEXTS) == len(recycler.space)


def test_an_interrupt_in_the_middle_of_a_group_keeps_all_that_is_computed(model, clock, tmp_path, monkeypatch):
    with Recycler.from_pretrained(model, layer=2, store=tmp_path / "s", dtype="float32") as recycler:
        watch = Watch(clock, tmp_path / "s", recycler, monkeypatch)
        watch.stop_at = 13
        with pytest.raises(KeyboardInterrupt):
            recycler.fill(TEXTS, **WORKING)
        assert watch.seen() == watch.computed.keys()
        assert len(watch.computed) >= 13


def test_an_interrupt_while_rows_are_put_keeps_all(model, tmp_path, monkeypatch):
    """Of each layer, though the first one's ``put`` was what was interrupted."""
    with Recyclers.from_pretrained(model, layers=[1, 3], store=tmp_path / "s", dtype="float32") as recyclers:
        space = recyclers[3].space
        real, interrupts = space.put_packed, iter([False, True])

        def put(*given, **named):
            count = real(*given, **named)
            if next(interrupts, False):
                raise KeyboardInterrupt
            return count

        monkeypatch.setattr(space, "put_packed", put)
        with pytest.raises(KeyboardInterrupt):
            recyclers.fill(TEXTS, **WORKING)
        held = [len(recyclers[layer].space) for layer in (1, 3)]
        assert held[0] == held[1] > 0


def test_one_layer_that_cannot_be_stored_does_not_cost_the_others(model, tmp_path, monkeypatch):
    def full() -> None:
        raise OutOfSpaceError("full")

    recyclers = Recyclers.from_pretrained(model, layers=[1, 3], store=tmp_path / "s", dtype="float32")
    recipe = recyclers[3].recipe
    monkeypatch.setattr(recyclers[1].space, "flush", full)
    monkeypatch.setattr(recyclers[1].space, "close", full)
    with pytest.raises(OutOfSpaceError), recyclers:
        recyclers.fill(TEXTS, **WORKING)
    with actcache.open(tmp_path / "s", "r") as store, store.space(recipe) as space:
        assert len(space) == len(TEXTS)


def test_what_a_reader_computes_is_stored_within_the_bound(model, clock, tmp_path, monkeypatch):
    """Also when all is there by now, and only training goes on."""
    with Recycler.from_pretrained(model, layer=2, store=tmp_path / "s", dtype="float32") as recycler:
        watch = Watch(clock, tmp_path / "s", recycler, monkeypatch)
        epoch = iter(recycler.reader(TEXTS, on_missing="compute", batch_size=8))
        for _ in range(12):
            next(epoch)
        assert watch.worst <= BOUND
        clock.turn(BOUND)
        until(lambda: watch.seen() == watch.computed.keys())
        epoch.close()

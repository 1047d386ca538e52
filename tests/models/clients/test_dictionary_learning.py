"""dictionary_learning's own ``trainSAE`` over a stored space. Run by ``make test-clients``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actcache
from actcache.errors import MissingEntryError, ShapeError, UsageError
from actcache.models.clients.dictionary_learning import ActivationBuffer
from tests.support import HIDDEN, key, put, recipe, rows

COUNT = 40
KEYS = [key(n) for n in range(COUNT)]
OPTIONS: dict[str, Any] = {"out_batch_size": 16, "buffer": "64KiB", "stretch": "1KiB"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    with actcache.open(tmp_path / "store") as store:
        for layer in (1, 2):
            with store.space(recipe(layer=layer)) as space:
                put(space, range(COUNT))
        yield store


def test_it_is_a_buffer(store: Any) -> None:
    """Each row once an epoch, for ever; and it goes on with the next row."""
    every = Counter(row.tobytes() for n in range(COUNT) for row in rows(n))
    with store.space(recipe()) as space:
        buffer = ActivationBuffer(space, KEYS, **OPTIONS)
        seen, batches = Counter[bytes](), 0
        while seen.total() < 2 * every.total():
            batch = next(buffer)
            assert batch.shape[1:] == (HIDDEN,)
            seen.update(row.tobytes() for row in batch.numpy())
            batches += 1
        assert seen == Counter({row: 2 * times for row, times in every.items()})
        state = buffer.state_dict()
        following = next(buffer)
        again = ActivationBuffer(space, KEYS, **OPTIONS)
        again.load_state_dict(state)
        assert torch.equal(next(again), following)
        assert json.dumps(buffer.config)
        buffer.close()
        again.close()
        with pytest.raises(UsageError, match="rows alone"):
            ActivationBuffer(space, beside="documents")
        with pytest.raises(MissingEntryError):
            ActivationBuffer(space, [key(99)])
        with store.space(recipe(layer=2)) as other:
            both = ActivationBuffer((space, other), KEYS, **OPTIONS)
            batch = next(both)
            assert batch.shape == (16, 2, HIDDEN)
            np.testing.assert_array_equal(batch[:, 0], batch[:, 1])  # the same numbers lie in both
            assert both.config["io"] == "in_and_out"
            both.close()
            other.delete(KEYS[:1])
            put(space, [99])
            with pytest.raises((ShapeError, MissingEntryError)):
                ActivationBuffer((space, other), **OPTIONS)


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore")  # the library's own
def test_its_trainer_saves_a_dictionary(store: Any, tmp_path: Path) -> None:
    library = pytest.importorskip(
        "dictionary_learning", reason="dictionary_learning is not installed: make test-clients"
    )
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
    from dictionary_learning.training import trainSAE

    assert library
    with store.space(recipe()) as space:
        buffer = ActivationBuffer(space, **OPTIONS)
        trainer = {
            "trainer": TopKTrainer,
            "activation_dim": HIDDEN,
            "dict_size": 16,
            "k": 4,
            "layer": 1,
            "lm_name": "tests",
            "steps": 30,
            "warmup_steps": 2,
            "device": "cpu",
            "seed": 0,
        }
        trainSAE(buffer, [trainer], steps=30, save_dir=str(tmp_path / "out"), device="cpu", normalize_activations=True)
        buffer.close()
    saved = json.loads((tmp_path / "out" / "trainer_0" / "config.json").read_text())
    assert saved["buffer"]["spaces"] == [recipe().fingerprint]
    sae = AutoEncoderTopK.from_pretrained(str(tmp_path / "out" / "trainer_0" / "ae.pt"), k=4)
    assert sae(torch.from_numpy(rows(3))).shape == rows(3).shape

"""NumPy's numbers wherever a model's part takes whole numbers; fractions and truth values nowhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import actcache
from actcache import Recycler, Recyclers
from actcache.errors import LayerError, RecipeError, UsageError
from actcache.models import DocumentEncoder, add_adapters
from actcache.models.parallel import fill as fill_parallel
from actcache.models.replay import reduce
from actcache.models.training.pooling import WeightedPooling
from actcache.models.training.sweep import Candidate, sweep
from actcache.models.vocabulary import Vocabulary, count_vocabulary
from tests.support.tiny import HIDDEN, save_tiny

TEXTS = [f"{'good' if i % 2 else 'bad'} {i}" for i in range(8)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[Any, Any]:
    return AutoModel.from_pretrained(tiny).eval(), AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def task(tiny: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=2).eval()


@pytest.fixture(scope="module")
def recyclers(loaded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recyclers]:
    store = tmp_path_factory.mktemp("numbers") / "store"
    with Recyclers(*loaded, layers=np.array([1, 2]), store=store, dtype="float32") as made:
        made.fill(TEXTS, token_budget=np.int64(64), progress=np.False_)
        yield made


def test_a_recycler_of_numpys_numbers_is_the_same(loaded: tuple[Any, Any], tmp_path: Path, task: Any) -> None:
    with actcache.open(tmp_path / "store") as store:
        plain = Recycler(*loaded, layer=2, store=store, max_length=20, too_long=actcache.windows(8, 2))
        same = Recycler(
            *loaded,
            layer=np.int64(2),
            store=store,
            max_length=np.int32(20),
            too_long=actcache.windows(np.uint8(8), np.int64(2)),
            special_tokens=np.True_,
        )
        assert same.recipe.fingerprint == plain.recipe.fingerprint
        assert json.loads(json.dumps(same.recipe.to_json()))["identity"] == plain.recipe.identity()
        plain.fill(TEXTS, progress=False)
        same.space.refresh()
        assert same.fill(TEXTS, progress=False).computed == 0
        assert same.verify(np.int64(3), seed=np.uint32(1)).ok
        same.reduce(task).save_pretrained(tmp_path / "reduced")
        plain.load_reduced(tmp_path / "reduced")
        assert reduce(task, np.int64(2)).actcache_layer == 2


def test_several_layers(recyclers: Recyclers, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    assert list(recyclers) == [1, 2]
    assert recyclers[np.int64(2)] is recyclers[2]
    for layers in (range(1, 3), (np.int8(2), 1), [1]):
        with Recyclers(*loaded, layers=layers, store=tmp_path / "store") as some:
            assert all(type(layer) is int for layer in some)
    for layers in ([], [2, np.int64(2)], [1.0, 2.0], [True, 2], np.array([0.5]), "12", 2.0):
        with pytest.raises(UsageError, match="layers are"):
            Recyclers(*loaded, layers=layers, store=tmp_path / "store")


@pytest.mark.parametrize("value", [2.0, np.float32(2), True, np.True_, "2", np.array([2])], ids=repr)
def test_fractions_and_truth_values_are_refused(
    value: Any, loaded: tuple[Any, Any], tiny: Path, recyclers: Recyclers, task: Any, tmp_path: Path
) -> None:
    store, one = tmp_path / "store", recyclers[2]
    refusals: list[tuple[type[Exception], Callable[[], Any]]] = [
        (LayerError, lambda: Recycler(*loaded, layer=value, store=store)),
        (LayerError, lambda: Recycler.from_pretrained(tiny, layer=value, store=store)),
        (LayerError, lambda: reduce(task, value)),
        (RecipeError, lambda: Recycler(*loaded, layer=2, store=store, max_length=value)),
        (UsageError, lambda: DocumentEncoder(loaded[1], value)),
        (UsageError, lambda: one.fill(["new"], token_budget=value, progress=False)),
        (UsageError, lambda: recyclers.fill(["new"], token_budget=value, progress=False)),
        (
            UsageError,
            lambda: fill_parallel(["new"], tiny, devices=["cpu"], store=store, layers=[2], token_budget=value),
        ),
        (UsageError, lambda: one.verify(value)),
        (UsageError, lambda: one.verify(2, seed=value)),
        (UsageError, lambda: one.regime("NR", task, TEXTS, batch_size=value)),
        (UsageError, lambda: one.regime("R", task, TEXTS, seed=value)),
        (UsageError, lambda: one.regime("F", task, TEXTS).batches.set_epoch(value)),
        (UsageError, lambda: add_adapters(task, value)),
        (UsageError, lambda: add_adapters(task, 4, layers=[value])),
        (UsageError, lambda: WeightedPooling(value, 8, 2)),
        (UsageError, lambda: count_vocabulary(TEXTS, loaded[1], threads=value)),
        (UsageError, lambda: count_vocabulary(TEXTS, loaded[1], keep=[value])),
        (UsageError, lambda: sweep(recyclers, task, TEXTS, [0] * 8, held_out=[value])),
        (UsageError, lambda: sweep(recyclers, task, TEXTS, [0] * 8, held_out=[0], epochs=value)),
    ]
    for error, use in refusals:
        with pytest.raises(error):
            use()
    assert not one.space.contains(one.keys(["new"])).any()
    for other in (1, 0, None):
        with pytest.raises(UsageError, match="special_tokens"):
            Recycler(*loaded, layer=2, store=store, special_tokens=other)  # type: ignore[arg-type]


def test_a_sweep_of_numpys_numbers(recyclers: Recyclers, task: Any) -> None:
    def found(labels: Any, held_out: Any, epochs: Any, seed: Any) -> list[Candidate]:
        return sweep(
            recyclers, task, TEXTS, labels, held_out=held_out, epochs=epochs, seed=seed, batch_size=4, rate=1e-2
        )

    labels = [0, 1] * 4
    plain = found(labels, [0, 5], 2, 3)
    # A Series goes by position, whatever its index says.
    series = pandas.Series(labels, index=range(7, -1, -1))
    same = found(series, np.array([0, 5], np.int8), np.int64(2), np.int32(3))
    assert [one.metric for one in plain] == [one.metric for one in same]
    with pytest.raises(UsageError, match="held_out"):
        found(labels, np.arange(8) < 2, 1, 0)  # a mask is no list of positions


def test_adapters_of_numpys_numbers_are_saved(task: Any, tmp_path: Path) -> None:
    add_adapters(task, np.int64(4), layers=np.array([3, 4]))
    spec = task.actcache_adapters
    assert (type(spec.bottleneck), spec.layers) == (int, (3, 4))
    assert WeightedPooling(np.int64(2), np.int64(HIDDEN), np.int64(2)).classifier.in_features == HIDDEN


def test_a_vocabulary_of_numpys_numbers(loaded: tuple[Any, Any]) -> None:
    found = count_vocabulary(TEXTS, loaded[1], keep=np.array([50, 60], np.uint8), threads=np.int64(1))
    assert {50, 60} <= set(found.ids.tolist())
    assert Vocabulary.of(np.array([3, 4], np.int16)).ids.tolist() == [3, 4]
    with pytest.raises(UsageError):
        Vocabulary.of([1.5])  # type: ignore[list-item]

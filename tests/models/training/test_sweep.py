"""Several layers read jointly, pooled by weights, and swept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    get_linear_schedule_with_warmup,
)

import actcache
from actcache import Recyclers
from actcache.errors import DataError, LowerHalfMismatchError, MissingEntryError, ShapeError, UsageError
from actcache.models import add_adapters
from actcache.models.training.joint import JointReader, read_jointly
from actcache.models.training.pooling import WeightedPooling
from actcache.models.training.sweep import accuracy, evaluate, sweep

Make = Callable[..., PreTrainedModel]

TEXTS = [("good " if i % 2 else "bad ") + f"document {i} says " + "la " * (i % 13) + "." for i in range(40)]
LABELS = np.arange(40) % 2


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def filled(make_model: Make, tokenizer: Any, folder: Path) -> Recyclers:
    made = Recyclers(make_model(AutoModel), tokenizer, layers=[3, 1], store=folder, dtype="float32")
    made.fill(TEXTS, progress=False)
    return made


@pytest.fixture(scope="module")
def recyclers(make_model: Make, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recyclers]:
    """Shared by the tests: they must not change it."""
    with filled(make_model, tokenizer, tmp_path_factory.mktemp("sweep") / "store") as made:
        yield made


@pytest.mark.parametrize("options", [{}, {"shuffle": True, "bucket": True, "seed": 5}, {"max_tokens": 64}])
def test_a_batch_holds_the_same_documents_at_each_layer(recyclers: Recyclers, options: dict[str, Any]) -> None:
    reader = read_jointly(recyclers, TEXTS, labels=LABELS, batch_size=7, device="cpu", **options)
    for epoch in range(2):
        seen = []
        alone = list(recyclers[1].reader(TEXTS, batch_size=7, **options)) if epoch == 0 else None
        steps = list(reader)
        assert len(steps) >= 6
        for number, step in enumerate(steps):
            assert list(step) == [3, 1]
            for layer, batch in step.items():
                np.testing.assert_array_equal(batch.labels, LABELS[batch.documents])
                stored = recyclers[layer].space.get(recyclers[layer].keys([TEXTS[i] for i in batch.documents]))
                for entry, rows, mask in zip(stored, batch.activations, batch.attention_mask, strict=True):
                    assert entry is not None
                    np.testing.assert_array_equal(entry.activations, rows[mask.bool()])
            np.testing.assert_array_equal(step[3].documents, step[1].documents)
            if alone is not None:  # the order is that of one layer's own reader
                np.testing.assert_array_equal(step[1].documents, alone[number].documents)
            seen += step[1].documents.tolist()
        assert sorted(seen) == list(range(40))
    assert reader.stats()[1].batches == reader.stats()[3].batches > 0


def test_a_joint_reader_goes_on_where_it_was_and_leaves_no_thread(recyclers: Recyclers) -> None:
    options: dict[str, Any] = {"batch_size": 8, "shuffle": True}
    before = set(threading.enumerate())
    reader = read_jointly(recyclers, TEXTS, **options)
    assert len(reader) == 5
    whole = [step[1].documents.tolist() for step in reader]
    reader.set_epoch(0)
    steps = iter(reader)
    assert [next(steps)[3].documents.tolist() for _ in range(2)] == whole[:2]
    state = reader.state_dict()
    steps.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) <= before
    another = read_jointly(recyclers, TEXTS, **options)
    another.load_state_dict(state)
    assert [step[1].documents.tolist() for step in another] == whole[2:]
    another.close()


def test_readers_that_do_not_go_together_are_refused(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    recyclers = filled(make_model, tokenizer, tmp_path / "store")
    with pytest.raises(UsageError, match="no layers"):
        JointReader({})
    with pytest.raises(UsageError, match="layers 1 and 3 do not go"):
        JointReader({1: recyclers[1].reader(TEXTS, seed=1), 3: recyclers[3].reader(TEXTS, seed=2)})
    with pytest.raises(UsageError, match="padded"):
        read_jointly(recyclers, TEXTS, layout="packed")
    recyclers[1].fill(["another one"], progress=False)
    with pytest.raises(MissingEntryError):
        read_jointly(recyclers, [*TEXTS, "another one"])
    with pytest.raises(UsageError, match="do not go"):
        read_jointly(recyclers, [*TEXTS, "another one"], on_missing="skip")
    computed = read_jointly(recyclers, [*TEXTS, "another one"], on_missing="compute")
    assert sum(len(step[3]) for step in computed) == 41
    key = recyclers[1].keys(TEXTS[:1])
    ids = np.arange(3)
    recyclers[1].space.put(key, recyclers[1].agreement.lower.run([ids]), token_ids=[ids], overwrite=True)
    reader = read_jointly(recyclers, TEXTS[:1], on_missing="skip")
    with pytest.raises(DataError, match="overwritten in one of the spaces"):
        next(iter(reader))
    recyclers.close()


def test_weighted_pooling_is_what_it_says() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((4, 6, 8)).astype(np.float16) for _ in range(3)]
    lengths = np.array([6, 1, 3, 5])
    mask = np.arange(6) < lengths[:, None]
    of_documents, of_tokens = WeightedPooling(3, 8, 2), WeightedPooling(3, 8, 2, of="tokens")
    with torch.no_grad():
        of_documents.weights.copy_(torch.tensor([0.5, -1, 2]))
        of_documents.gamma.fill_(1.5)
    of_tokens.load_state_dict(of_documents.state_dict())
    shares = np.exp([0.5, -1, 2]) / np.exp([0.5, -1, 2]).sum()
    np.testing.assert_allclose(of_documents.shares(), shares, rtol=1e-6)
    weight = of_documents.classifier.weight.detach().numpy().T
    bias = of_documents.classifier.bias.detach().numpy()
    mixed = 1.5 * sum(share * one.astype(np.float64) for share, one in zip(shares, rows, strict=True))
    means = np.stack([one[:length].mean(0) for one, length in zip(mixed, lengths, strict=True)])
    inputs = {"activations": [torch.from_numpy(one) for one in rows], "attention_mask": torch.from_numpy(mask).long()}
    classes = torch.tensor([0, 1, 1, 0])
    found = of_documents(**inputs, labels=classes)
    np.testing.assert_allclose(found.logits.detach(), means @ weight + bias, rtol=1e-5, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(means @ weight + bias).float(), classes)
    torch.testing.assert_close(found.loss, expected)
    np.testing.assert_allclose(of_tokens(**inputs).logits.detach(), mixed @ weight + bias, rtol=1e-5, atol=1e-5)
    labels = torch.full((4, 6), -100)
    labels[0, 1] = 1
    single = of_tokens(**inputs, labels=labels)
    torch.testing.assert_close(single.loss, -single.logits[0, 1].log_softmax(0)[1])
    with pytest.raises(ShapeError, match="2 layers of rows for 3 weights"):
        of_documents(inputs["activations"][:2], inputs["attention_mask"])
    for wrong in ((0, 8, 2), (3, 8, 0)):
        with pytest.raises(UsageError):
            WeightedPooling(*wrong)
    with pytest.raises(UsageError):
        WeightedPooling(3, 8, 2, of="words")  # type: ignore[arg-type]


def test_weighted_pooling_finds_the_layer_that_knows() -> None:
    rng = np.random.default_rng(1)
    labels = torch.from_numpy(rng.integers(0, 2, 64))
    rows = [torch.from_numpy(rng.standard_normal((64, 5, 8)).astype(np.float32)) for _ in range(3)]
    rows[1][:, :, 0] += (2 * labels - 1).float()[:, None]
    inputs = {"activations": rows, "attention_mask": torch.ones(64, 5, dtype=torch.long), "labels": labels}
    torch.manual_seed(0)
    model = WeightedPooling(3, 8, 2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    for _ in range(150):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.shares()[1] > 0.6
    assert evaluate(model, [inputs]) > 0.95


def by_hand(recyclers: Recyclers, layer: int, task: PreTrainedModel, rest: list[int], out: list[int]) -> float:
    """The loop of the sweep, written out with one layer's own reader."""
    model = recyclers[layer].reduce(task)
    options: dict[str, Any] = {"batch_size": 4, "bucket": True, "seed": 3, "device": "cpu"}
    reader = recyclers[layer].reader([TEXTS[i] for i in rest], labels=LABELS[rest], shuffle=True, **options)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, 2 * len(reader))
    torch.manual_seed(3)
    model.train()
    for _ in range(2):
        for batch in reader:
            model(**batch.model_inputs()).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        batch = next(iter(recyclers[layer].reader([TEXTS[i] for i in out], batch_size=99, device="cpu")))
        return float(model(**batch.model_inputs()).logits.double().sum())


def test_a_sweep_trains_each_layer_as_a_plain_loop_does(recyclers: Recyclers, make_model: Make) -> None:
    task = make_model(AutoModelForSequenceClassification)
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    out = list(range(0, 40, 4))
    rest = [i for i in range(40) if i not in out]

    def total(model: Any, batches: Any) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        return float(sum(model(**inputs).logits.double().sum() for inputs in batches))

    found = sweep(
        recyclers,
        task,
        TEXTS,
        LABELS,
        held_out=out,
        metric=total,
        pooling=lambda layers: WeightedPooling(layers, 32, 2),
        rate=1e-2,
        epochs=2,
        batch_size=4,
        seed=3,
    )
    assert [candidate.layers for candidate in found] == [(1,), (3,), (1, 3)]
    for candidate in found[:2]:
        assert candidate.metric == pytest.approx(by_hand(recyclers, *candidate.layers, task, rest, out), abs=1e-4)
    tokens = sum(entry.activations.shape[0] for entry in recyclers[1].space.get(recyclers[1].keys(TEXTS)))
    assert [candidate.bytes_per_token for candidate in found] == [128, 128, 256]
    assert [candidate.nbytes for candidate in found] == [128 * tokens, 128 * tokens, 256 * tokens]
    assert found[0].shares == (1.0,)
    assert sum(found[2].shares) == pytest.approx(1)
    assert all(candidate.seconds > 0 for candidate in found)
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())


def test_a_sweep_learns_and_takes_adapters_and_labels_of_tokens(recyclers: Recyclers, make_model: Make) -> None:
    entries = recyclers[1].space.get(recyclers[1].keys(TEXTS))
    ids = [entry.token_ids for entry in entries]
    la = max(set(ids[12].tolist()), key=ids[12].tolist().count)
    labels = [np.where(np.arange(len(one)) == 0, -100, one == la) for one in ids]
    task = make_model(AutoModelForTokenClassification)
    task.bert.load_state_dict(make_model(AutoModel).state_dict(), strict=False)
    found = sweep(
        recyclers,
        task,
        TEXTS,
        labels,
        held_out=range(30, 40),
        prepare=lambda reduced: add_adapters(reduced, 8),
        pooling=lambda layers: WeightedPooling(layers, 32, 2, of="tokens"),
        rate=1e-2,
        pooling_rate=3e-2,
        epochs=15,
        batch_size=8,
    )
    majority = max(np.mean(np.concatenate([one[one != -100] for one in labels[30:]]) == kind) for kind in (0, 1))
    assert len(found) == 3
    assert majority < 0.7
    assert all(candidate.metric > 0.75 for candidate in found), found


def test_what_a_sweep_refuses(recyclers: Recyclers, make_model: Make) -> None:
    task = make_model(AutoModelForSequenceClassification)
    for held_out in ([], range(40), [40], [-1]):
        with pytest.raises(UsageError, match="held out"):
            sweep(recyclers, task, TEXTS, LABELS, held_out=held_out)
    with pytest.raises(MissingEntryError):
        sweep(recyclers, task, [*TEXTS, "new"], np.zeros(41), held_out=[0])
    with pytest.raises(LowerHalfMismatchError):
        sweep(recyclers, make_model(AutoModelForSequenceClassification, seed=1), TEXTS, LABELS, held_out=[0])


def test_accuracy_leaves_out_what_has_no_label() -> None:
    logits = torch.tensor([[[0.0, 1], [1, 0], [0, 1]]])

    def model(labels: torch.Tensor) -> Any:
        return actcache.models.training.pooling.TokenClassifierOutput(logits=logits)

    labels = torch.tensor([[-100, 0, 0]])
    assert accuracy(model, [{"labels": labels}]) == 0.5  # type: ignore[arg-type]

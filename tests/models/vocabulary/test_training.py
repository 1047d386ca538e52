"""Training: a pruned and restored model is the one that training the full model gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from actcache.errors import ModelError, UsageError
from actcache.models.vocabulary import Pruned, prune_vocabulary
from tests.models.vocabulary.families import SIZE, USED, inputs, language_model, make

RATE = 0.01
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, RATE),
    "momentum": lambda parameters: torch.optim.SGD(parameters, RATE, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, RATE, weight_decay=0),
    "adamw-amsgrad": lambda parameters: torch.optim.AdamW(parameters, RATE, weight_decay=0, amsgrad=True),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, RATE, weight_decay=0),
}
# Adafactor scales by statistics over the whole matrix, so that fewer rows are another optimizer.
EXACT = [name for name in OPTIMIZERS if name != "adafactor"]


def classifier(family: str = "bert", **options: Any) -> PreTrainedModel:
    return make(AutoModelForSequenceClassification, family, **options)


def step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, number: int) -> None:
    batch = {**inputs(model, seed=number), "labels": torch.tensor([0, 1, 1])}
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        step(model, optimizer, number)


def state_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The state of each parameter, in the order of the parameters."""
    return [optimizer.state[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def assert_same(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def assert_same_state(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    for a, b in zip(state_of(ours), state_of(theirs), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if isinstance(a[name], torch.Tensor):
                torch.testing.assert_close(a[name], b[name], msg=name)


@pytest.mark.parametrize(("family", "name"), [*(("bert", name) for name in EXACT), ("gpt2", "adamw")])
def test_pruned_training_equals_full_training(name, family):
    full, model = classifier(family), classifier(family)
    theirs = OPTIMIZERS[name](full.parameters())
    train(full, theirs, range(6))

    pruned = prune_vocabulary(model, USED)
    ours = OPTIMIZERS[name](model.parameters())
    pruned.track(ours)
    train(model, ours, range(4))
    pruned.restore()
    train(model, ours, range(4, 6))  # and on, as if nothing had happened
    assert_same(model, full)
    assert_same_state(ours, theirs)
    unseen = sorted(set(range(SIZE)) - set(pruned_ids(full)))
    fresh = classifier(family).get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[unseen], fresh[unseen])


def pruned_ids(model: PreTrainedModel) -> list[int]:
    copied = copy.deepcopy(model)
    return [int(i) for i in prune_vocabulary(copied, USED).ids]


def test_weight_decay_leaves_rows_without_a_gradient_alone():
    """In the full model, it moves what never occurs: by (1 - rate * decay) a step."""
    full, model = classifier(), classifier()
    before = full.get_input_embeddings().weight.detach().clone()
    decay, steps = 0.1, 5
    train(full, torch.optim.AdamW(full.parameters(), RATE, weight_decay=decay), range(steps))
    pruned = prune_vocabulary(model, USED)
    kept = pruned.ids
    train(model, torch.optim.AdamW(model.parameters(), RATE, weight_decay=decay), range(steps))
    pruned.restore()
    ours, theirs = model.get_input_embeddings().weight.detach(), full.get_input_embeddings().weight.detach()
    torch.testing.assert_close(ours[kept], theirs[kept])
    unseen = np.setdiff1d(np.arange(SIZE), kept)
    assert torch.equal(ours[unseen], before[unseen])
    torch.testing.assert_close(theirs[unseen], before[unseen] * (1 - RATE * decay) ** steps)


def test_pruning_in_the_middle_of_training():
    """Rows that were trained and are then dropped stand still, and have their moments again when they come back."""
    model = classifier()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, range(3))
    embedding = model.get_input_embeddings()
    index = next(i for i, p in enumerate(optimizer.param_groups[0]["params"]) if p is embedding.weight)
    before = {name: tensor.clone() for name, tensor in state_of(optimizer)[index].items()}
    values = embedding.weight.detach().clone()
    assert before["exp_avg"][USED].any()

    some = USED[::2]
    dropped = [token for token in USED[1::2] if before["exp_avg"][token].any()]
    assert dropped
    pruned = prune_vocabulary(model, some, optimizer=optimizer)
    state = state_of(optimizer)[index]
    assert optimizer.param_groups[0]["params"][index] is embedding.weight
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name], before[name][pruned.ids])
    assert torch.equal(state["step"], before["step"])

    pruned.grow(dropped[:1])
    assert pruned.ids[-1] == dropped[0]
    assert torch.equal(state_of(optimizer)[index]["exp_avg"][-1], before["exp_avg"][dropped[0]])
    assert torch.equal(embedding.weight[-1], values[dropped[0]])
    pruned.restore()
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state_of(optimizer)[index][name], before[name])
    assert torch.equal(embedding.weight, values)


def test_growing_in_the_middle_of_training_equals_full_training():
    full, model = classifier(), classifier()
    theirs = OPTIMIZERS["adamw"](full.parameters())
    pruned = prune_vocabulary(model, [7, 10, 13], on_unseen="grow")
    ours = OPTIMIZERS["adamw"](model.parameters())
    pruned.track(ours)
    losses = []  # kept, and with them the graphs of earlier steps
    for number in range(5):
        for one, optimizer in ((full, theirs), (model, ours)):
            batch = {**inputs(one, seed=number, shape=(3, 4)), "labels": torch.tensor([0, 1, 1])}
            losses.append(one(**batch).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.isclose(losses[-1], losses[-2])
    assert 10 < len(pruned.ids) < 60
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == len(pruned.ids)
    pruned.restore()
    assert_same(model, full)
    assert_same_state(ours, theirs)


def test_gradients_that_are_being_accumulated_stay():
    full, model = classifier(), classifier()
    batches = [{**inputs(full, seed=number), "labels": torch.tensor([0, 1, 1])} for number in range(3)]
    for batch in batches:
        full(**batch).loss.backward()
    model(**batches[0]).loss.backward()
    pruned = prune_vocabulary(model, USED)
    model(**batches[1]).loss.backward()
    pruned.restore()
    model(**batches[2]).loss.backward()
    torch.testing.assert_close(model.get_input_embeddings().weight.grad, full.get_input_embeddings().weight.grad)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_frozen_stays_frozen(family):
    model = make(language_model(family), family)
    model.get_input_embeddings().weight.requires_grad = False
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    pruned = prune_vocabulary(model, USED)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    pruned.grow([3])
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    pruned.restore()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


@pytest.mark.parametrize("when", ["prune", "grow", "restore"])
def test_an_optimizer_that_was_forgotten_is_refused(when):
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters())
    pruned = prune_vocabulary(model, USED, optimizer=None if when == "prune" else optimizer)
    if when != "prune":
        train(model, optimizer, range(1))
        optimizer = torch.optim.AdamW(model.parameters())
        pruned.grow([3]) if when == "grow" else pruned.restore()
    with pytest.raises(ModelError, match=r"word_embeddings\.weight as it was before"):
        train(model, optimizer, range(1))


def test_packed_states_are_refused_and_nothing_changes():
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    weight = model.get_input_embeddings().weight
    optimizer.state[weight]["state1"] = torch.zeros(SIZE, 32, dtype=torch.uint8)
    with pytest.raises(ModelError, match="packed"):
        prune_vocabulary(model, USED, optimizer=optimizer)
    assert model.get_input_embeddings().weight is weight
    prune_vocabulary(model, USED)  # without it


def test_states_of_one_number_a_row_or_column_move():
    model = classifier()
    optimizer = OPTIMIZERS["adafactor"](model.parameters())
    train(model, optimizer, range(2))
    pruned = prune_vocabulary(model, USED, optimizer=optimizer)
    train(model, optimizer, range(2, 4))
    pruned.restore()
    train(model, optimizer, range(4, 5))


def test_something_that_is_no_optimizer():
    with pytest.raises(UsageError, match="no torch optimizer"):
        prune_vocabulary(classifier(), USED).track(classifier())  # type: ignore[arg-type]


def test_a_copy_goes_its_own_way():
    model = classifier()
    pruned = prune_vocabulary(model, USED)
    copied = copy.deepcopy(model)
    theirs = Pruned(copied)
    train(copied, torch.optim.SGD(copied.parameters(), RATE), range(2))
    theirs.grow([3, 4])
    assert len(theirs.ids) == len(pruned.ids) + 2
    assert copied.config.vocab_size == model.config.vocab_size + 2
    original = classifier()
    pruned.restore()
    assert_same(model, original)
    theirs.restore()
    assert not torch.equal(copied.get_input_embeddings().weight[USED], model.get_input_embeddings().weight[USED])
    assert_same(model, original)

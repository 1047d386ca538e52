"""Documents that leave a reduced model early: compared with each document alone, by plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from actcache.errors import ModelError, ShapeError, UnsupportedModelError, UsageError
from actcache.models import reduce
from actcache.models.training.early_exit import EarlyExit

Make = Callable[..., PreTrainedModel]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch_of(width: int = 32, count: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(2, 12, (count, 1), generator=generator)
    mask = (torch.arange(int(lengths.max())) < lengths).long()
    ids = torch.randint(5, 200, mask.shape, generator=generator) * mask
    rows = torch.randn(*mask.shape, width, generator=generator) * mask[..., None]
    return {"activations": rows, "token_ids": ids, "attention_mask": mask}


def exiting(make_model: Make, family: str = "bert", layer: int = 1, **options: Any) -> EarlyExit:
    extra: dict[str, Any] = NO_DROPOUT if family == "bert" else {}
    if family == "modernbert":
        extra = {"classifier_dropout": 0.0}
    task = make_model(AutoModelForSequenceClassification, family, num_labels=3, **{**extra, **options})
    torch.manual_seed(0)
    model = EarlyExit(reduce(task.eval(), layer)).eval()
    for ramp in model.ramps:  # of random models nothing is sure: more so, and each document otherwise
        ramp[2].weight.data *= 20
    return model


def by_hand(model: EarlyExit, inputs: dict[str, torch.Tensor], threshold: float) -> tuple[torch.Tensor, list[int]]:
    """Each document alone, all layers by the reduced model's own forward; its ramps from the hidden states."""
    logits, exits = [], []
    for i, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        one = {name: tensor[i : i + 1, :length] for name, tensor in inputs.items()}
        output = model.reduced(**one, output_hidden_states=True)
        where, found = len(output.hidden_states) - 1, output.logits
        for layer, ramp in zip(model.layers, model.ramps, strict=True):
            at_ramp = ramp(output.hidden_states[layer].mean(1))
            if torch.softmax(at_ramp, -1).max() >= threshold:
                where, found = layer, at_ramp
                break
        logits.append(found[0])
        exits.append(where)
    return torch.stack(logits), exits


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "deberta-v2", "modernbert", "mpnet"])
@torch.no_grad()
def test_documents_leave_as_if_each_were_alone(family: str, make_model: Make) -> None:
    model = exiting(make_model, family)
    inputs = batch_of()
    taken: set[int] = set()
    for threshold in (0.4, 0.6, 0.9, 0.99):
        model.threshold = threshold
        found = model(**inputs)
        logits, exits = by_hand(model, inputs, threshold)
        assert found.exits.tolist() == exits
        torch.testing.assert_close(found.logits, logits, rtol=1e-3, atol=1e-4)
        taken |= set(exits)
    assert taken == {2, 3, 4}  # of a model of four layers that starts at the second: every exit was taken
    model.threshold = 1.1
    torch.testing.assert_close(model(**inputs).logits, model.reduced(**inputs).logits)


@torch.no_grad()
def test_layers_run_for_those_that_are_left(make_model: Make) -> None:
    model = exiting(make_model)
    sizes: list[tuple[int, int]] = []
    for number in range(1, 4):
        layer = model.reduced.bert.encoder.layer[number]  # type: ignore[union-attr,index]
        layer.register_forward_hook(lambda m, a, output, n=number + 1: sizes.append((n, len(output))))
    model.threshold = 0.9
    exits = model(**batch_of()).exits
    left = [(layer, int((exits >= layer).sum())) for layer in (2, 3, 4)]
    assert sizes == [one for one in left if one[1]]
    assert sizes[0][1] == 9 > sizes[1][1]
    sizes.clear()
    model.threshold = 1e-6  # all leave at the first exit: nothing above runs
    assert (model(**batch_of()).exits == 2).all()
    assert sizes == [(2, 9)]
    sizes.clear()
    alone = {name: tensor[:1] for name, tensor in batch_of().items()}
    assert model(**alone).exits.tolist() == [2]


def test_the_loss_is_the_mean_over_all_exits(make_model: Make) -> None:
    model = exiting(make_model).train()
    inputs, labels = batch_of(), torch.arange(9) % 3
    output = model.reduced(**inputs, output_hidden_states=True)
    mask = inputs["attention_mask"][..., None].float()
    logits = [
        ramp((output.hidden_states[layer] * mask).sum(1) / mask.sum(1))
        for layer, ramp in zip(model.layers, model.ramps, strict=True)
    ]
    wanted = sum(nn.functional.cross_entropy(one, labels) for one in [*logits, output.logits]) / 3
    found = model(**inputs, labels=labels)
    torch.testing.assert_close(found.loss, wanted)
    found.loss.backward()
    assert all(one.grad is not None for one in model.ramps.parameters())
    assert found.exits.tolist() == [4] * 9


@pytest.mark.filterwarnings("ignore")  # the Trainer's own
def test_the_trainer_teaches_it(make_model: Make, tmp_path: Any) -> None:
    model, inputs = exiting(make_model), batch_of(count=24)
    labels = (inputs["activations"].sum((1, 2)) > 0).long()
    data = [{**{name: tensor[i] for name, tensor in inputs.items()}, "labels": labels[i]} for i in range(24)]
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=15, learning_rate=5e-3, report_to=[], use_cpu=True, save_strategy="no"
    )
    Trainer(model, arguments, train_dataset=data).train()
    with torch.no_grad():
        found = model.eval()(**inputs)
    assert (found.logits.argmax(1) == labels).float().mean() > 0.9
    assert (found.exits < 4).any()


@pytest.mark.filterwarnings("ignore")  # torch.ao is to move into a package of its own
def test_a_copy_and_int8_leave_alike(make_model: Make) -> None:
    """torch's dynamic quantization of a trained one: the same module, with other linear layers."""
    model = exiting(make_model)
    model.threshold = 0.6
    with torch.no_grad():
        wanted = model(**batch_of())
        assert torch.equal(copy.deepcopy(model)(**batch_of()).exits, wanted.exits)
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        found = quantized(**batch_of())
    assert not any(type(module) is nn.Linear for module in quantized.modules())
    same = found.exits == wanted.exits
    assert same.float().mean() > 0.7
    np.testing.assert_allclose(found.logits[same], wanted.logits[same], atol=0.05 * float(wanted.logits.abs().max()))


def test_what_cannot_leave_is_refused(make_model: Make) -> None:
    task = make_model(AutoModelForSequenceClassification)
    with pytest.raises(ModelError, match="no reduced model"):
        EarlyExit(task)
    with pytest.raises(UnsupportedModelError, match="one label a document"):
        EarlyExit(reduce(make_model(AutoModelForTokenClassification), 2))
    with pytest.raises(UnsupportedModelError, match="one label a document"):
        EarlyExit(reduce(make_model(AutoModelForSequenceClassification, problem_type="regression"), 2))
    for threshold in (0, -1, True, "0.9", float("nan")):
        with pytest.raises(UsageError, match="probability"):
            EarlyExit(reduce(task, 2), threshold)  # type: ignore[arg-type]
    model = EarlyExit(reduce(task, 3)).eval()
    assert model.layers == []
    inputs = batch_of()
    assert torch.equal(model(**inputs).logits, model.reduced(**inputs).logits)
    with pytest.raises(ShapeError):
        model(inputs["activations"][0])


def test_a_head_that_reads_the_tokens_is_refused(make_model: Make) -> None:
    """A decoder's head looks for the last token of each document of the batch, of which some have left."""
    with pytest.raises(UnsupportedModelError, match="early"):
        exiting(make_model, "gpt2")

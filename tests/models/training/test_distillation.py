"""Students that learn from a teacher's stored rows, compared with plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

import actcache
from actcache import Recycler
from actcache.errors import MissingEntryError, ShapeError, TokenizationMismatchError, UsageError
from actcache.models.training.distillation import Distillation, TeachingBatches
from actcache.models.training.sweep import train

Make = Callable[..., PreTrainedModel]
TEXTS = [("good " if i % 2 else "bad ") + f"document {i} says " + "la " * (i % 7) + "." for i in range(12)]
LABELS = np.arange(12) % 2


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    with actcache.open(tmp_path / "store") as opened:
        yield opened


def recycled(model: Any, tokenizer: Any, store: Any, layer: int | str = 2, texts: list[str] = TEXTS) -> Recycler:
    recycler = Recycler(model, tokenizer, layer=layer, store=store, dtype="float32")
    recycler.fill(texts, progress=False)
    return recycler


@pytest.mark.parametrize("width", [32, 16])
def test_the_loss_is_the_students_and_the_error_to_the_teachers_rows(
    width: int, store: Any, make_model: Make, tokenizer: Any
) -> None:
    """The teacher is another model, computed here anew; padding has no error."""
    base = make_model(AutoModel)
    sizes = {"hidden_size": width, "num_attention_heads": 2}
    teacher = make_model(AutoModel, seed=3, **sizes)
    source = recycled(base, tokenizer, store)
    taught = recycled(teacher, tokenizer, store, "last")
    task = make_model(AutoModelForSequenceClassification, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    task.base_model.load_state_dict(base.state_dict(), strict=False)
    torch.manual_seed(0)
    model = Distillation(source.reduce(task.eval()), width, weight=0.7)
    batches = TeachingBatches(source, taught, TEXTS, labels=LABELS, batch_size=5, shuffle=True, seed=3)
    seen = 0
    for inputs in batches:
        with torch.no_grad():
            given = {"input_ids": inputs["token_ids"], "attention_mask": inputs["attention_mask"]}
            full = task(**given, labels=inputs["labels"], output_hidden_states=True)
            rows = full.hidden_states[-1]
            if width == 16:
                rows = rows @ model.projection.weight.T + model.projection.bias  # type: ignore[operator,union-attr]
            errors = (rows - teacher(**given).last_hidden_state) ** 2
            wanted = full.loss + 0.7 * errors[inputs["attention_mask"].bool()].mean()
            assert 0.7 * errors[inputs["attention_mask"].bool()].mean() > 0.1
            torch.testing.assert_close(model(**inputs).loss, wanted, rtol=1e-4, atol=1e-5)
        seen += len(inputs["labels"])
    assert seen == 12


def test_a_student_of_fewer_layers_comes_nearer_to_its_teacher(store: Any, make_model: Make, tokenizer: Any) -> None:
    """Made from the lower layers of the model that was recorded, so that it starts from the same rows."""
    teacher = make_model(AutoModel)
    source, taught = recycled(teacher, tokenizer, store), recycled(teacher, tokenizer, store, "last")
    small = make_model(AutoModelForSequenceClassification, num_hidden_layers=3)
    state = {name: tensor for name, tensor in teacher.state_dict().items() if "layer.3" not in name}
    small.base_model.load_state_dict(state, strict=False)
    model = Distillation(source.reduce(small), 32, weight=1.0)
    batches = TeachingBatches(source, taught, TEXTS, labels=LABELS, batch_size=6, shuffle=True)

    def error() -> float:
        model.eval()
        with torch.no_grad():
            (inputs,) = TeachingBatches(source, taught, TEXTS, batch_size=12)
            rows = model.student(**{k: v for k, v in inputs.items() if k != "teacher_rows"}, output_hidden_states=True)
            return float(nn.functional.mse_loss(rows.hidden_states[-1], inputs["teacher_rows"]))

    before = error()
    train(model, batches, rate=5e-3, epochs=8)
    assert error() < 0.9 * before


def test_wrong_teachers_are_refused(store: Any, make_model: Make, tokenizer: Any, roberta_tokenizer: Any) -> None:
    source = recycled(make_model(AutoModel), tokenizer, store)
    student = source.reduce(make_model(AutoModelForSequenceClassification))
    other = recycled(make_model(AutoModel, "roberta", vocab_size=600), roberta_tokenizer, store)
    with pytest.raises(TokenizationMismatchError):
        TeachingBatches(source, other, TEXTS)
    some = recycled(make_model(AutoModel, seed=3), tokenizer, store, "last", TEXTS[:3])
    with pytest.raises(MissingEntryError):
        TeachingBatches(source, some, TEXTS)
    for wrong in ({"teacher_width": 0}, {"teacher_width": 32, "weight": -1}, {"teacher_width": 32, "weight": "1"}):
        with pytest.raises(UsageError):
            Distillation(student, **wrong)
    (inputs,) = TeachingBatches(source, some, TEXTS[:3])
    with pytest.raises(ShapeError, match="teacher"):
        Distillation(student, 32)(**{**inputs, "teacher_rows": inputs["teacher_rows"][:, :-1]})

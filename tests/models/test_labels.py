"""Labels reach the head that they are for, whatever it calls them, and its loss is the full model's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    T5Config,
    Trainer,
    TrainingArguments,
)

from actcache import Recycler
from actcache.errors import ModelError, ShapeError
from actcache.models import reduce
from tests.models.zoo import ANSWER, KINDS, documents, mask_of, padded

TEXTS = [f"document {i} says " + "la " * (i % 5) + "." for i in range(12)]
ANSWERS = np.array([[1 + i % 2, 2 + i % 3] for i in range(12)])
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recycler_of(task: PreTrainedModel, tokenizer: Any, folder: Path) -> Recycler:
    recycler = Recycler(copy.deepcopy(task.base_model), tokenizer, layer=2, store=folder, dtype="float32")
    recycler.fill(TEXTS, progress=False)
    return recycler


def full_loss(task: Any, tokenizer: Any, which: list[int], **labels: Any) -> float:
    """The loss of the documents, each alone, as the mean: padding then cannot matter."""
    losses = []
    for place, i in enumerate(which):
        one = {name: torch.as_tensor(value)[place : place + 1] for name, value in labels.items()}
        with torch.no_grad():
            losses.append(task(**tokenizer(TEXTS[i], return_tensors="pt"), **one).loss.item())
    return float(np.mean(losses))


@pytest.fixture(scope="module")
def answering(make_model: Any) -> Any:
    return make_model(AutoModelForQuestionAnswering, **NO_DROPOUT)


def expected_loss(task: Any, tokenizer: Any, which: list[int]) -> float:
    starts, ends = ANSWERS[which].T
    return full_loss(task, tokenizer, which, start_positions=starts, end_positions=ends)


def test_answers_become_positions(answering: Any, tokenizer: Any, tmp_path: Path) -> None:
    with recycler_of(answering, tokenizer, tmp_path) as recycler:
        reduced = recycler.reduce(answering)
        seen = 0
        for batch in recycler.reader(TEXTS, labels=ANSWERS, batch_size=5):
            which = batch.documents.tolist()
            with torch.no_grad():
                loss = reduced(**batch.model_inputs()).loss.item()
            assert loss == pytest.approx(expected_loss(answering, tokenizer, which), abs=1e-5)
            inputs = batch.model_inputs()
            starts, ends = inputs.pop("labels").unbind(1)
            assert reduced(**inputs, start_positions=starts, end_positions=ends).loss.item() == pytest.approx(loss)
            seen += len(batch)
        assert seen == len(TEXTS)
        with pytest.raises(ModelError, match="twice"):
            reduced(**batch.model_inputs(), start_positions=starts, end_positions=ends)
        for wrong in (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2)):
            with pytest.raises(ShapeError, match="first and last token"):
                reduced(**{**batch.model_inputs(), "labels": wrong})


@pytest.mark.parametrize("regime", ["NR", "F", "SR", "R"])
def test_answers_in_every_regime(answering: Any, tokenizer: Any, regime: str, tmp_path: Path) -> None:
    with recycler_of(answering, tokenizer, tmp_path / "store") as recycler:
        if regime == "SR":
            recycler.space.delete(recycler.keys(TEXTS[3:]))
        model, batches = recycler.regime(regime, answering, TEXTS, labels=ANSWERS, batch_size=1)
        model.eval()
        data = batches.dataset()
        for i, batch in enumerate(batches):
            want = expected_loss(answering, tokenizer, [i])
            assert (int(batch["start_positions"][0]), int(batch["end_positions"][0])) == tuple(ANSWERS[i])
            assert model(**batch).loss.item() == pytest.approx(want, abs=1e-5)
            inputs = data.collate([data[i]])
            assert model(**inputs).loss.item() == pytest.approx(want, abs=1e-5)
            assert int(inputs["end_positions"][0]) == ANSWERS[i][1]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, per_device_eval_batch_size=5, num_train_epochs=1,
        logging_steps=1, learning_rate=1e-3, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, seed=3,
        **options,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # the Trainer's own
@pytest.mark.parametrize("regime", [None, "F", "SR", "R"])
def test_the_trainer_trains_and_evaluates_on_answers(
    answering: Any, tokenizer: Any, regime: str | None, tmp_path: Path
) -> None:
    """Without asking for the labels' names: it finds them, and hands them to the metrics, as for the full model."""
    handed = []

    def metrics(prediction: Any) -> dict[str, float]:
        handed.append(np.stack(prediction.label_ids, 1))
        return {"starts": float((prediction.predictions[0].argmax(-1) == prediction.label_ids[0]).mean())}

    with recycler_of(answering, tokenizer, tmp_path / "store") as recycler:
        if regime is None:
            model, data = recycler.reduce(answering), recycler.reader(TEXTS, labels=ANSWERS).dataset()
        else:
            model, batches = recycler.regime(regime, answering, TEXTS, labels=ANSWERS)
            data = batches.dataset()
        trainer = Trainer(
            model, arguments(tmp_path), train_dataset=data, eval_dataset=data, data_collator=data.collate,
            compute_metrics=metrics,
        )  # fmt: skip
        found = trainer.evaluate()
        np.testing.assert_array_equal(handed[0], ANSWERS)
        if regime != "F":  # whose answers may lie in padding
            # the Trainer weighs batches of 5, 5 and 2 by their documents
            assert found["eval_loss"] == pytest.approx(expected_loss(answering, tokenizer, list(range(12))), abs=1e-4)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < found["eval_loss"]


@pytest.mark.parametrize("name", sorted(name for name, kind in KINDS.items() if ANSWER in kind.heads))
def test_answers_in_every_family(name: str) -> None:
    model = KINDS[name].make(ANSWER)
    ids = documents(lengths=(6, 6, 6))
    answers = torch.tensor([[1, 2], [0, 4], [3, 3]])
    mask, tokens = mask_of(ids, "right"), padded(ids, "right")
    encoder = model.get_encoder() if isinstance(model.config, T5Config) else model.base_model
    with torch.no_grad():
        rows = encoder(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states[2]
        want = model(input_ids=tokens, attention_mask=mask, start_positions=answers[:, 0], end_positions=answers[:, 1])
        got = reduce(model, 2)(activations=rows, token_ids=tokens, attention_mask=mask, labels=answers)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-5, rtol=1e-5)


def test_two_columns_for_another_head_stay_labels(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Several labels at once, or two numbers: the model decides, not the shape."""
    truths = np.stack([np.arange(12) % 2, np.arange(12) % 3 == 0], 1).astype(np.float32)
    for problem in ("multi_label_classification", "regression"):
        task = make_model(AutoModelForSequenceClassification, num_labels=2, problem_type=problem, **NO_DROPOUT)
        with recycler_of(task, tokenizer, tmp_path / problem) as recycler:
            reduced, reader = recycler.reduce(task), recycler.reader(TEXTS, labels=truths, batch_size=12)
            inputs = next(iter(reader)).model_inputs()
            loss = reduced(**inputs).loss.item()
            assert loss == pytest.approx(full_loss(task, tokenizer, list(range(12)), labels=truths), abs=1e-5)
            data = reader.dataset()
            assert list(data.collate([data[0]])) == ["activations", "token_ids", "attention_mask", "labels"]


def test_the_choices_of_a_question_stand_one_after_another(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    task, rights = make_model(AutoModelForMultipleChoice, **NO_DROPOUT), torch.tensor([2, 0, 1, 1])
    with recycler_of(task, tokenizer, tmp_path) as recycler:
        inputs = next(iter(recycler.reader(TEXTS, batch_size=12))).model_inputs()
        choices = {name: value.view(4, 3, *value.shape[1:]) for name, value in inputs.items()}
        loss = recycler.reduce(task)(**choices, labels=rights).loss
    logits = torch.stack(
        [task(**{n: v[None] for n, v in tokenizer(text, return_tensors="pt").items()}).logits[0, 0] for text in TEXTS]
    )
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.view(4, 3), rights))


@pytest.mark.parametrize("head", [AutoModelForNextSentencePrediction, AutoModelForSequenceClassification])
def test_heads_with_one_label_a_document(head: Any, make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    task, labels = make_model(head, **NO_DROPOUT), np.arange(12) % 2
    with recycler_of(task, tokenizer, tmp_path) as recycler:
        inputs = next(iter(recycler.reader(TEXTS, labels=labels, batch_size=12))).model_inputs()
        loss = recycler.reduce(task)(**inputs).loss.item()
    assert loss == pytest.approx(full_loss(task, tokenizer, list(range(12)), labels=labels), abs=1e-5)


def test_labels_that_a_head_does_nothing_with_are_refused(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """BERT's pre-training head wants two kinds, and else returns no loss: the training would end in an error."""
    task = make_model(AutoModelForPreTraining, **NO_DROPOUT)
    labels = [np.array(tokenizer(text)["input_ids"]) for text in TEXTS]
    with recycler_of(task, tokenizer, tmp_path) as recycler:
        batch = next(iter(recycler.reader(TEXTS, labels=labels, batch_size=12)))
        reduced = recycler.reduce(task)
        with pytest.raises(ModelError, match="labels and next_sentence_label together"):
            reduced(**batch.model_inputs())
        follows = torch.arange(12) % 2
        loss = reduced(**batch.model_inputs(), next_sentence_label=follows[batch.documents]).loss.item()
    words, orders = [], []
    for i, text in enumerate(TEXTS):
        encoded = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            outputs = task(**encoded)
        words.append(
            torch.nn.functional.cross_entropy(outputs.prediction_logits[0], encoded["input_ids"][0], reduction="none")
        )
        orders.append(torch.nn.functional.cross_entropy(outputs.seq_relationship_logits, follows[i : i + 1]))
    assert loss == pytest.approx((torch.cat(words).mean() + torch.stack(orders).mean()).item(), abs=1e-5)


def test_labels_in_a_column_of_another_library(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """``datasets`` hands out columns that are neither lists nor arrays."""
    tags = [[t % 3 for t in ids] for ids in tokenizer(TEXTS)["input_ids"]]
    table = datasets.Dataset.from_dict({"text": TEXTS, "tags": tags, "label": list(range(12)), "answer": ANSWERS})
    frame = pd.DataFrame({"tags": tags, "label": range(12)}, index=range(100, 112))
    task = make_model(AutoModelForTokenClassification, num_labels=3, **NO_DROPOUT)
    with recycler_of(task, tokenizer, tmp_path) as recycler:

        def delivered(labels: Any, regime: str | None = None) -> Any:
            if regime:
                return next(iter(recycler.regime(regime, task, TEXTS, labels=labels, batch_size=12).batches))["labels"]
            return next(iter(recycler.reader(TEXTS, labels=labels, batch_size=12))).labels

        for column in (
            table["tags"],
            frame["tags"],
            table.with_format("numpy")["tags"],
            table.with_format("torch")["tags"],
        ):
            for regime in (None, "F", "R"):
                np.testing.assert_array_equal(delivered(column, regime), delivered(tags))
        for column in (table["label"], frame["label"], table.data["label"], table.with_format("torch")["label"]):
            assert delivered(column).tolist() == list(range(12))
        assert delivered(table["answer"]).tolist() == ANSWERS.tolist()
        assert delivered(pd.DataFrame(ANSWERS)).tolist() == ANSWERS.tolist()
        with pytest.raises(ShapeError, match="give one a document"):
            delivered(table["label"][:5])
        with pytest.raises(ShapeError, match="labels are numbers"):
            delivered(table["text"])

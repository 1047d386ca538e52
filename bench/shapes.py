"""Shapes of published models with random weights, and random documents: time does not depend on their values.

Needs torch and transformers alone; nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

LABELS = 8
_FIRST, _LAST = 1000, 30000  # random token ids, special ones in no vocabulary
_VOCABULARY = 30522
_SPECIAL = {name: f"[{name.split('_')[0].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}


def _size(layers: int, hidden: int, heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }


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

SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "minilm-l6-h384": (BertConfig, _size(6, 384, 12)),
    "minilm-l6-h768": (BertConfig, _size(6, 768, 12)),
    "bert-base": (BertConfig, _size(12, 768, 12)),
    "bert-large": (BertConfig, _size(24, 1024, 16)),
    "roberta-large": (RobertaConfig, {**_size(24, 1024, 16), **_ROBERTA}),
    "deberta-v2-xl": (DebertaV2Config, {**_size(24, 1536, 24), **_DEBERTA}),
}


def task_model(name: str, *, tiny: bool = False) -> PreTrainedModel:
    """Return a model for classification, in eval mode. ``tiny``: four layers of 32, to try a program out."""
    config, shape = SHAPES[name]
    torch.manual_seed(0)
    sizes = {**shape, **_size(4, 32, 2), "vocab_size": _LAST} if tiny else shape
    return AutoModelForSequenceClassification.from_config(config(**sizes, num_labels=LABELS)).eval()


def documents(count: int, tokens: int) -> tuple[list[list[int]], np.ndarray]:
    """Return ``count`` documents of token ids, and their labels, ``[count]`` int64."""
    rng = np.random.default_rng(0)
    return [row.tolist() for row in rng.integers(_FIRST, _LAST, (count, tokens))], rng.integers(0, LABELS, count)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of a vocabulary as large as BERT's. Documents of token ids never meet it."""
    words = [*_SPECIAL.values(), *(f"w{number}" for number in range(_VOCABULARY - len(_SPECIAL)))]
    model = WordLevel({word: number for number, word in enumerate(words)}, unk_token=_SPECIAL["unk_token"])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **_SPECIAL)

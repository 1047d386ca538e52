"""A tiny random model of every family and head, and what compares it with its reduced model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

VOCABULARY = 99
END = 2  # every document's last token, and nothing else
LENGTHS = (5, 11, 1, 8)

_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,  # larger than usual, so that layers do something
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": 0.0,
}
_DEBERTA = {
    **_ENCODER,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "type_vocab_size": 0,
    "pooler_dropout": 0.0,
}
_DEBERTA2 = {
    **_DEBERTA,
    "position_biased_input": False,
    "position_buckets": 4,
    "max_relative_positions": 16,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": END,
    "bos_token_id": 1,
    "classifier_dropout": 0.0,
}
_PATTERN = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_SLIDING = {**_DECODER, "sliding_window": 3, "layer_types": _PATTERN}

CLASSIFY, TOKENS, ANSWER = (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
)
MASKED, CAUSAL = AutoModelForMaskedLM, AutoModelForCausalLM
_TASKS = (CLASSIFY, TOKENS, ANSWER)


@dataclass(frozen=True)
class Kind:
    """How to make the models of one family.

    Args:
        heads: classes that make them.
        first_token: the sequence classifier looks at the first token, which left padding moves.
        attention: implementations that it has.
    """

    config: Any
    options: dict[str, Any] = field(default_factory=lambda: dict(_ENCODER))
    heads: tuple[Any, ...] = (AutoModel, *_TASKS, MASKED)
    first_token: bool = True
    attention: tuple[str, ...] = ("sdpa", "eager")

    def configured(self, **options: Any) -> Any:
        return self.config(**{**self.options, "num_labels": 2, **options})

    def make(self, head: Any, attention: str | None = "eager", seed: int = 0, **options: Any) -> PreTrainedModel:
        torch.manual_seed(seed)
        make = head.from_config if hasattr(head, "from_config") else head._from_config
        model: PreTrainedModel = make(self.configured(**options), attn_implementation=attention)
        return model.eval()


_ONLY_EAGER = ("eager",)
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 4,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "dropout_rate": 0.0,
    "eos_token_id": END,
    "decoder_start_token_id": 0,
}

KINDS = {
    "bert": Kind(transformers.BertConfig, heads=(AutoModel, *_TASKS, MASKED, AutoModelForPreTraining)),
    "roberta": Kind(transformers.RobertaConfig),
    "xlm-roberta": Kind(transformers.XLMRobertaConfig),
    "camembert": Kind(transformers.CamembertConfig, heads=(AutoModel, TOKENS)),
    "electra": Kind(
        transformers.ElectraConfig,
        {**_ENCODER, "embedding_size": 16, "summary_last_dropout": 0.0},
        (AutoModel, *_TASKS, MASKED, AutoModelForPreTraining),
    ),
    "distilbert": Kind(
        transformers.DistilBertConfig,
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 4,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 40,
            "initializer_range": 0.2,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "qa_dropout": 0.0,
            "seq_classif_dropout": 0.0,
        },
    ),
    "mpnet": Kind(transformers.MPNetConfig, attention=_ONLY_EAGER),
    "deberta": Kind(transformers.DebertaConfig, _DEBERTA, attention=_ONLY_EAGER),
    "deberta-v2": Kind(
        transformers.DebertaV2Config, {**_DEBERTA2, "conv_kernel_size": 3, "conv_act": "gelu"}, attention=_ONLY_EAGER
    ),
    "deberta-v3": Kind(transformers.DebertaV2Config, {**_DEBERTA2, "legacy": False}, attention=_ONLY_EAGER),
    "modernbert": Kind(
        transformers.ModernBertConfig,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 40,
            "initializer_range": 0.2,
            "local_attention": 6,
            "global_attn_every_n_layers": 2,
            "pad_token_id": 0,
            "eos_token_id": END,
            "bos_token_id": 1,
            "cls_token_id": 1,
            "sep_token_id": END,
        },
    ),
    "t5": Kind(
        transformers.T5Config,
        _T5,
        (transformers.T5EncoderModel, *_TASKS, transformers.T5ForConditionalGeneration),
        first_token=False,
    ),
    "mt5": Kind(transformers.MT5Config, _T5, (transformers.MT5EncoderModel, TOKENS), first_token=False),
    "gpt2": Kind(
        transformers.GPT2Config,
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "n_inner": 48,
            "n_positions": 40,
            "initializer_range": 0.2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "classifier_dropout": 0.0,
            "pad_token_id": 0,
            "eos_token_id": END,
            "bos_token_id": 1,
            "scale_attn_by_inverse_layer_idx": True,
        },
        (AutoModel, *_TASKS, CAUSAL),
        first_token=False,
    ),
    "llama": Kind(transformers.LlamaConfig, _DECODER, (AutoModel, *_TASKS, CAUSAL), first_token=False),
    "qwen2": Kind(
        transformers.Qwen2Config,
        {**_SLIDING, "use_sliding_window": True},
        (AutoModel, *_TASKS, CAUSAL),
        first_token=False,
    ),
    "qwen3": Kind(transformers.Qwen3Config, _DECODER, (AutoModel, *_TASKS, CAUSAL), first_token=False),
    "gemma": Kind(transformers.GemmaConfig, _DECODER, (AutoModel, CLASSIFY, TOKENS, CAUSAL), first_token=False),
    "gemma2": Kind(
        transformers.Gemma2Config,
        _SLIDING,
        (AutoModel, CLASSIFY, TOKENS, CAUSAL),
        first_token=False,
        attention=_ONLY_EAGER,
    ),
    "gemma3": Kind(transformers.Gemma3TextConfig, _SLIDING, (AutoModel, CLASSIFY, CAUSAL), first_token=False),
}

#: One of each way in which families differ.
DIFFERENT = ("bert", "mpnet", "deberta-v2", "modernbert", "t5", "gpt2", "gemma3")


def documents(seed: int = 1, lengths: Sequence[int] = LENGTHS) -> list[NDArray[np.int64]]:
    """Token ids without special meaning, but for the last of each."""
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(5, VOCABULARY, n - 1), END) for n in lengths]


def padded(arrays: Sequence[NDArray[Any]], side: str, value: Any = 0) -> torch.Tensor:
    """Stack arrays along their first axis, ``value`` where one is shorter than the longest."""
    longest = max(len(array) for array in arrays)
    out = torch.full((len(arrays), longest, *arrays[0].shape[1:]), value, dtype=torch.tensor(arrays[0]).dtype)
    for row, array in zip(out, arrays, strict=True):
        place = slice(None, len(array)) if side == "right" else slice(longest - len(array), None)
        row[place] = torch.tensor(array)
    return out


def mask_of(arrays: Sequence[NDArray[Any]], side: str) -> torch.Tensor:
    return padded([np.ones(len(array), np.int64) for array in arrays], side)


def full_inputs(model: PreTrainedModel, ids: Sequence[NDArray[Any]], side: str) -> dict[str, torch.Tensor]:
    """A batch of the full model, whose positions count along the mask on either side of padding."""
    mask = mask_of(ids, side)
    padding = int(getattr(model.config, "pad_token_id", None) or 0)
    inputs = {"input_ids": padded(ids, side, padding), "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters and model.config.model_type not in (
        "roberta",  # these count along the token ids themselves
        "xlm-roberta",
        "camembert",
        "mpnet",
    ):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    return inputs


def labels_for(model: PreTrainedModel, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Labels that the model's forward takes, none of them at padding."""
    names = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(3)
    batch = len(mask)
    classes = torch.randint(0, 2, (batch,), generator=generator)
    tokens = torch.randint(0, 2, mask.shape, generator=generator).masked_fill(mask == 0, -100)
    if "start_positions" in names:
        places = mask.argmax(-1)
        return {"start_positions": places, "end_positions": places}
    if "labels" not in names:
        return {}
    name = type(model).__name__
    if name == "ElectraForPreTraining":
        tokens = tokens.clamp_min(0)
    if "next_sentence_label" in names:
        return {"labels": tokens, "next_sentence_label": classes}
    return {"labels": classes if "SequenceClassification" in name else tokens}

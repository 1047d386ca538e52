"""Tiny random models of every family, with special tokens all over their vocabulary."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

SIZE = 200
USED = list(range(7, 150, 3))  # what the corpus of these tests uses

_BERT = {
    "vocab_size": SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
    "initializer_range": 0.2,
}
_DECODER = {**_BERT, "num_key_value_heads": 2, "pad_token_id": 190, "bos_token_id": 1, "eos_token_id": 2}
_LAST = {"pad_token_id": 199, "eos_token_id": 198, "bos_token_id": 197}  # beyond the number of rows that are kept

CONFIGS: dict[str, Any] = {
    "bert": hf.BertConfig(**_BERT),
    "roberta": hf.RobertaConfig(**_BERT),
    "xlm-roberta": hf.XLMRobertaConfig(**_BERT),
    "electra": hf.ElectraConfig(**_BERT, embedding_size=16),
    "distilbert": hf.DistilBertConfig(
        vocab_size=SIZE, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=66
    ),
    "mpnet": hf.MPNetConfig(**_BERT),
    "deberta": hf.DebertaConfig(**_BERT),
    "deberta-v2": hf.DebertaV2Config(
        **_BERT, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], conv_kernel_size=3
    ),
    "deberta-v3": hf.DebertaV2Config(**_BERT, relative_attention=True, position_buckets=8, legacy=False),
    "modernbert": hf.ModernBertConfig(**_BERT, **_LAST, cls_token_id=197, sep_token_id=198),
    "t5": hf.T5Config(
        vocab_size=SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
    "gpt2": hf.GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=66, **_LAST),
    "llama": hf.LlamaConfig(**_DECODER),  # its output embeddings are its own
    "qwen2": hf.Qwen2Config(**_DECODER, tie_word_embeddings=True),
    "qwen3": hf.Qwen3Config(**_DECODER, head_dim=8),
    "gemma": hf.GemmaConfig(**_DECODER, head_dim=8),
    "gemma2": hf.Gemma2Config(**_DECODER, head_dim=8),
    "gemma3": hf.Gemma3TextConfig(**_DECODER, head_dim=8),
}
DECODERS = ("gpt2", "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")


def language_model(family: str) -> Any:
    """Return the auto class of a family's models with logits over the vocabulary."""
    if family == "t5":
        return hf.AutoModelForSeq2SeqLM
    return hf.AutoModelForCausalLM if family in DECODERS else hf.AutoModelForMaskedLM


def make(auto_class: Any, family: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    config = copy.deepcopy(CONFIGS[family])
    for name, value in options.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = auto_class.from_config(config) if hasattr(auto_class, "from_config") else auto_class(config)
    return model.eval()


def inputs(model: PreTrainedModel, seed: int = 0, shape: tuple[int, int] = (3, 9)) -> dict[str, torch.Tensor]:
    """Return token ids of the corpus, padded as the family pads, with an end of text where a head looks for it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(USED)[torch.randint(0, len(USED), shape, generator=generator)]
    if "T5ForSequence" in type(model).__name__:
        ids[:, -1] = model.config.eos_token_id
        return {"input_ids": ids}
    mask = torch.ones(shape, dtype=torch.long)
    ids[0, -3:], mask[0, -3:] = model.config.pad_token_id, 0
    result = {"input_ids": ids, "attention_mask": mask}
    if type(model).__name__ == "T5Model":
        result["decoder_input_ids"] = ids[:, :4]
    if type(model).__name__ == "T5ForConditionalGeneration":
        result["labels"] = ids[:, :4].contiguous()
    return result

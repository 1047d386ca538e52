"""Tiny random models of families, with special tokens all over their vocabulary, and what is put into them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from tests.models.zoo import KINDS

SIZE = 200
USED = list(range(7, 150, 3))  # what the corpus of these tests uses

_LAST = {"pad_token_id": 199, "eos_token_id": 198, "bos_token_id": 197}  # beyond the number of rows that are kept
#: What these tests want otherwise than ``tests.models.zoo`` makes it.
_OTHERWISE: dict[str, dict[str, Any]] = {
    "modernbert": {**_LAST, "cls_token_id": 197, "sep_token_id": 198},
    "gpt2": {**_LAST, "n_positions": 66},
    **{family: {"pad_token_id": 190} for family in ("llama", "qwen3", "gemma", "gemma2", "gemma3")},
    "qwen2": {"pad_token_id": 190, "tie_word_embeddings": True},  # those of Llama are its own
}
FAMILIES = tuple(family for family in KINDS if family not in ("camembert", "mt5"))
DECODERS = ("gpt2", "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")


def language_model(family: str) -> Any:
    """Return the auto class of a family's models with logits over the vocabulary."""
    if family == "t5":
        return hf.AutoModelForSeq2SeqLM
    return hf.AutoModelForCausalLM if family in DECODERS else hf.AutoModelForMaskedLM


def make(auto_class: Any, family: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    return KINDS[family].make(auto_class, None, seed, **{"vocab_size": SIZE, **_OTHERWISE.get(family, {}), **options})


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

"""A tiny random BERT with a tokenizer of single characters, as a folder: loads in no time."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation
VOCABULARY = {token: i for i, token in enumerate([*SPECIAL.values(), *CHARACTERS, *(f"##{one}" for one in CHARACTERS)])}
HIDDEN = 32


def save_tiny(folder: Path, *, seed: int = 0) -> Path:
    """Save the model, of four layers, and the tokenizer, which makes lower case of all; return the folder."""
    backend = Tokenizer(WordPiece(VOCABULARY, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    backend.post_processor = BertProcessing(("[SEP]", VOCABULARY["[SEP]"]), ("[CLS]", VOCABULARY["[CLS]"]))
    backend.decoder = decoders.WordPiece()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in SPECIAL.items()},
    ).save_pretrained(folder)
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(seed)
    # Larger weights than usual, so that layers do something.
    BertModel(BertConfig(vocab_size=len(VOCABULARY), initializer_range=0.2, **sizes)).save_pretrained(folder)
    return folder

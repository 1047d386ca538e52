"""A tiny random BERT with a tokenizer of single characters or a few words, as a folder: loads in no time."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, Digits, WhitespaceSplit
from tokenizers.pre_tokenizers import Sequence as Split
from tokenizers.processors import BertProcessing
from transformers import AutoModel, PreTrainedTokenizerFast

from tests.models.zoo import KINDS

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation
VOCABULARY = {token: i for i, token in enumerate([*SPECIAL.values(), *CHARACTERS, *(f"##{one}" for one in CHARACTERS)])}
HIDDEN = 32


def save_tiny(folder: Path, *, seed: int = 0, words: Sequence[str] | None = None, hidden_size: int = HIDDEN) -> Path:
    """Save the model, of four layers, and the tokenizer, which makes lower case of all; return the folder.

    Args:
        words: that the tokenizer knows, and digits, in the place of single characters.
    """
    known = VOCABULARY
    if words is None:
        backend = Tokenizer(WordPiece(known, unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
    else:
        known = {token: i for i, token in enumerate([*SPECIAL.values(), *words, *string.digits])}
        backend = Tokenizer(WordLevel(known, unk_token="[UNK]"))
        backend.pre_tokenizer = Split([WhitespaceSplit(), Digits(individual_digits=True)])
    backend.post_processor = BertProcessing(("[SEP]", known["[SEP]"]), ("[CLS]", known["[CLS]"]))
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in SPECIAL.items()},
    ).save_pretrained(folder)
    sizes = {"vocab_size": len(known), "hidden_size": hidden_size, "intermediate_size": 64}
    KINDS["bert"].make(AutoModel, None, seed, max_position_embeddings=512, **sizes).save_pretrained(folder)
    return folder

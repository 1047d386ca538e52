"""Whether a tokenizer keeps given words apart. Found out by running it: no table of tokenizers is complete.

A byte-level tokenizer without ``add_prefix_space``, and a SentencePiece one that puts no mark before a word, know a
word by the space before it. Given words have none: all but the first would get the tokens of the inside of a word.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

_PROBES = (("a", "b"), ("A", "B"), ("1", "2"), ("é", "ü"), ("return", "it"))


def joined_words(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """Return two words that get other tokens as words than in a text with a space between; None where none do."""

    def tokens(document: str | list[str]) -> list[int]:
        split = isinstance(document, list)
        ids: list[int] = tokenizer(document, add_special_tokens=False, is_split_into_words=split)["input_ids"]
        return ids

    for first, second in _PROBES:
        if tokens([first, second]) != tokens(f"{first} {second}"):
            return first, second
    return None

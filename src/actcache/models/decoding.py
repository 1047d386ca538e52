"""Texts of stored token ids, where a space's tokenizer is at hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from transformers import AutoTokenizer

from actcache.format.recipe import Recipe
from actcache.models.tokenizing import tokenizer_digest


def decoder_of(recipe: Recipe) -> Callable[[Sequence[int]], str] | None:
    """Return what makes a text of a space's token ids; None where its tokenizer is not on this machine, or is another.

    Nothing is fetched, and no code that a model brings is run. A tokenizer counts where its digest is the recipe's.
    """
    tokenizer = None if recipe.tokenizer is None else _tokenizer(recipe.model, recipe.tokenizer)
    if tokenizer is None:
        return None

    def decode(token_ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))

    return decode


@functools.lru_cache(maxsize=8)
def _tokenizer(name: str, digest: str) -> Any:
    try:
        found = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        return found if tokenizer_digest(found) == digest else None
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ImportError,
        RuntimeError,
    ):  # the ids are shown
        return None

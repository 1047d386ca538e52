"""What recording is compared with: the lower half's own forward, over the batches that a fill computes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from actcache import Recycler
from actcache.models import family_of


def computed_by(recycler: Recycler, texts: list[Any]) -> list[list[np.ndarray]]:
    """Return the token ids of each batch that a fill has the lower half compute, without the canaries before them."""
    seen: list[list[np.ndarray]] = []
    lower = recycler.agreement.lower
    computing = lower.run

    def watch(token_ids: Any, *args: Any, **options: Any) -> Any:
        seen.append(list(token_ids))
        return computing(token_ids, *args, **options)

    lower.run = watch  # type: ignore[method-assign]
    try:
        recycler.fill(texts, progress=False)
    finally:
        del lower.run  # the instance's
    while sum(map(len, seen)) > len(texts):
        del seen[0]
    if sum(map(len, seen)) != len(texts):
        raise RuntimeError("the fill's batches were not seen")
    return seen


def lower_half(base: PreTrainedModel, layer: int) -> PreTrainedModel:
    """Return a model that has the lower layers alone."""
    lower = copy.deepcopy(base).eval()
    del family_of(lower).layers_of(lower)[layer:]
    if hasattr(lower.config, "num_hidden_layers"):
        lower.config.num_hidden_layers = layer
    return lower


def inputs(ids: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """Return a batch of token ids, padded, as a model takes it."""
    padded = torch.zeros(len(ids), max(len(one) for one in ids), dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, kept, one in zip(padded, mask, ids, strict=True):
        row[: len(one)] = torch.from_numpy(np.asarray(one, np.int64))
        kept[: len(one)] = 1
    return {"input_ids": padded, "attention_mask": mask}

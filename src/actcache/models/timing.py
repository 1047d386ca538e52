"""What a model costs on this machine: seconds a token, of all its layers and of its lower half."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actcache.models.families import base_model_of, family_of
from actcache.models.lower_half import LowerHalf, plan_batches
from actcache.models.pretrained import load_pretrained
from actcache.models.processing import MediaEncoder
from actcache.models.sites import Where
from actcache.models.tensors import padded
from actcache.models.tokenizing import DocumentEncoder, check_max_length


@dataclass(frozen=True)
class Timing:
    """What was measured; seconds a token of computing, on one device."""

    full: float  # of all layers
    lower: float  # of the lower half, embeddings included
    hidden_size: int
    lengths: list[int]  # tokens of each document
    dtype: str  # in which rows of this family are stored by default
    starts: bool = True  # whether a reduced model can start from the rows; else they are for reading

    @property
    def upper(self) -> float:
        return max(self.full - self.lower, 0.0)


def measure(
    name: str | Path,
    texts: Sequence[str],
    *,
    layer: Where,
    device: str | None = None,
    max_length: int | None = None,
    token_budget: int = 4096,
    documents: int = 64,
) -> Timing:
    """Compute some documents, in batches of like lengths as a fill does, by the lower half and by the whole base model.

    The lengths of all texts are told, longer ones than the model takes truncated; so many ``documents`` of them, drawn
    at even distances in the order of lengths, are computed. Raises as ``load_pretrained`` and ``LowerHalf`` do.
    """
    model, tokenizer = load_pretrained(name, [], device, None)
    base = base_model_of(model)
    family = family_of(base)
    lower = LowerHalf(base, family, layer)
    longest = check_max_length(max_length, tokenizer, family.max_tokens(base.config))
    encoder = DocumentEncoder(tokenizer, longest, "truncate", True)
    ids = [windows[0].token_ids for windows in encoder.encode(list(texts))]
    lengths = [len(one) for one in ids]
    order = np.argsort(lengths, kind="stable")
    chosen = [ids[i] for i in order[np.unique(np.linspace(0, len(order) - 1, min(documents, len(order))).astype(int))]]
    batches = [[chosen[i] for i in batch] for batch in plan_batches([len(one) for one in chosen], token_budget)]
    tokens = sum(map(len, chosen))
    times: dict[str, list[float]] = {"lower": [], "full": []}
    for _ in range(4):  # in turns; the first is for warming up
        times["lower"].append(_timed(lower.run, batches))
        times["full"].append(_timed(lambda batch: _whole(lower, batch), batches))
    lower_half, full = (float(np.median(times[kind][1:])) / tokens for kind in ("lower", "full"))
    starts = lower.site.layer is not None and 0 < lower.site.layer < len(family.layers_of(base))
    return Timing(full, min(lower_half, full), lower.hidden_size, lengths, family.dtype, starts)


def measure_features(lower: LowerHalf, encoder: MediaEncoder, documents: Sequence[Any], most: int = 16) -> Timing:
    """Compute some images or sounds, one at a time, by the lower half; ``full`` is told as ``lower``."""
    some = [entries[0] for entries in encoder.encode(documents[:most])]
    lengths = [int(lower.run_features([one])[lower.site][0].shape[0]) for one in some]  # for warming up, too
    seconds = _timed(lambda one: lower.run_features([one]), some) / sum(lengths)
    return Timing(seconds, seconds, lower.hidden_size, lengths, lower.family.dtype)


def _timed(compute: Callable[[Any], object], batches: Sequence[Any]) -> float:
    began = time.perf_counter()
    for batch in batches:
        compute(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _whole(lower: LowerHalf, batch: Sequence[Any]) -> None:
    """Compute all layers of a batch."""
    ids, mask = padded(batch, 0), padded([np.ones(len(one), np.int64) for one in batch], 0)
    with torch.inference_mode():
        lower.family.stack_of(lower.base_model)(input_ids=ids.to(lower.device), attention_mask=mask.to(lower.device))

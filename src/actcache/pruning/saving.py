"""Saving a pruned model, so that nothing takes its rows for those of other tokens.

``save_pretrained`` of a pruned model writes the rows that it holds and, in their buffer, which tokens they are, under a
configuration that says the whole vocabulary's size: ``from_pretrained`` alone refuses sizes that do not agree.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from actcache.models.partial import kept_of
from actcache.pruning.sizes import marked, set_vocabulary_size

#: The configuration's field by which a small checkpoint says what it is a part of.
RECORD = "actcache_vocabulary"


def install(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Have a pruned model, and its base model, save themselves as what they are."""
    setattr(model.config, RECORD, record)
    for one in (model, model.base_model):
        one.__dict__["save_pretrained"] = functools.partial(_save_small, one)  # copied and pickled with it


def remove(module: nn.Module) -> None:
    """Take off whatever ``install`` has put on a module."""
    module.__dict__.pop("save_pretrained", None)
    config = module.__dict__.get("config")
    if hasattr(config, RECORD):
        delattr(config, RECORD)


@contextlib.contextmanager
def whole_config(model: nn.Module, size: int, record: dict[str, Any] | None) -> Iterator[None]:
    """Within this context, configurations say the whole vocabulary's size, and this record."""
    config: Any = model.config
    before, rows = getattr(config, RECORD), config.vocab_size
    delattr(config, RECORD)
    if record is not None:
        setattr(config, RECORD, record)
    set_vocabulary_size(model, rows, size, configs_only=True)
    try:
        yield
    finally:
        set_vocabulary_size(model, size, rows, configs_only=True)
        setattr(config, RECORD, before)


def _save_small(model: Any, *args: Any, **kwargs: Any) -> Any:
    held = next((kept_of(module) for module, _ in marked(model) if isinstance(module, nn.Embedding)), None)
    if held is None:  # a reduced model, which has no embeddings
        return type(model).save_pretrained(model, *args, **kwargs)
    record = {**getattr(model.config, RECORD), "rows": len(held.ids)}
    with whole_config(model, held.size, record):
        return type(model).save_pretrained(model, *args, **kwargs)

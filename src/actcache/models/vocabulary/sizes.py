"""Keeping true what a model says of its vocabulary's size."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from actcache.models.vocabulary.kept import MARK, Mark


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """Return the configurations that a model's parts hold, each once (an encoder's is a copy of its model's)."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            found[id(config)] = config
    return list(found.values())


def own_configs(model: nn.Module) -> None:
    """Give a model configurations of its own: one may have been made from another's, which must keep its size."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            module.__dict__["config"] = copy.deepcopy(config, memo)


def marked(model: nn.Module) -> Iterator[tuple[nn.Module, Mark]]:
    """Yield the modules that have parameters with a row per token."""
    for module in model.modules():
        mark = module.__dict__.get(MARK)
        if isinstance(mark, Mark):
            yield module, mark


def set_vocabulary_size(model: nn.Module, before: int, after: int, *, configs_only: bool = False) -> None:
    """Set ``vocab_size`` of all configurations, and what modules say of their rows, where it was ``before``."""
    for config in configs_of(model):
        if getattr(config, "vocab_size", None) == before:
            config.vocab_size = after
    if configs_only:
        return
    for module in model.modules():
        if module.__dict__.get("vocab_size") == before:
            module.__dict__["vocab_size"] = after
    for module, mark in marked(model):
        for attribute in ("num_embeddings", "out_features"):
            if attribute in module.__dict__ and "weight" in mark.names:
                module.__dict__[attribute] = after

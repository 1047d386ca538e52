"""What goes into a pruned model and comes out of it: token ids become rows where they are looked up, not before.

Heads that look for the padding or the last token see the ids that the user gave. The hooks read the state of the module
that they are called with, so that copies of a model have their own.

``save_pretrained`` of a pruned model writes the rows that it holds and, in their buffer, which tokens they are, under a
configuration that says the whole vocabulary's size: ``from_pretrained`` alone refuses sizes that do not agree.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from actcache.errors import UsageError
from actcache.models.partial_vocabulary import KEPT, kept_of
from actcache.models.vocabulary.embedding_rows import grow, marked, roots_of, set_vocabulary_size
from actcache.models.vocabulary.kept import KeptVocabulary

#: The configuration's field by which a small checkpoint says what it is a part of.
RECORD = "actcache_vocabulary"


def install(model: PreTrainedModel, embeddings: list[nn.Module], record: dict[str, Any]) -> None:
    """Have embeddings look up rows, a model translate labels and, while it generates, logits, and save ``record``."""
    kept = _kept(model)
    for embedding in embeddings:
        embedding.register_forward_pre_hook(look_up, with_kwargs=True)
    for root in roots_of(model, kept):
        root.register_forward_pre_hook(translate, with_kwargs=True)
        root.register_forward_hook(spread)
        if kept.has_output and root.can_generate():
            root.__dict__["generate"] = functools.partial(_generate, root)  # copied and pickled with it
    setattr(model.config, RECORD, record)
    for one in (model, model.base_model):
        one.__dict__["save_pretrained"] = functools.partial(_save_small, one)  # likewise


def remove(module: nn.Module) -> None:
    """Take off whatever ``install`` has put on a module."""
    for hooks, options in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for number in [number for number, hook in hooks.items() if hook in (look_up, translate, spread)]:
            del hooks[number]
            options.pop(number, None)
    for name in ("generate", "save_pretrained"):
        module.__dict__.pop(name, None)
    config = module.__dict__.get("config")
    if hasattr(config, RECORD):
        delattr(config, RECORD)


def look_up(embedding: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Turn the token ids that an embedding is called with into rows."""
    kept = _kept(embedding)
    if args:
        return (kept.rows_of(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": kept.rows_of(kwargs["input"])}


def translate(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Grow, where that is wanted, by all tokens of a call; turn its labels into rows, where they are tokens."""
    kept = _kept(model)
    if args:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    labels = kwargs.get("labels") if kept.has_output else None
    if kept.on_unseen == "grow":
        # All at once, before anything is looked up: a matrix must not change within a call.
        given = [ids for name in ("input_ids", "decoder_input_ids") if (ids := kwargs.get(name)) is not None]
        given += [] if labels is None else [labels[labels >= 0]]
        unseen = [kept.unseen(ids) for ids in given]
        if any(map(len, unseen)):
            grow(model, kept, torch.cat(unseen).unique())
    if labels is not None:
        kwargs = dict(kwargs)
        shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        given_decoder = any(kwargs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
        if shifted is not None and not given_decoder:
            kwargs["decoder_input_ids"] = shifted(labels)
        rows = labels.clone()
        rows[labels >= 0] = kept.rows_of(labels[labels >= 0]).to(labels.dtype)
        kwargs["labels"] = rows
    return (), kwargs


def spread(model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Give logits over the whole vocabulary, minus infinity for tokens without a row, where that is wanted just now."""
    kept = _kept(model)
    if not (kept.whole_logits and kept.has_output):
        return output
    if not hasattr(output, "logits"):
        raise UsageError("logits over the whole vocabulary need return_dict=True")
    logits = output.logits
    whole = logits.new_full((*logits.shape[:-1], kept.size), -torch.inf)
    whole[..., kept.ids.to(logits.device)] = logits
    output.logits = whole
    return output


@contextlib.contextmanager
def whole_logits(model: nn.Module) -> Iterator[None]:
    """Within this context, a pruned language model gives logits over the whole vocabulary. Its loss is the same."""
    kept = _kept(model)
    before, kept.whole_logits = kept.whole_logits, True
    try:
        yield
    finally:
        kept.whole_logits = before


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    with whole_logits(model):
        return type(model).generate(model, *args, **kwargs)


def _kept(module: nn.Module) -> KeptVocabulary:
    kept: KeptVocabulary = module.__dict__[KEPT]
    return kept


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

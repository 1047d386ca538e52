"""The parameters of a model that have a row per token: where they are, and how their rows are dropped and added."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from actcache.errors import ModelError, UnsupportedModelError
from actcache.models.partial_vocabulary import ROW_IDS
from actcache.models.vocabulary.kept import MARK, KeptVocabulary, Mark
from actcache.models.vocabulary.moving import Move


@dataclass(frozen=True)
class Tokens:
    """The parameters of a model that have a row per token."""

    size: int  # rows of each
    parameters: dict[str, nn.Parameter]  # by the name of one of those that are tied; the input's comes first
    marks: list[tuple[nn.Module, Mark]]  # where they are
    embeddings: list[nn.Module]  # that look up rows of the first
    has_output: bool  # whether the model has logits over the vocabulary


def tokens_of(model: PreTrainedModel) -> Tokens:
    """Find a model's input embeddings, output embeddings with their bias, and all that is tied to them.

    Raises:
        UnsupportedModelError: there are none, or others that this does not know.
    """
    source = model.get_input_embeddings()
    weight = source._parameters.get("weight") if isinstance(source, nn.Embedding) else None
    if weight is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} looks up tokens in a {type(source).__name__}, not in an embedding matrix"
        )
    size = len(weight)
    for config in configs_of(model):
        if getattr(config, "vocab_size_per_layer_input", None) is not None:
            raise UnsupportedModelError(f"{type(model).__name__} has embeddings per layer, which pruning would miss")
        if getattr(config, "vocab_size", size) != size:
            raise ModelError(
                f"{type(model).__name__} has {size} embeddings and config.vocab_size {config.vocab_size}: make them "
                "agree with model.resize_token_embeddings(...)"
            )
    output = list(_output_parameters(model, size))
    numbers = [(name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point()]
    missed = [name for name, buffer in numbers if output and buffer.shape[-1:] == (size,)]
    if missed:  # BART's final_logits_bias
        raise UnsupportedModelError(f"{type(model).__name__} adds {missed[0]} to its logits, which pruning would miss")
    wanted = {id(parameter) for parameter in (weight, *output)}
    found = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}
    names = {id(parameter): name for name, parameter in found.items()}
    parameters = {names[id(weight)]: weight, **found}
    marks = []
    for module in model.modules():
        own = {key: names[id(p)] for key, p in module._parameters.items() if p is not None and id(p) in wanted}
        if own:
            marks.append((module, Mark(own, getattr(module, "padding_idx", None))))
    embeddings: list[nn.Module] = [module for module, _ in marks if isinstance(module, nn.Embedding)]
    return Tokens(size, parameters, marks, embeddings, bool(output))


def _output_parameters(model: PreTrainedModel, size: int) -> Iterator[nn.Parameter]:
    output = model.get_output_embeddings()
    if output is None:
        return
    # Some heads keep the bias beside the matrix, and DeBERTa's takes the matrix from the embeddings.
    parents = [module for module in model.modules() if any(child is output for child in module.children())]
    found = [*output._parameters.values(), *(parent._parameters.get("bias") for parent in parents)]
    yield from (parameter for parameter in found if parameter is not None and len(parameter) == size)


def all_names(model: nn.Module, wanted: nn.Parameter) -> list[str]:
    """Return all names of a parameter, those of what is tied to it included."""
    return [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is wanted]


def roots_of(model: PreTrainedModel, kept: KeptVocabulary) -> list[PreTrainedModel]:
    """Return the models whose call can grow the vocabulary: the base model too, where it holds all of its rows."""
    base = model.base_model
    alone = not kept.has_output and isinstance(base, PreTrainedModel) and base is not model
    return [model, base] if alone and isinstance(base, PreTrainedModel) else [model]


def move_rows(
    model: nn.Module, kept: KeptVocabulary, after: torch.Tensor, *, before: torch.Tensor | None = None
) -> None:
    """Have a model hold the rows of the tokens ``after``, in that order: in its parameters, gradients, optimizers.

    Each parameter is replaced by another, for the graph of an earlier call may still hold it as it was.

    Raises:
        ModelError: rows that are needed are not at hand, or an optimizer's state is packed. Nothing was changed.
    """
    move = Move(kept.ids if before is None else before, after, kept.size)
    replaced: dict[int, tuple[nn.Parameter, nn.Parameter, str]] = {}
    for module, mark in marked(model):
        for attribute, name in mark.names.items():
            old = module.get_parameter(attribute)
            if id(old) not in replaced:
                kept.optimizers.check(old, name)
                replaced[id(old)] = old, _moved(old, move, kept, name), name
    for old, new, name in replaced.values():
        kept.optimizers.replace(old, new, move, name)
    for module, mark in marked(model):
        for attribute in mark.names:
            module._parameters[attribute] = replaced[id(module.get_parameter(attribute))][1]
    kept.set_ids(after)
    set_vocabulary_size(model, len(move.before), len(after))
    _show_ids(model, kept)


def grow(model: nn.Module, kept: KeptVocabulary, ids: torch.Tensor) -> None:
    """Add the rows of tokens that a model does not hold yet, as they were before pruning."""
    move_rows(model, kept, torch.cat([kept.ids, ids]))


def _moved(old: nn.Parameter, move: Move, kept: KeptVocabulary, name: str) -> nn.Parameter:
    data = move.apply(old.detach())
    if len(move.new):
        rest = kept.rest[name]
        if rest is None:
            raise ModelError(
                f"{len(move.new)} rows of {name} are needed and not at hand: load the model with "
                "load_pruned(..., full_matrix=the pretrained model's folder)"
            )
        data[move.new.to(data.device)] = rest[move.after[move.new]].to(data.device, data.dtype)
    new = nn.Parameter(data, requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    if old.grad is not None:
        new.grad = move.apply(old.grad)
    return new


def _show_ids(model: nn.Module, kept: KeptVocabulary) -> None:
    """Put the ids into the model's ``state_dict``, and the padding's row where its id was."""
    embeddings = [(module, mark) for module, mark in marked(model) if isinstance(module, nn.Embedding)]
    for i, (module, mark) in enumerate(embeddings):
        if mark.padding_idx is not None:
            module.padding_idx = int(torch.nonzero(kept.ids == mark.padding_idx)[0])
        ids = kept.ids.to(module.weight.device, torch.int32)
        # The first of those that are tied shows it: what is shared would be saved twice.
        module.register_buffer(ROW_IDS, ids, persistent=i == 0)


def special_ids(model: nn.Module) -> Iterable[int]:
    """Return the ids that configurations name (padding, end of text, ...) and 0, with which others are padded."""
    configs = [vars(config) for config in (*configs_of(model), getattr(model, "generation_config", None)) if config]
    values = [value for config in configs for name, value in config.items() if name.endswith("_token_id")]
    return {0, *(i for value in values for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))}


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """Return the configurations that a model's parts hold, each once (an encoder's is a copy of its model's)."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in configs if isinstance(config, PreTrainedConfig)}.values())


def own_configs(model: nn.Module) -> None:
    """Give a model configurations of its own: one may have been made from another's, which must keep its size."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(config := module.__dict__.get("config"), PreTrainedConfig):
            module.__dict__["config"] = copy.deepcopy(config, memo)


def marked(model: nn.Module) -> Iterator[tuple[nn.Module, Mark]]:
    """Yield the modules that have parameters with a row per token."""
    for module in model.modules():
        if isinstance(mark := module.__dict__.get(MARK), Mark):
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

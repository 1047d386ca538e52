"""Checkpoints of pruned models: small ones, which hold the rows that the model holds, and full ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from actcache.errors import ModelError
from actcache.models.partial_vocabulary import ROW_IDS, Whole, whole_state
from actcache.models.tensors import set_parameter
from actcache.models.vocabulary.embedding_rows import set_vocabulary_size, tokens_of
from actcache.models.vocabulary.full_matrix import checksum, of_checkpoint
from actcache.models.vocabulary.hooks import RECORD, whole_config
from actcache.models.vocabulary.kept import KeptVocabulary, OnUnseen
from actcache.models.vocabulary.pruned import Pruned, hold


def save_full(pruned: Pruned, folder: str | Path, **options: Any) -> None:
    """Save a model as ``save_pretrained`` would after ``restore``, while it stays pruned. On the CPU, matrix by matrix.

    Raises ``ModelError`` where the rows that were dropped are not at hand.
    """
    model = pruned.model
    wholes: dict[str, torch.Tensor] = {}  # of tied parameters the same tensor, as save_pretrained expects
    state: dict[str, torch.Tensor] = {}
    for name, tensor in whole_state(model):
        if isinstance(tensor, Whole):
            if tensor.name not in wholes:
                wholes[tensor.name] = tensor.rows(0, pruned.size)
            tensor = wholes[tensor.name]
        state[name] = tensor
    with whole_config(model, pruned.size, None):
        type(model).save_pretrained(model, folder, state_dict=state, **options)


def load_pruned(
    model_class: Any,
    folder: str | Path,
    *,
    full_matrix: str | Path | None = None,
    on_unseen: OnUnseen = "raise",
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Pruned:
    """Load a checkpoint that ``save_pretrained`` of a pruned model wrote. No whole matrix is ever in memory.

    Args:
        model_class: an auto class (``AutoModelForSequenceClassification``) or a class of models.
        full_matrix: name or folder of the model as it was when it was pruned (the pretrained one), whose safetensors
            files are mapped for what needs the other rows: ``grow``, ``restore``, ``save_full``, a recycler.
        on_unseen, tokenizer: as for ``prune_vocabulary``.

    Raises:
        ModelError: it is no such checkpoint, or ``full_matrix`` is another model's.
    """
    config = options.pop("config", None) or AutoConfig.from_pretrained(folder)
    record = getattr(config, RECORD, None)
    if not isinstance(record, dict) or not all(isinstance(record.get(name), int) for name in ("size", "rows")):
        raise ModelError(f"{folder} holds no pruned model: load it with from_pretrained")
    if not 0 < record["rows"] <= record["size"] == config.vocab_size:
        raise ModelError(f"the configuration of {folder} contradicts itself: save the pruned model anew")
    task_class = _class_of(model_class, config)
    small = _small(task_class, record.pop("rows"))
    model: PreTrainedModel
    model, loading = small.from_pretrained(folder, config=config, **{**options, "output_loading_info": True})
    model.__class__ = task_class
    tokens = tokens_of(model)
    ids = tokens.embeddings[0].get_buffer(ROW_IDS).cpu().long()
    # What a checkpoint lacks is memory as it was found, which may hold anything: the ids of another model, too.
    absent = any(name.endswith(ROW_IDS) for name in loading["missing_keys"])
    if (
        absent
        or ids.is_meta
        or len(ids.unique()) != tokens.size
        or int(ids.min()) < 0
        or int(ids.max()) >= record["size"]
    ):
        raise ModelError(f"the weights of {folder} do not say which tokens their rows are: save the pruned model anew")
    rest: dict[str, torch.Tensor | None] = dict.fromkeys(tokens.parameters)
    if full_matrix is not None:
        rest = of_checkpoint(model, tokens.parameters, str(full_matrix))
        _check(rest[next(iter(rest))], record, full_matrix)
    kept = KeptVocabulary(
        record["size"], ids, rest, has_output=tokens.has_output, on_unseen=on_unseen, tokenizer=tokenizer
    )
    return hold(model, tokens, kept, ids, record)


def _check(matrix: torch.Tensor | None, record: dict[str, Any], full_matrix: str | Path) -> None:
    if matrix is None:
        raise ModelError(f"{str(full_matrix)!r} has no safetensors file with the embedding matrix")
    dtype = getattr(torch, str(record.get("dtype")), None)
    same = isinstance(dtype, torch.dtype) and len(matrix) == record["size"]
    if not (same and checksum(matrix, dtype) == record.get("xxh3_128")):  # type: ignore[arg-type]
        raise ModelError(f"{str(full_matrix)!r} has other embeddings than the model that was pruned")


def _class_of(model_class: Any, config: PreTrainedConfig) -> Any:
    if not hasattr(model_class, "from_config"):
        return model_class
    with torch.device("meta"):
        return type(model_class.from_config(copy.deepcopy(config)))


def _small(task_class: Any, rows: int) -> Any:
    """Return a class of models with so many rows: the padding's id may be larger, so a configuration cannot say it."""

    def make(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        size = config.vocab_size
        task_class.__init__(self, config, *args, **kwargs)
        tokens = tokens_of(self)
        names = set(tokens.parameters)
        for pair in self.all_tied_weights_keys.items():  # from_pretrained ties them when it has loaded them
            if names.intersection(pair):
                names.update(pair)
        for name in names:
            parameter = self.get_parameter(name)
            set_parameter(self, name, nn.Parameter(parameter.new_empty((rows, *parameter.shape[1:]))))
        tokens.embeddings[0].register_buffer(ROW_IDS, torch.empty(rows, dtype=torch.int32))
        set_vocabulary_size(self, size, rows)

    made = type(task_class.__name__, (task_class,), {"__init__": make})
    made.__module__, made.__qualname__ = task_class.__module__, task_class.__qualname__
    return made

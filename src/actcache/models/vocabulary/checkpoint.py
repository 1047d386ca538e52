"""Checkpoints of pruned models: small ones, which hold the rows that the model holds, and full ones."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from actcache.errors import ModelError
from actcache.models.partial import ROW_IDS, Whole, kept_of, whole_state
from actcache.models.vocabulary import hooks
from actcache.models.vocabulary.kept import KeptVocabulary, OnUnseen
from actcache.models.vocabulary.pruned import Pruned
from actcache.models.vocabulary.rows import all_names, attach, move_rows, roots_of, tokens_of
from actcache.models.vocabulary.sizes import marked, set_vocabulary_size
from actcache.models.weights import weight_files

# Where the rows are that a pruned model does not hold: in memory, or mapped from a safetensors file.

_CHUNK_ROWS = 1 << 14


def in_memory(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix on the CPU; it is not copied where it is there already."""
    return matrix.detach().cpu()


def write(path: Path, matrices: Mapping[str, torch.Tensor]) -> None:
    """Write matrices into one file, under their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: matrix.detach().cpu().contiguous() for name, matrix in matrices.items()}, str(path))


def find(files: Sequence[Path], names: Sequence[str], prefix: str) -> torch.Tensor | None:
    """Map the first of some names that a file has; its pages are read when they are needed, and can be given back.

    Args:
        names: of the tensor in the model.
        prefix: of the base model, which a checkpoint's names may have or lack.

    Raises:
        ModelError: a file cannot be read.
    """
    wanted = [*names, *(name.removeprefix(prefix) for name in names), *(prefix + name for name in names)]
    for file in files:
        try:
            with safe_open(str(file), "pt", device="cpu") as archive:
                there = set(archive.keys())
                for name in wanted:
                    if name in there:
                        matrix: torch.Tensor = archive.get_tensor(name)
                        return matrix
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be read as safetensors: {error}") from error
    return None


def equal(mapped: torch.Tensor, matrix: torch.Tensor) -> bool:
    """Whether a mapped matrix, cast to the other's dtype, equals it; a few rows are in memory at a time."""
    if mapped.shape != matrix.shape:
        return False
    starts = range(0, len(matrix), _CHUNK_ROWS)
    return all(
        torch.equal(mapped[i : i + _CHUNK_ROWS].to(matrix.dtype), matrix[i : i + _CHUNK_ROWS].detach().cpu())
        for i in starts
    )


def checksum(matrix: torch.Tensor, dtype: torch.dtype) -> str:
    """Return the XXH3-128 of a matrix's bytes in a dtype, to know it again."""
    digest = xxhash.xxh3_128()
    for i in range(0, len(matrix), _CHUNK_ROWS):
        rows = matrix[i : i + _CHUNK_ROWS].detach().to(dtype).cpu().contiguous()
        digest.update(memoryview(rows.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


# Saving a pruned model, so that nothing takes its rows for those of other tokens.
#
# ``save_pretrained`` of a pruned model writes the rows that it holds and, in their buffer, which tokens they are, under
# a configuration that says the whole vocabulary's size: ``from_pretrained`` alone refuses sizes that do not agree.

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


def save_full(pruned: Pruned, folder: str | Path, **options: Any) -> None:
    """Save a model as ``save_pretrained`` would after ``restore``, while it stays pruned. On the CPU, matrix by matrix.

    Args:
        options: of ``save_pretrained``.

    Raises:
        ModelError: the rows that were dropped are not at hand.
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
        on_unseen, tokenizer: as for ``prune``.
        options: of ``from_pretrained``.

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
    model: PreTrainedModel = small.from_pretrained(folder, config=config, **options)
    model.__class__ = task_class
    tokens = tokens_of(model)
    ids = tokens.embeddings[0].get_buffer(ROW_IDS).cpu().long()
    if ids.is_meta or len(ids.unique()) != tokens.size or int(ids.min()) < 0 or int(ids.max()) >= record["size"]:
        raise ModelError(f"the weights of {folder} do not say which tokens their rows are: save the pruned model anew")
    rest: dict[str, torch.Tensor | None] = dict.fromkeys(tokens.parameters)
    if full_matrix is not None:
        files = [file for file in weight_files(str(full_matrix)) if file.suffix == ".safetensors"]
        prefix = f"{model.base_model_prefix}."
        rest = {n: find(files, all_names(model, p), prefix) for n, p in tokens.parameters.items()}
        _check(rest[next(iter(rest))], record, full_matrix)
    kept = KeptVocabulary(
        record["size"], ids, rest, has_output=tokens.has_output, on_unseen=on_unseen, tokenizer=tokenizer
    )
    attach(model, tokens, kept)
    move_rows(model, kept, ids)
    for root in roots_of(model, kept):
        hooks.install(root, tokens.embeddings if root is model else [])
    install(model, record)
    return Pruned(model)


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
    """Return a class whose models are made with so many rows, whatever the configuration says.

    The configuration alone could not: the padding's id may be larger than the number of rows.
    """

    def make(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        size = config.vocab_size
        task_class.__init__(self, config, *args, **kwargs)
        tokens = tokens_of(self)
        names = set(tokens.parameters)
        for pair in self.all_tied_weights_keys.items():  # from_pretrained ties them when it has loaded them
            if names.intersection(pair):
                names.update(pair)
        for name in names:
            path, _, attribute = name.rpartition(".")
            parameter = self.get_parameter(name)
            small = nn.Parameter(parameter.new_empty((rows, *parameter.shape[1:])))
            self.get_submodule(path)._parameters[attribute] = small
        tokens.embeddings[0].register_buffer(ROW_IDS, torch.empty(rows, dtype=torch.int32))
        set_vocabulary_size(self, size, rows)

    made = type(task_class.__name__, (task_class,), {"__init__": make})
    made.__module__, made.__qualname__ = task_class.__module__, task_class.__qualname__
    return made

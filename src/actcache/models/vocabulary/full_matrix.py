"""All rows of a matrix of which a pruned model holds some: in memory, or mapped from a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from actcache.errors import ModelError, UsageError
from actcache.models.vocabulary.embedding_rows import Tokens, all_names
from actcache.models.weights import weight_files

_CHUNK_ROWS = 1 << 14


def full_matrices(model: PreTrainedModel, tokens: Tokens, full_matrix: str | Path) -> dict[str, torch.Tensor | None]:
    """Return all rows of each parameter with a row per token, where the caller wants them; see ``prune_vocabulary``."""
    matrices = {name: parameter for name, parameter in tokens.parameters.items() if parameter.ndim > 1}
    found: dict[str, torch.Tensor | None] = {}
    if full_matrix == "checkpoint":
        found = _of_own_checkpoint(model, matrices)
    elif full_matrix != "memory":
        path = Path(full_matrix)
        if path.exists():
            raise UsageError(f"{path} is there already: give the path of a new file, or full_matrix='checkpoint'")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: matrix.detach().cpu().contiguous() for name, matrix in matrices.items()}, str(path))
        found = {name: _find([path], [name]) for name in matrices}
    return {
        name: parameter.detach().cpu() if found.get(name) is None else found[name]
        for name, parameter in tokens.parameters.items()
    }


def of_checkpoint(
    model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], name_or_path: str
) -> dict[str, torch.Tensor | None]:
    """Map what a checkpoint's safetensors files hold of a model's parameters; None for what they do not hold.

    Raises:
        ModelError: a file cannot be read.
    """
    files = [file for file in weight_files(name_or_path) if file.suffix == ".safetensors"] if name_or_path else []
    prefix = f"{model.base_model_prefix}."  # which a checkpoint's names may have or lack
    found = {}
    for name, parameter in parameters.items():
        names = all_names(model, parameter)
        found[name] = _find(files, [*names, *(n.removeprefix(prefix) for n in names), *(prefix + n for n in names)])
    return found


def _of_own_checkpoint(model: PreTrainedModel, matrices: dict[str, nn.Parameter]) -> dict[str, torch.Tensor | None]:
    name_or_path = str(model.config.name_or_path)
    found = of_checkpoint(model, matrices, name_or_path)
    first = next(iter(matrices))
    instead = "give full_matrix='memory' or the path of a file to write"
    for name, mapped in found.items():
        if mapped is None and name == first:
            raise ModelError(f"the checkpoint {name_or_path!r} has no safetensors file with {name}: {instead}")
        if mapped is not None and not _equal(mapped, matrices[name]):
            raise ModelError(
                f"{name} is not what the checkpoint {name_or_path!r} has (it was trained, or the files were replaced): "
                f"{instead}"
            )
    return found


def _find(files: Sequence[Path], names: Sequence[str]) -> torch.Tensor | None:
    """Map the first of some names that a file has; its pages are read when they are needed, and can be given back."""
    for file in files:
        try:
            with safe_open(str(file), "pt", device="cpu") as archive:
                there = set(archive.keys())
                if name := next((name for name in names if name in there), None):
                    matrix: torch.Tensor = archive.get_tensor(name)
                    return matrix
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be read as safetensors: {error}") from error
    return None


def _equal(mapped: torch.Tensor, matrix: torch.Tensor) -> bool:
    """Whether a mapped matrix, cast to the other's dtype, equals it; a few rows are in memory at a time."""
    return mapped.shape == matrix.shape and all(
        torch.equal(rows.to(matrix.dtype), own.detach().cpu())
        for rows, own in zip(mapped.split(_CHUNK_ROWS), matrix.split(_CHUNK_ROWS), strict=True)
    )


def checksum(matrix: torch.Tensor, dtype: torch.dtype) -> str:
    """Return the XXH3-128 of a matrix's bytes in a dtype, to know it again."""
    digest = xxhash.xxh3_128()
    for rows in matrix.detach().split(_CHUNK_ROWS):
        plain = rows.to(dtype).cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(plain.numpy()))
    return digest.hexdigest()

"""Where the rows are that a pruned model does not hold: in memory, or mapped from a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from actcache.errors import ModelError

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

"""What a reader finds of its keys, checked; and which rank it is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import MissingEntryError, UsageError
from actcache.format.arguments import whole
from actcache.format.keys import key_list
from actcache.reader.fetch import OwnSource


def check_present(keys: NDArray[np.uint8], found: NDArray[np.bool_]) -> None:
    """Refuse keys that are absent."""
    if not found.all():
        missing = key_list(keys[~found])
        raise MissingEntryError(
            f"{len(missing)} of {len(keys)} documents are not in the space, the first at position "
            f"{int(np.argmin(found))}: fill them first, or pass on_missing='skip'",
            missing,
        )


def check_own(
    source: OwnSource, keys: NDArray[np.uint8], names: Sequence[str], *, mask: str | None = None, tensors: bool
) -> None:
    """Refuse columns of the caller's own that a space or a document has not, that no tensor holds where ``tensors`` are
    asked for, and a ``mask`` that is none; a ``UsageError``."""
    schema = source.schema
    fields = {} if schema is None else {name: (np.dtype(dtype), shape) for name, dtype, shape in schema.fields}
    for name in names:
        if name not in fields:
            raise UsageError(f"there is no column {name!r}; there are {', '.join(fields) or 'none'}")
        dtype, shape = fields[name]
        if name == mask and (shape or dtype.kind not in "biuf"):
            raise UsageError(f"column {name} holds {dtype} {list(shape)} a token, and a mask is one number")
        if tensors and (dtype.kind not in "biufc" or dtype.itemsize > 16):
            raise UsageError(f"column {name} holds {dtype}, which no tensor does: leave device out to have it as NumPy")
    has = source.has(names[0], keys)
    there = source.lengths(keys) > 0
    if (lacking := there & ~has).any():
        raise UsageError(
            f"{int(lacking.sum())} of {len(keys)} documents were stored without columns, the first is "
            f"{keys[int(np.argmax(lacking))].tobytes().hex()}: put them again with overwrite=True, or leave them out"
        )


def ranks_of(given: tuple[int, int] | None, digest: str) -> tuple[int, int]:
    """Return this process's rank and how many there are; ``UsageError`` where they are no ranks, or the ranks of
    ``torch.distributed`` read in different orders."""
    if given is not None:
        rank, world = given
        world, rank = whole("the number of ranks", world, 1), whole("rank", rank, 0)
        if rank >= world:
            raise UsageError(f"rank {rank} is not below the number of ranks, {world}")
        return rank, world
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    world = distributed.get_world_size()
    digests: list[Any] = [None] * world
    distributed.all_gather_object(digests, digest)
    if len(set(digests)) > 1:
        raise UsageError("the ranks' readers have other documents, options, or views of the store; refresh the spaces")
    return distributed.get_rank(), world

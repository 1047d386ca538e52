"""Models whose embedding matrix holds some tokens' rows only, as far as their identity asks.

``actcache.models.vocabulary`` makes them. A recipe's digest is that of the whole matrix, so that a pruned model finds
the cache of the unpruned one; here is how the whole is read where a module has a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from actcache.errors import ModelError
from actcache.models.discovery import vocabulary_of
from actcache.models.tensors import without_bytes

#: The attribute of a module (and of a pruned model) that says which rows it holds.
KEPT = "actcache_kept"
#: The buffer by which a checkpoint says the same; no part of a model's numbers.
ROW_IDS = "row_ids"


class Kept(Protocol):
    """What such a module knows of the vocabulary."""

    @property
    def size(self) -> int:
        """Tokens of the whole vocabulary."""

    @property
    def ids(self) -> torch.Tensor:
        """``[rows]`` int64 on the CPU: the token of each row."""

    def whole(self, module: nn.Module, name: str) -> Whole | None:
        """Return a module's parameter as a whole; None where it has no row per token."""


class Whole:
    """A matrix of which a model holds some rows, those that it holds taken from there. Never materialized. Read-only.

    Args:
        part: ``[rows, ...]`` what the model holds, on any device.
        ids: ``[rows]`` int64, which row of the whole each of them is.
        rest: ``[tokens, ...]`` on the CPU (or mapped from a file): all rows as they were before pruning; None where
            they are not at hand. It is cast to the dtype of ``part``.
        size: tokens of the whole.
    """

    def __init__(self, name: str, part: torch.Tensor, ids: torch.Tensor, rest: torch.Tensor | None, size: int) -> None:
        self.name, self._part, self._rest = name, part.detach(), rest
        self.dtype, self.shape = part.dtype, (size, *part.shape[1:])
        self._ids, self._order = torch.sort(ids)
        self._row_bytes = part[:1].numel() * part.element_size()
        self.nbytes = size * self._row_bytes

    @property
    def memory(self) -> tuple[Any, ...]:
        """What two of them that hold the same have in common."""
        return self._part.device, self._part.data_ptr(), self.dtype, self.shape, id(self._rest)

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Return a copy of the rows ``first:last`` on the CPU; raises ``ModelError`` where they are not at hand."""
        if self._part.is_meta:
            raise without_bytes(self.name)
        if self._rest is None and len(self._ids) < self.shape[0]:
            raise ModelError(
                f"{self.name} holds {len(self._ids)} of {self.shape[0]} rows and the others are not at hand: load it "
                "with load_pruned(..., full_matrix=the pretrained model's folder)"
            )
        begin, end = torch.searchsorted(self._ids, torch.tensor([first, last])).tolist()
        if self._rest is None:
            out = torch.empty(last - first, *self.shape[1:], dtype=self.dtype)
        else:
            out = self._rest[first:last].to(self.dtype, copy=True)
        held = self._part[self._order[begin:end].to(self._part.device)]
        out[self._ids[begin:end] - first] = held.cpu()
        return out

    def read(self, start: int, stop: int) -> memoryview:
        """Return the bytes ``start:stop`` of the whole in row order."""
        width = self._row_bytes
        stop = min(stop, self.nbytes)
        first, last = start // width, -(-stop // width)
        flat = self.rows(first, last).reshape(-1).view(torch.uint8)
        return memoryview(flat.numpy())[start - first * width : stop - first * width]  # type: ignore[arg-type]


def kept_of(module: nn.Module) -> Kept | None:
    """Return what a module or model knows of a vocabulary of which it holds a part; None where it holds the whole."""
    return module.__dict__.get(KEPT)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return how many token ids a model is given to understand: before any vocabulary pruning."""
    kept = next((kept for module in model.modules() if (kept := kept_of(module)) is not None), None)
    return vocabulary_of(model.config) if kept is None else kept.size


def some_ids(model: PreTrainedModel, count: int) -> NDArray[np.int64]:
    """Return at most so many different token ids that a model takes, also where its vocabulary was pruned."""
    for module in model.modules():
        if (kept := kept_of(module)) is not None:
            return kept.ids[:count].numpy().astype(np.int64)
    return np.arange(min(count, vocabulary_size(model)), dtype=np.int64)


def whole_state(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the items of a module's ``state_dict`` as they would be without vocabulary pruning.

    They are tensors, ``Whole`` for a matrix that was pruned, or whatever else a module puts there (packed parameters).
    """
    # A hook of the state dict may have left something out.
    state: dict[str, Any] = {name: weight.detach() for name, weight in part.named_parameters(remove_duplicate=False)}
    state |= part.state_dict()
    for path, module in part.named_modules():
        if (kept := kept_of(module)) is None:
            continue
        prefix = f"{path}." if path else ""
        state.pop(prefix + ROW_IDS, None)
        for name in module._parameters:
            whole = kept.whole(module, name)
            if whole is not None and prefix + name in state:
                state[prefix + name] = whole
    yield from state.items()

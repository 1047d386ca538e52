"""What training loops of benches are fed: a reader's batches as inputs, and a full model that takes the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


class Batches:
    """A reader's batches, as keyword arguments of a model."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader)

    def __iter__(self) -> Iterator[Any]:
        return (batch.model_inputs() for batch in self._reader)


class FromTokens(torch.nn.Module):
    """A full model that is called as a reduced one or a consumer is, and computes everything from the tokens."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, activations: torch.Tensor, token_ids: torch.Tensor, **others: Any) -> Any:
        return self.model(input_ids=token_ids, **others)

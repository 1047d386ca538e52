"""Weighted pooling over cached layers: the embedding recycling paper names it as future work.

Rows of several layers are mixed with one learned weight a layer, ``gamma * sum_j softmax(w)_j h_j`` (the scalar mix of
Peters et al., 2018, ELMo, equation 1), and a linear head classifies: each token by its mixed row, or each document by
the mean over its tokens' mixed rows. No transformer layer is computed: nothing above the deepest cached layer is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

from actcache.errors import ShapeError, UsageError
from actcache.format.arguments import is_whole

Of = Literal["documents", "tokens"]


class WeightedPooling(nn.Module):
    """A classifier over the rows of several layers. As thread-safe as any module.

    Args:
        layers: how many are mixed, at the start in equal parts.
        classes: of the linear head.
        of: whether it classifies ``"documents"`` or ``"tokens"``.

    Raises:
        UsageError: a number is no whole one of 1 or more, or ``of`` is neither.
    """

    def __init__(self, layers: int, hidden_size: int, classes: int, of: Of = "documents") -> None:
        super().__init__()
        sizes = layers, hidden_size, classes
        if not all(is_whole(size) and size >= 1 for size in sizes) or of not in ("documents", "tokens"):
            raise UsageError("weighted pooling takes one or more layers, columns and classes, of documents or tokens")
        self.of = of
        self.weights = nn.Parameter(torch.zeros(layers))
        self.gamma = nn.Parameter(torch.ones(()))
        self.classifier = nn.Linear(hidden_size, classes)

    def shares(self) -> list[float]:
        """Return the layers' shares of the mixture; they sum to 1."""
        return [float(share) for share in self.weights.detach().softmax(0)]

    def forward(
        self,
        activations: Sequence[torch.Tensor],
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput | TokenClassifierOutput:
        """Return logits, and with labels the mean cross entropy.

        Args:
            activations: of each layer [batch, tokens, hidden], in any floating point dtype.
            attention_mask: [batch, tokens], 1 at tokens.
            labels: [batch] int64, or of tokens [batch, tokens] with -100 where there is none.
            token_ids: not used.

        Raises:
            ShapeError: there are more or fewer layers than weights.
        """
        if len(activations) != len(self.weights):
            raise ShapeError(f"{len(activations)} layers of rows for {len(self.weights)} weights")
        dtype = self.classifier.weight.dtype
        shares = self.weights.softmax(0)
        parts = [share * rows.to(dtype) for share, rows in zip(shares, activations, strict=True)]
        mixed = self.gamma * sum(parts[1:], start=parts[0])
        if self.of == "documents":
            mask = attention_mask.to(dtype)[..., None]
            mixed = (mixed * mask).sum(1) / mask.sum(1).clamp_min(1)
        logits = self.classifier(mixed)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        output = SequenceClassifierOutput if self.of == "documents" else TokenClassifierOutput
        return output(loss=loss, logits=logits)

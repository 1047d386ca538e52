"""How rows lie in the tensor that goes from layer to layer.

Most layers take ``[batch, tokens, width]``, which is what is stored. Some have the tokens first; those of convolutional
networks and of some vision transformers have the rows of a document in a grid, of height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from actcache.errors import ShapeError

#: ``batch_first`` [batch, tokens, width], ``time_first`` [tokens, batch, width], ``channels_last`` [batch, lines,
#: places in a line, width], ``channels_first`` [batch, width, lines, places in a line].
Order = Literal["batch_first", "time_first", "channels_last", "channels_first"]


@dataclass(frozen=True)
class Layout:
    """How a model's layers hold rows. Immutable.

    Args:
        grid: height and width of a grid of rows, where rows are to be put back into one; None where nobody knows yet.
        first_differs: the first layer takes another number of rows, or others, than all layers give.
    """

    order: Order = "batch_first"
    grid: tuple[int, int] | None = None
    first_differs: bool = False

    @property
    def is_grid(self) -> bool:
        """Whether layers hold a document's rows as a grid."""
        return self.order in ("channels_last", "channels_first")

    def rows_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what a layer takes or gives as rows ``[batch, tokens, width]``, those of a grid line by line.

        A tensor of other dimensions than the layers' is returned as it is.
        """
        if self.order == "time_first" and hidden.ndim == 3:
            return hidden.transpose(0, 1)
        if self.order == "channels_last" and hidden.ndim == 4:
            return hidden.flatten(1, 2)
        if self.order == "channels_first" and hidden.ndim == 4:
            return hidden.flatten(2).transpose(1, 2)
        return hidden

    def hidden_of(self, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return rows as layers take them; ``like`` is what stands in their place.

        Raises:
            ShapeError: there are more or fewer of them.
        """
        if self.grid is not None:
            if rows.shape[1] != self.grid[0] * self.grid[1]:
                expected = f"{self.grid[0] * self.grid[1]} rows of a document"
                raise ShapeError(f"activations {list(rows.shape)} do not fit the model, which expects {expected}")
            grid = rows.unflatten(1, self.grid)
            # As a layer would have returned it: convolutions choose their kernels by how a tensor lies in memory.
            hidden = (grid.permute(0, 3, 1, 2) if self.order == "channels_first" else grid).contiguous()
        else:
            hidden = rows.transpose(0, 1) if self.order == "time_first" else rows
            if hidden.shape != like.shape and not self.first_differs:
                expected = f"which expects {list(like.shape)}"
                raise ShapeError(f"activations {list(rows.shape)} do not fit the model, {expected}")
        given: torch.Tensor = hidden.to(like.dtype)
        return given

"""Moving the rows of parameters, of their gradients and of what optimizers remember of them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from actcache.errors import ModelError, UsageError

_REPLACED = "actcache_replaced"


class Move:
    """From a tensor whose row i belongs to token ``before[i]`` to one whose row i belongs to ``after[i]``.

    Both are ``[rows]`` int64 on the CPU, each id once and below ``size``.
    """

    def __init__(self, before: torch.Tensor, after: torch.Tensor, size: int) -> None:
        self.before, self.after, self.size = before, after, size
        row = _rows_by_id(before, size)[after]
        self._there = torch.nonzero(row >= 0).flatten()  # rows that both have
        self._source = row[self._there]
        self.new = torch.nonzero(row < 0).flatten()  # rows of the result that have no source
        self.gone = torch.nonzero(_rows_by_id(after, size)[before] < 0).flatten()  # rows that the result lacks

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the moved ``[rows, ...]`` tensor, on its device; rows without a source are zero."""
        out = tensor.new_zeros((len(self.after), *tensor.shape[1:]))
        out[self._there.to(tensor.device)] = tensor[self._source.to(tensor.device)]
        return out


class Optimizers:
    """The optimizers whose state follows when rows move. They are not kept alive.

    What an optimizer remembers of rows that are dropped (where it is not zero: they were trained before) is kept on the
    CPU, and is theirs again when they come back.
    """

    def __init__(self) -> None:
        self._tracked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._dropped: weakref.WeakKeyDictionary[torch.optim.Optimizer, dict[Any, Any]] = weakref.WeakKeyDictionary()

    def track(self, optimizer: torch.optim.Optimizer) -> None:
        """Add an optimizer; raises ``UsageError`` where it is none."""
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UsageError(f"a {type(optimizer).__name__} is no torch optimizer")
        self._tracked.add(optimizer)

    def check(self, parameter: torch.nn.Parameter, name: str) -> None:
        """Raise ``ModelError`` for a parameter with a packed state (8-bit optimizers), whose rows cannot be moved."""
        for optimizer in self._tracked:
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor) and value.ndim and not value.is_floating_point():
                    raise ModelError(
                        f"the optimizer's state {key!r} of {name} is packed ({value.dtype}): prune before training"
                    )

    def replace(self, old: torch.nn.Parameter, new: torch.nn.Parameter, move: Move, name: str) -> None:
        """Put ``new`` in the place of ``old`` in every tracked optimizer, its state moved."""
        setattr(old, _REPLACED, name)
        for optimizer in self._tracked:
            for group in optimizer.param_groups:
                group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
            if old in optimizer.state:
                state, dropped = optimizer.state.pop(old), self._dropped.setdefault(optimizer, {})
                optimizer.state[new] = {
                    key: self._moved(value, move, dropped, (name, key)) for key, value in state.items()
                }

    @staticmethod
    def _moved(value: Any, move: Move, dropped: dict[Any, Any], key: tuple[str, str]) -> Any:
        if not isinstance(value, torch.Tensor) or not value.ndim or len(value) != len(move.before):
            return value  # a step count, or one per column
        out = move.apply(value)
        ids, rows = dropped.pop(key, (move.before[:0], value[:0].cpu()))
        back = _rows_by_id(move.after, move.size)[ids]
        out[back[back >= 0].to(out.device)] = rows[back >= 0].to(out.device)
        leaving = value[move.gone.to(value.device)].cpu()
        trained = leaving.flatten(1).any(1) if leaving.ndim > 1 else leaving != 0
        ids = torch.cat([ids[back < 0], move.before[move.gone][trained]])
        if len(ids):
            dropped[key] = ids, torch.cat([rows[back < 0], leaving[trained]])
        return out


def _rows_by_id(ids: torch.Tensor, size: int) -> torch.Tensor:
    """Return ``[size]`` int64: the row of each id, -1 where it has none."""
    table = torch.full((size,), -1)
    table[ids] = torch.arange(len(ids))
    return table


def _refuse_replaced(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # Such an optimizer would go on with a matrix that no model uses any more, and nobody would notice.
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if hasattr(parameter, _REPLACED):
            raise ModelError(
                f"this optimizer holds {getattr(parameter, _REPLACED)} as it was before its rows were pruned, restored "
                "or grown: give the optimizer to prune_vocabulary(..., optimizer=) or to pruned.track(optimizer)"
            )


register_optimizer_step_pre_hook(_refuse_replaced)

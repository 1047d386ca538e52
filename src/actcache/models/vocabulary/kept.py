"""What a pruned model knows of its vocabulary: which token each row is, and where the other rows are."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from actcache.errors import UnseenTokenError
from actcache.models.partial_vocabulary import Whole
from actcache.models.vocabulary.moving import Optimizers

OnUnseen = Literal["raise", "grow"]

#: The attribute of a module that says which of its parameters have a row per token.
MARK = "actcache_mark"
_NAMED = 5  # ids that an error names


@dataclass(frozen=True)
class Mark:
    """Which parameters of a module have a row per token."""

    names: Mapping[str, str]  # attribute -> the parameter's name in the model; tied ones have one name
    padding_idx: int | None = None  # before pruning


class KeptVocabulary:
    """The rows that a pruned model holds. One object is shared by the modules of a model; a copied model has its own.

    Attributes:
        size, ids: as of ``Kept``.
        rest: parameter's name -> all its rows as they were before pruning, on the CPU or mapped from a file; None where
            they are not at hand. Never written to, and shared by copies.
        has_output: whether the model has logits over the vocabulary.
        whole_logits: whether logits are given over the whole vocabulary just now.
    """

    def __init__(
        self,
        size: int,
        ids: torch.Tensor,
        rest: dict[str, torch.Tensor | None],
        *,
        has_output: bool,
        on_unseen: OnUnseen,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self.size, self.ids, self.rest = size, ids, rest
        self.on_unseen, self.tokenizer = on_unseen, tokenizer
        self.has_output, self.whole_logits = has_output, False
        self._forget()

    def _forget(self) -> None:
        self.optimizers = Optimizers()
        self._tables: dict[torch.device, torch.Tensor] = {}

    def set_ids(self, ids: torch.Tensor) -> None:
        """Say which tokens the rows are from now on."""
        self.ids = ids
        self._tables.clear()

    def whole(self, module: nn.Module, name: str) -> Whole | None:
        """Return a module's parameter as a whole; None where the parameter has no row per token."""
        mark: Mark | None = module.__dict__.get(MARK)
        if mark is None or name not in mark.names:
            return None
        called = mark.names[name]
        return Whole(called, module.get_parameter(name), self.ids, self.rest[called], self.size)

    def rows_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of token ids, int64 of the same shape, on their device; raises ``UnseenTokenError``."""
        rows = self._look_up(ids)
        if bool((rows < 0).any()):
            raise self._unseen(ids[rows < 0])
        return rows

    def unseen(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the ids among these that are not kept, each once, on the CPU; raises for what is no token id."""
        ids = ids[self._look_up(ids) < 0].unique().cpu()
        if bool(((ids < 0) | (ids >= self.size)).any()):
            raise self._unseen(ids)
        return ids

    def _look_up(self, ids: torch.Tensor) -> torch.Tensor:
        # The last place of the table, which stands for no token, is also at -1.
        return self._table(ids.device)[ids.long().clamp(-1, self.size)]

    def _table(self, device: torch.device) -> torch.Tensor:
        if device not in self._tables:
            with torch.inference_mode(False):
                table = torch.full((self.size + 1,), -1)
                table[self.ids] = torch.arange(len(self.ids))
                self._tables[device] = table.to(device)
        return self._tables[device]

    def _unseen(self, ids: torch.Tensor) -> UnseenTokenError:
        some = sorted(set(ids.tolist()))
        names = ", ".join(self._name(i) for i in some[:_NAMED]) + (", ..." if len(some) > _NAMED else "")
        return UnseenTokenError(
            f"{len(some)} token id(s) are not among the {len(self.ids)} of {self.size} that this pruned model keeps: "
            f"{names}. Count their texts too and pruned.grow(ids), or prune with on_unseen='grow'",
            some,
        )

    def _name(self, token_id: int) -> str:
        if not 0 <= token_id < self.size:
            return f"{token_id} (no token of this model)"
        if self.tokenizer is None:
            return str(token_id)
        return f"{token_id} ({self.tokenizer.convert_ids_to_tokens(token_id)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("optimizers", "_tables")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptVocabulary:
        new = memo[id(self)] = copy.copy(self)
        new.rest = dict(self.rest)
        return new

"""Which rows are left out: by token, by position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import UsageError
from actcache.format.arguments import whole_numbers

_KINDS = ("token_ids", "positions")


@dataclass(frozen=True)
class Exclusion:
    """What a row has that is left out. ``UsageError`` where it is given otherwise than ``of`` says."""

    token_ids: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()  # in their documents; negative ones are counted from the end

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Exclusion:
        """Check what a caller gives: a mapping of the names of the fields to numbers."""
        given = {} if given is None else given
        if not isinstance(given, Mapping) or not set(given) <= set(_KINDS):
            raise UsageError(
                f"exclude is a mapping like {{'positions': [0]}}, of {', '.join(_KINDS)}, not {given!r:.80}"
            )
        return cls(**{name: tuple(np.unique(whole_numbers(name, value)).tolist()) for name, value in given.items()})

    @property
    def needs_ids(self) -> bool:
        return bool(self.token_ids)

    def __bool__(self) -> bool:
        return self != Exclusion()

    def kept(
        self, lengths: NDArray[np.int64], positions: NDArray[np.int64], token_ids: NDArray[np.int32] | None
    ) -> NDArray[np.bool_]:
        """Return which rows are kept, ``[rows]``; ``lengths`` of each one's document."""
        kept = np.ones(len(positions), bool)
        for position in self.positions:
            kept &= positions != (position if position >= 0 else position + lengths)
        if self.token_ids and token_ids is not None:
            kept &= ~np.isin(token_ids, self.token_ids)
        return kept

"""Which rows are left out: by token, by position, by a column of the caller's own, by their norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import UsageError
from actcache.format.arguments import is_truth, whole_numbers

_KINDS = ("token_ids", "positions", "mask", "norm")


@dataclass(frozen=True)
class Exclusion:
    """What a row has that is left out. ``UsageError`` where it is given otherwise than ``of`` says."""

    token_ids: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()  # in their documents; negative ones are counted from the end
    mask: str | None = None  # a column of the caller's own: where it is 0
    norm: float | None = None  # above that multiple of the mean norm, at any site

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Exclusion:
        """Check what a caller gives: a mapping of the names of the fields to numbers."""
        given = {} if given is None else given
        if not isinstance(given, Mapping) or not set(given) <= set(_KINDS):
            raise UsageError(
                f"exclude is a mapping like {{'positions': [0]}}, of {', '.join(_KINDS)}, not {given!r:.80}"
            )
        fields: dict[str, Any] = {
            name: tuple(np.unique(whole_numbers(name, value)).tolist())
            for name, value in given.items()
            if name not in ("mask", "norm")
        }
        if (mask := given.get("mask")) is not None:
            if not isinstance(mask, str):
                raise UsageError(f"mask is the name of a column, not {mask!r:.80}")
            fields["mask"] = mask
        if (norm := given.get("norm")) is not None:
            if is_truth(norm) or not isinstance(norm, int | float | np.number) or not 0 < norm < math.inf:
                raise UsageError(f"norm is a number above 0, of which the mean norm is multiplied, not {norm!r:.80}")
            fields["norm"] = float(norm)
        return cls(**fields)

    @property
    def needs_ids(self) -> bool:
        return bool(self.token_ids)

    @property
    def by_contents(self) -> bool:
        """Whether only a look at the rows, or at what stands beside them, says which are left out."""
        return self.needs_ids or self.mask is not None or self.norm is not None

    def __bool__(self) -> bool:
        return self != Exclusion()

    def kept(
        self,
        lengths: NDArray[np.int64],
        positions: NDArray[np.int64],
        token_ids: NDArray[np.int32] | None,
        norms: NDArray[np.floating[Any]] | None = None,
        mask: NDArray[Any] | None = None,
    ) -> NDArray[np.bool_]:
        """Return which rows are kept, ``[rows]``: by the lengths of their documents, their positions there, their
        tokens, their norms beside the mean ones (of several sites the largest), and the mask column."""
        kept = np.ones(len(positions), bool)
        for position in self.positions:
            kept &= positions != (position if position >= 0 else position + lengths)
        if self.token_ids and token_ids is not None:
            kept &= ~np.isin(token_ids, self.token_ids)
        if self.norm is not None and norms is not None:
            kept &= norms <= self.norm
        if self.mask is not None and mask is not None:
            kept &= mask.astype(bool)
        return kept

"""What a space gives: entries, alone and packed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.backend import EXTRAS, TOKEN_IDS, VALUES, Columns
from actcache.format import codec
from actcache.format.ragged import offsets_of
from actcache.format.recipe import Recipe


@dataclass(frozen=True)
class Entry:
    """One document's activations, ``[tokens, hidden]``; in the stored dtype where NumPy has it and it is one of floats,
    else as float32.

    The arrays are views into the memory of the whole ``get``.
    """

    activations: NDArray[Any]
    token_ids: NDArray[np.int32] | None = None  # [tokens]
    extras: dict[str, NDArray[Any]] = field(default_factory=dict)  # spans, word_ids, type_ids where they were stored
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)  # the caller's own, [tokens, ...] each


@dataclass(frozen=True)
class ReadReport:
    """What ``read_into`` found: ``lengths`` [n] int64 tokens of each entry, 0 where it is absent."""

    lengths: NDArray[np.int64]

    @property
    def found(self) -> NDArray[np.bool_]:
        """``[n]``: which keys were there."""
        return self.lengths > 0

    @property
    def offsets(self) -> NDArray[np.int64]:
        """``[n + 1]``: where each entry's rows begin in a packed buffer."""
        return offsets_of(self.lengths)


@dataclass(frozen=True)
class OwnColumns(ReadReport):
    """The caller's own columns of some entries, packed, ``[T, ...]`` each; of length 0 are entries that have none."""

    arrays: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class PackedEntries(ReadReport):
    """All arrays of some entries in stored form, one entry's rows after another's; absent entries have none."""

    columns: dict[str, NDArray[Any]]  # ``values``, and the optional arrays that any of the entries has
    has: dict[str, NDArray[np.bool_]]  # [n] which entries have each of those


def columns_of(recipe: Recipe) -> Columns:
    """Return dtype and trailing shape of each ragged array of a recipe's space."""
    kind = codec.get(recipe.dtype)
    return {VALUES: (kind.stored.str, (kind.width(recipe.hidden_size),)), TOKEN_IDS: ("<i4", ()), **EXTRAS}

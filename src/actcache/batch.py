"""What a reader yields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.key import key_list


class _Keyed:
    """What both layouts have: which entries they hold."""

    key_array: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.key_array)

    @property
    def keys(self) -> list[bytes]:
        """The keys of the entries."""
        return key_list(self.key_array)


@dataclass(frozen=True)
class Batch(_Keyed):
    """Some documents' activations, padded to the longest of them.

    Torch tensors where the reader has a device, NumPy arrays where it has none.
    """

    activations: Any  # [B, L, hidden], in the stored dtype (NumPy: bfloat16 as float32); zeros where the mask is 0
    attention_mask: Any  # [B, L] int64, 1 at tokens, on the right side 0 at padding
    token_ids: Any  # [B, L] int64, 0 at padding; None where entries were stored without them
    lengths: Any  # [B] int64 tokens
    key_array: NDArray[np.uint8]  # [B, 32], of the entries
    documents: Any  # [B] int64 positions in what the reader was given
    labels: Any = None  # [B, ...], or of tokens [B, L] with -100 at padding; None where the reader was given none

    def model_inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of a reduced model's ``forward``."""
        inputs = {
            "activations": self.activations,
            "token_ids": self.token_ids,
            "attention_mask": self.attention_mask,
            "labels": self.labels,
        }
        return {name: value for name, value in inputs.items() if value is not None}


@dataclass(frozen=True)
class PackedBatch(_Keyed):
    """Some documents' activations one after another, without padding: what attention over variable lengths takes.

    Torch tensors where the reader has a device, NumPy arrays where it has none.
    """

    activations: Any  # [T, hidden], in the stored dtype (NumPy: bfloat16 as float32)
    offsets: Any  # [B + 1] int32: document i is rows offsets[i]:offsets[i + 1] ("cu_seqlens")
    longest: int  # tokens of the longest document
    token_ids: Any  # [T] int64; None where entries were stored without them
    lengths: Any  # [B] int64 tokens
    key_array: NDArray[np.uint8]  # [B, 32], of the entries
    documents: Any  # [B] int64 positions in what the reader was given
    labels: Any = None  # [B, ...], or of tokens [T]; None where the reader was given none

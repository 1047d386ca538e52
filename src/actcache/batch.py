"""What a reader delivers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Batch:
    """Some documents' activations, padded to the longest of them.

    Torch tensors where the reader has a device, NumPy arrays where it has none.
    """

    activations: Any  # [B, L, hidden], in the stored dtype (NumPy: bfloat16 as float32); zeros where the mask is 0
    attention_mask: Any  # [B, L] int64, 1 at tokens, on the right side 0 at padding
    token_ids: Any  # [B, L] int64, 0 at padding; None where entries were stored without them
    lengths: Any  # [B] int64 tokens
    keys: list[bytes]  # of the entries
    documents: Any  # [B] int64 positions in what the reader was given
    labels: Any = None  # [B, ...], or None

    def __len__(self) -> int:
        return len(self.keys)

    def model_inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of a reduced model's ``forward``."""
        inputs = {
            "activations": self.activations,
            "token_ids": self.token_ids,
            "attention_mask": self.attention_mask,
            "labels": self.labels,
        }
        return {name: value for name, value in inputs.items() if value is not None}

"""What a reader yields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from actcache.format.keys import key_list


class _Batch:
    """What both layouts have: which entries they hold, and ways to a device."""

    key_array: NDArray[np.uint8]
    activations: Any

    def __len__(self) -> int:
        return len(self.key_array)

    @property
    def keys(self) -> list[bytes]:
        """The keys of the entries."""
        return key_list(self.key_array)

    def to(self, device: Any, non_blocking: bool = False) -> Self:
        """Return the batch with its tensors on a torch device; NumPy arrays become tensors, dtypes stay.

        Lightning, Accelerate and others move batches by this. A reader with that ``device`` does it faster, beside the
        consumer's steps.
        """
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: Any = None) -> Self:
        """Return the batch with its tensors in pinned memory, as ``torch.Tensor.pin_memory`` does; NumPy arrays become
        tensors."""
        return self._each(lambda tensor: tensor.pin_memory() if device is None else tensor.pin_memory(device))

    def __repr__(self) -> str:
        def shown(value: Any) -> str:
            return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"

        arrays = ("activations", "token_ids", "labels")
        told = [f"{name} {shown(getattr(self, name))}" for name in arrays if getattr(self, name, None) is not None]
        where = "NumPy" if isinstance(self.activations, np.ndarray) else self.activations.device
        return f"<{type(self).__name__} of {len(self)} entries, {where}: {', '.join(told)}>"

    def _each(self, change: Callable[[Any], Any]) -> Self:
        import torch  # who asks for tensors has it

        changed = {}
        for name, value in vars(self).items():
            if name != "key_array" and isinstance(value, np.ndarray):
                value = torch.from_numpy(value)
            if isinstance(value, torch.Tensor):
                changed[name] = change(value)
            if name == "columns":
                tensors = {one: torch.as_tensor(array) for one, array in value.items()}
                changed[name] = {one: change(tensor) for one, tensor in tensors.items()}
        return replace(self, **changed)  # type: ignore[type-var]


#: What question answering heads of transformers call the two columns of an answer's labels.
ANSWER_NAMES = ("start_positions", "end_positions")


class Inputs(dict[str, Any]):
    """Keyword arguments of a model's ``forward``, by name.

    A reduced question answering model takes ``labels`` [B, 2] as its two positions. But the Hugging Face ``Trainer``
    looks for labels by ``get`` under the names of the head; so the columns answer to these names, too.
    """

    def __missing__(self, name: str) -> Any:
        if name in ANSWER_NAMES and "labels" in self and tuple(self["labels"].shape[1:]) == (2,):
            return self["labels"][:, ANSWER_NAMES.index(name)]
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default


@dataclass(
    eq=False, repr=False
)  # not frozen: Lightning sets fields of a copy where it converts the batches of a precision
class Batch(_Batch):
    """Some documents' activations, padded to the longest of them: torch tensors where the reader has a device, else
    NumPy arrays."""

    activations: Any  # [B, L, hidden], numbers (NumPy: bfloat16 as float32); zeros where the mask is 0
    attention_mask: Any  # [B, L] int64, 1 at tokens, on the right side 0 at padding
    token_ids: Any  # [B, L] int64, 0 at padding; None where entries were stored without them
    lengths: Any  # [B] int64 tokens
    key_array: NDArray[np.uint8]  # [B, 32], of the entries
    documents: Any  # [B] int64 positions in what the reader was given
    labels: Any = None  # [B, ...], or of tokens [B, L] with -100 at padding; None where the reader was given none
    columns: dict[str, Any] = field(default_factory=dict)  # [B, L, ...] of the caller's own, asked for; 0 at padding

    def model_inputs(self) -> Inputs:
        """Return the keyword arguments of a reduced model's ``forward``."""
        named = ((name, getattr(self, name)) for name in ("activations", "token_ids", "attention_mask", "labels"))
        return Inputs((name, value) for name, value in named if value is not None)


@dataclass(eq=False, repr=False)
class PackedBatch(_Batch):
    """Some documents' activations one after another, without padding: what attention over variable lengths takes. Torch
    tensors where the reader has a device, else NumPy arrays."""

    activations: Any  # [T, hidden], numbers (NumPy: bfloat16 as float32)
    offsets: Any  # [B + 1] int32: document i is rows offsets[i]:offsets[i + 1] ("cu_seqlens")
    longest: int  # tokens of the longest document
    token_ids: Any  # [T] int64; None where entries were stored without them
    lengths: Any  # [B] int64 tokens
    key_array: NDArray[np.uint8]  # [B, 32], of the entries
    documents: Any  # [B] int64 positions in what the reader was given
    labels: Any = None  # [B, ...], or of tokens [T]; None where the reader was given none
    columns: dict[str, Any] = field(default_factory=dict)  # [T, ...] of the caller's own, asked for


@dataclass(eq=False)
class RowBatch:
    """Some tokens' rows, of documents from all over the corpus, and what was asked for beside them: torch tensors where
    the reader has a device, else NumPy arrays."""

    rows: Any  # [n, hidden], or of several sites [n, sites, hidden]
    documents: Any = None  # [n] int64 positions in what the reader was given, or its numbers
    positions: Any = None  # [n] int64 positions of the tokens in their documents
    token_ids: Any = None  # [n] int64
    columns: dict[str, Any] = field(default_factory=dict)  # [n, ...] of the caller's own

    def __len__(self) -> int:
        return len(self.rows)

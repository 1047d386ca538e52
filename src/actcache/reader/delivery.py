"""From host buffers to the batch that the consumer gets: what every way has, and the one that stays on the host."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.entries.batch import Batch, PackedBatch
from actcache.format import codec
from actcache.format.ragged import offsets_of, row_indices
from actcache.io.buffers import SMALL, BufferPool
from actcache.reader.fetch import HostBatch

_NARROW = 128  # tokens of a batch's longest entry: the table of its masks is 130 KB then


@dataclass(frozen=True)
class BatchMembers:
    """Which documents a batch has."""

    keys: NDArray[np.uint8]  # [B, 32]
    documents: NDArray[np.int64]  # [B]
    labels: NDArray[Any] | None
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)  # packed, or padded where the delivery is


@dataclass(frozen=True)
class Delivered:
    """A batch that is on its way."""

    batch: Batch | PackedBatch
    ready: Any = None  # the event at which it will be there


def padded(packed: NDArray[Any], lengths: NDArray[np.int64], width: int | None) -> NDArray[Any]:
    """Return packed rows ``[T, ...]`` of entries of these lengths, padded with zeros to ``[B, width, ...]`` where there
    is a ``width``."""
    if width is None:
        return packed
    made = np.zeros((len(lengths) * width, *packed.shape[1:]), packed.dtype)
    made[row_indices(np.arange(len(lengths)) * width, lengths, None)] = packed
    return made.reshape(len(lengths), width, *packed.shape[1:])


class Delivery(ABC):
    """Makes batches of what was read. ``deliver`` is called by the thread that reads, ``arrive`` by the consumer's."""

    decodes: bool = False  # whether processors of the host decode what was read
    packed: bool  # whether rows are read without padding
    padded: bool  # whether they are delivered with it
    buffers: BufferPool  # host buffers to read into
    id_buffers: BufferPool | None = None  # those for token ids; None: fresh memory

    def __init__(self) -> None:
        self._copied = self._decoded = 0.0
        self._counting = threading.Lock()  # several iterations deliver at a time

    @abstractmethod
    def deliver(self, read: HostBatch, members: BatchMembers) -> Delivered: ...

    def arrive(self, delivered: Delivered) -> Batch | PackedBatch:
        """Return a batch that the consumer may use from here on."""
        return delivered.batch

    def spent(self) -> tuple[float, float]:
        """Return the seconds of copying and of decoding that have ended since this was asked last."""
        with self._counting:
            spent = self._copied, self._decoded
            self._copied = self._decoded = 0.0
        return spent

    def _spend(self, copied: float, decoded: float) -> None:
        with self._counting:
            self._copied += copied
            self._decoded += decoded


class HostDelivery(Delivery):
    """NumPy arrays, or, where ``torch`` is the module, tensors of the CPU over the same memory.

    Args:
        dtype: the recipe's.
        depth: how many batches are read ahead.
        deliver: the dtype of the numbers; None for the codec's own.
    """

    def __init__(self, dtype: str, torch: Any, *, packed: bool, depth: int, deliver: str | None = None) -> None:
        super().__init__()
        self.packed, self.padded = packed, not packed
        self._kind, self._deliver = codec.get(dtype), deliver or delivered_by(dtype, numpy=torch is None)
        self.decodes = self._deliver != self._kind.form
        most = depth + 4  # those that wait, the two being read, the consumer's, and the one before
        self.buffers = BufferPool(most)
        # Fresh memory costs more than what is written into it: its pages are made one by one.
        self.id_buffers = BufferPool(most, SMALL)
        self._numbers_in, self._ids_in, self._masks_in = (BufferPool(most, SMALL) for _ in range(3))
        self._torch = torch

    def deliver(self, read: HostBatch, members: BatchMembers) -> Delivered:
        start = time.perf_counter()
        batch = self._made(read, members)
        self._spend(0.0, time.perf_counter() - start)
        return Delivered(batch)

    def _made(self, read: HostBatch, members: BatchMembers) -> Batch | PackedBatch:
        ids = None
        if read.token_ids is not None:
            ids = self._ids_in.take(read.token_ids.shape, np.int64)
            ids[...] = read.token_ids
        values: Any = self._numbers(read.values)
        common: dict[str, Any] = {"lengths": read.lengths, "documents": members.documents, "labels": members.labels}
        common |= {"columns": members.columns}
        if self.packed:
            offsets, longest = offsets_of(read.lengths).astype(np.int32), int(read.lengths.max(initial=0))
            batch: Batch | PackedBatch = PackedBatch(values, offsets, longest, ids, key_array=members.keys, **common)
        else:
            mask = self._masks_in.take((len(read.lengths), read.values.shape[1]), np.int64)
            _write_masks(read.lengths, mask)
            batch = Batch(values, mask, ids, key_array=members.keys, **common)
        if self._torch is None:
            return batch
        batch = batch.to("cpu")
        bits = self._deliver == "bfloat16"
        return replace(batch, activations=batch.activations.view(self._torch.bfloat16)) if bits else batch

    def _numbers(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Return stored rows as they are delivered; bfloat16 as its bits."""
        if not self.decodes:
            return stored
        shape = (*stored.shape[:-1], self._kind.hidden(stored.shape[-1]))
        out = self._numbers_in.take(shape, codec.get(self._deliver).stored)
        codec.decode_as(self._kind, stored, self._deliver, out)
        return out


def _write_masks(lengths: NDArray[np.int64], out: NDArray[np.int64]) -> None:
    """Write each entry's attention mask, ``[B, L]``: 1 at its tokens, 0 behind them."""
    width = out.shape[1]
    if width <= _NARROW:  # rows of a table: to compare so few numbers costs NumPy a multiple of it
        _masks(width).take(lengths, axis=0, out=out, mode="clip")
    else:
        np.less(np.arange(width), lengths[:, None], out=out)


@lru_cache(16)
def _masks(width: int) -> NDArray[np.int64]:
    """Return the attention masks of entries of 0, 1, ... ``width`` tokens, ``[width + 1, width]``."""
    return np.tri(width + 1, width, -1, dtype=np.int64)


def delivered_by(dtype: str, *, numpy: bool) -> str:
    """Return the name of the dtype that rows of a codec are delivered as where nobody asks for another one."""
    kind = codec.get(dtype)
    return kind.form if kind.form in codec.FLOATS and not (numpy and kind.form == "bfloat16") else kind.delivered.name

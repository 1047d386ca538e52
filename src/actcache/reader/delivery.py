"""From host buffers to the batch that the consumer gets: what every way has, and the one that stays on the host."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.entries.batch import Batch, PackedBatch
from actcache.format import codec
from actcache.format.ragged import offsets_of, row_indices
from actcache.io.buffers import BufferPool
from actcache.reader.fetch import HostBatch


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
        most = depth + 3  # those that wait, the one being read, the consumer's, and the one before
        self.buffers = BufferPool(most)
        self._numbers_in = BufferPool(most)
        self._torch = torch

    def deliver(self, read: HostBatch, members: BatchMembers) -> Delivered:
        start = time.perf_counter()
        batch = self._made(read, members)
        self._spend(0.0, time.perf_counter() - start)
        return Delivered(batch)

    def _made(self, read: HostBatch, members: BatchMembers) -> Batch | PackedBatch:
        ids = None if read.token_ids is None else read.token_ids.astype(np.int64)
        values: Any = self._numbers(read.values)
        common: dict[str, Any] = {"lengths": read.lengths, "documents": members.documents, "labels": members.labels}
        common |= {"columns": members.columns}
        if self.packed:
            offsets, longest = offsets_of(read.lengths).astype(np.int32), int(read.lengths.max(initial=0))
            batch: Batch | PackedBatch = PackedBatch(values, offsets, longest, ids, key_array=members.keys, **common)
        else:
            mask = (np.arange(read.values.shape[1]) < read.lengths[:, None]).astype(np.int64)
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


def delivered_by(dtype: str, *, numpy: bool) -> str:
    """Return the name of the dtype that rows of a codec are delivered as where nobody asks for another one."""
    kind = codec.get(dtype)
    return kind.form if kind.form in codec.FLOATS and not (numpy and kind.form == "bfloat16") else kind.delivered.name

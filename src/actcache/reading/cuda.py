"""Delivery to a CUDA device: pinned host buffers, a stream of its own for the copies, padding on the device.

Over the bus go the stored bytes without padding. The consumer's stream waits for the copy's event, not the processor;
the host buffer is used again when the copy has ended; the device memory is the consumer's stream's from then on.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actcache.batch import Batch, PackedBatch
from actcache.ragged import offsets_of, row_indices
from actcache.reading.delivery import Delivered, Delivery, Which
from actcache.reading.fetch import HostBatch
from actcache.reading.slots import Slots


@dataclass
class _Pinned:
    """A pinned buffer, and the event at which the copy out of it has ended."""

    tensor: torch.Tensor
    copied: Any = None
    taken: bool = False
    array: NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        self.array = self.tensor.numpy()


class PinnedSlots(Slots):
    """Pinned buffers, each the reader's until the copy out of it has ended. Thread-safe."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self._pinned: list[_Pinned] = []
        self._guard = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        with self._guard:
            slot = next((one for one in self._pinned if not one.taken), None)
            if slot is not None:
                slot.taken = True
        if slot is not None and slot.copied is not None:
            slot.copied.synchronize()
        if slot is None or slot.array.nbytes < nbytes:
            fresh = _Pinned(torch.empty(max(1, nbytes + nbytes // 8), dtype=torch.uint8, pin_memory=True), taken=True)
            with self._guard:
                if slot is not None:
                    self._pinned.remove(slot)
                self._pinned.append(fresh)
            slot = fresh
        array: NDArray[Any] = slot.array[:nbytes].view(dtype).reshape(shape)
        return array

    def give_back(self, array: NDArray[Any], copied: Any) -> None:
        """Have the buffer of an array that ``take`` returned used again after an event."""
        with self._guard:
            for slot in self._pinned:
                if slot.taken and slot.array.ctypes.data == array.ctypes.data:
                    slot.taken, slot.copied = False, copied


class CudaDelivery(Delivery):
    """See the module. Rows are always read packed; ``layout`` says whether they are padded on the device."""

    def __init__(self, dtype: str, device: torch.device, *, packed: bool, depth: int) -> None:
        self.packed = True
        self.slots: PinnedSlots = PinnedSlots(depth + 2)
        self._padded = not packed
        self._bfloat16 = dtype == "bfloat16"
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def deliver(self, read: HostBatch, which: Which) -> Delivered:
        values = torch.from_numpy(read.values)
        with torch.cuda.stream(self._stream):
            rows = values.to(self._device, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._stream)
            self.slots.give_back(read.values, copied)
            if self._bfloat16:
                rows = rows.view(torch.bfloat16)
            small = {
                "lengths": self._move(read.lengths),
                "documents": self._move(which.documents),
                "labels": None if which.labels is None else self._move(which.labels),
            }
            ids = None if read.token_ids is None else self._move(read.token_ids).long()
            batch: Batch | PackedBatch
            if self._padded:
                batch = self._pad(rows, ids, read.lengths, which.keys, small)
            else:
                offsets = self._move(offsets_of(read.lengths).astype(np.int32))
                longest = int(read.lengths.max(initial=0))
                batch = PackedBatch(rows, offsets, longest, ids, key_array=which.keys, **small)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(self._stream)
        return Delivered(batch, ready)

    def arrive(self, delivered: Delivered) -> Batch | PackedBatch:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(delivered.ready)
        for value in vars(delivered.batch).values():
            if isinstance(value, torch.Tensor):
                value.record_stream(stream)
        return delivered.batch

    def _move(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).pin_memory().to(self._device, non_blocking=True)

    def _pad(
        self,
        rows: torch.Tensor,
        ids: torch.Tensor | None,
        lengths: NDArray[np.int64],
        keys: NDArray[np.uint8],
        small: dict[str, Any],
    ) -> Batch:
        count, longest = len(lengths), int(lengths.max(initial=0))
        where = self._move(row_indices(np.arange(count) * longest, lengths, None))
        activations = rows.new_zeros((count * longest, rows.shape[1])).index_copy_(0, where, rows)
        mask = torch.arange(longest, device=self._device) < small["lengths"][:, None]
        if ids is not None:
            ids = ids.new_zeros(count * longest).index_copy_(0, where, ids).view(count, longest)
        return Batch(activations.view(count, longest, -1), mask.long(), ids, key_array=keys, **small)

"""Delivery to a CUDA device: pinned host buffers, a stream of its own for the copies, padding on the device.

Over the bus go the stored bytes without padding. The consumer's stream waits for the copy's event, not the processor;
the host buffer is used again when the copy has ended; the device memory is the consumer's stream's from then on.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actcache.entries.batch import Batch, PackedBatch
from actcache.format.ragged import offsets_of, row_indices
from actcache.reader.buffers import BufferPool
from actcache.reader.delivery import BatchMembers, Delivered, Delivery
from actcache.reader.fetch import HostBatch


@dataclass(eq=False)
class _Pinned:
    """A pinned buffer, and the event at which the copy out of it has ended."""

    tensor: torch.Tensor
    copied: Any = None
    taken: bool = False
    array: NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        self.array = self.tensor.numpy()


class PinnedBuffers(BufferPool):
    """Pinned buffers, each the reader's until the copy out of it has ended. Thread-safe.

    As long as there are fewer than ``most``, a buffer whose copy still runs is not waited for: another one is made.
    """

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self._pinned: list[_Pinned] = []  # those that were given back last come last
        self._guard = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pinned = self._choose()
        if pinned is not None and pinned.copied is not None:
            pinned.copied.synchronize()
            pinned.copied = None
        if pinned is None or pinned.array.nbytes < nbytes:
            fresh = _Pinned(self._allocate(max(1, nbytes + nbytes // 8)), taken=True)
            with self._guard:
                if pinned is not None:
                    self._pinned.remove(pinned)
                self._pinned.append(fresh)
            pinned = fresh
        array: NDArray[Any] = pinned.array[:nbytes].view(dtype).reshape(shape)
        return array

    def _choose(self) -> _Pinned | None:
        """Take a buffer into use, whose copy may still have to be waited for; None to have one made."""
        with self._guard:
            free = [one for one in self._pinned if not one.taken]
            pinned = next((one for one in free if one.copied is None or one.copied.query()), None)
            if pinned is None and free and len(self._pinned) >= self._most:
                pinned = free[0]  # its copy began first
            if pinned is not None:
                pinned.taken = True
            return pinned

    def _allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def give_back(self, array: NDArray[Any], copied: Any) -> None:
        """Have the buffer of an array that ``take`` returned used again after an event; None: at once."""
        with self._guard:
            for pinned in self._pinned:
                if pinned.taken and pinned.array.ctypes.data == array.ctypes.data:
                    self._pinned.remove(pinned)
                    self._pinned.append(pinned)
                    pinned.taken, pinned.copied = False, copied
                    return


class CudaDelivery(Delivery):
    """See the module. Rows are always read packed, and padded on the device where ``packed`` is not wanted."""

    def __init__(self, dtype: str, device: torch.device, *, packed: bool, depth: int) -> None:
        super().__init__()
        if device.index is None:  # another thread may have another current device
            device = torch.device(device.type, torch.cuda.current_device())
        self.packed, self.padded = True, not packed
        self.buffers: PinnedBuffers = PinnedBuffers(depth + 2)
        self._bfloat16 = dtype == "bfloat16"
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._timed: deque[tuple[Any, Any, Any]] = deque()  # events: copying begins, ends; the batch is there

    def deliver(self, read: HostBatch, members: BatchMembers) -> Delivered:
        values = torch.from_numpy(read.values)
        with torch.cuda.stream(self._stream):
            begun = self._event()
            try:
                rows = values.to(self._device, non_blocking=True)
            except BaseException:
                self.buffers.give_back(read.values, None)  # no memory on the device: nothing is being copied
                raise
            copied = self._event()
            self.buffers.give_back(read.values, copied)
            if self._bfloat16:
                rows = rows.view(torch.bfloat16)
            small = {
                "lengths": self._move(read.lengths),
                "documents": self._move(members.documents),
                "labels": None if members.labels is None else self._move(members.labels),
            }
            ids = None if read.token_ids is None else self._move(read.token_ids).long()
            batch: Batch | PackedBatch
            if self.padded:
                batch = self._pad(rows, ids, read.lengths, members.keys, small)
            else:
                offsets = self._move(offsets_of(read.lengths).astype(np.int32))
                longest = int(read.lengths.max(initial=0))
                batch = PackedBatch(rows, offsets, longest, ids, key_array=members.keys, **small)
            ready = self._event()
        with self._counting:
            self._timed.append((begun, copied, ready))
        return Delivered(batch, ready)

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def spent(self) -> tuple[float, float]:
        with self._counting:
            while self._timed and self._timed[0][2].query():
                begun, copied, ready = self._timed.popleft()
                self._copied += begun.elapsed_time(copied) / 1000
                self._decoded += copied.elapsed_time(ready) / 1000
        return super().spent()

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

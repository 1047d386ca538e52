"""Delivery to an accelerator: pinned host buffers, a stream of its own for the copies, padding on the device.

Over the bus go the stored bytes without padding. The consumer's stream waits for the copy's event, not the processor;
the host buffer is used again when the copy has ended; the device memory is the consumer's stream's from then on. What
that asks of a device is in ``streams.py``.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actcache.entries.batch import Batch, PackedBatch
from actcache.format import codec
from actcache.format.ragged import offsets_of, row_indices
from actcache.io.buffers import BufferPool
from actcache.reader.delivery import BatchMembers, Delivered, Delivery
from actcache.reader.fetch import HostBatch
from actcache.reader.streams import AsyncDevice, Event


@dataclass(eq=False)
class _Pinned:
    """A pinned buffer, and the event at which the copy out of it has ended."""

    array: NDArray[np.uint8]
    copied: Event | None = None
    taken: bool = True


class PinnedBuffers(BufferPool):
    """Pinned buffers, each the reader's until the copy out of it has ended. Thread-safe.

    As long as there are fewer than ``most``, a buffer whose copy still runs is not waited for: another one is made, by
    ``allocate(nbytes)``.
    """

    def __init__(self, most: int, allocate: Callable[[int], NDArray[np.uint8]]) -> None:
        super().__init__(most)
        self._allocate = allocate
        self._pinned: list[_Pinned] = []  # those that were given back last come last
        self._guard = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pinned = self._choose()
        if pinned is not None and pinned.copied is not None:
            pinned.copied.synchronize()
            pinned.copied = None
        if pinned is None or pinned.array.nbytes < nbytes:
            fresh = _Pinned(self._allocate(max(1, nbytes + nbytes // 8)))
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

    def give_back(self, array: NDArray[Any], copied: Event | None) -> None:
        """Have the buffer of an array that ``take`` returned used again after an event; None: at once."""
        with self._guard:
            for pinned in self._pinned:
                if pinned.taken and pinned.array.ctypes.data == array.ctypes.data:
                    self._pinned.remove(pinned)
                    self._pinned.append(pinned)
                    pinned.taken, pinned.copied = False, copied
                    return


class AcceleratorDelivery(Delivery):
    """See the module. Rows are always read packed, and padded on the device where ``packed`` is not wanted.

    ``dtype`` is the recipe's, ``deliver`` that of the numbers; None for the codec's own.
    """

    def __init__(
        self, dtype: str, device: AsyncDevice, *, packed: bool, depth: int, deliver: str | None = None
    ) -> None:
        super().__init__()
        self.packed, self.padded = True, not packed
        self.buffers: PinnedBuffers = PinnedBuffers(depth + 3, device.allocate)
        self._kind = codec.get(dtype)
        self._deliver = None if deliver is None else getattr(torch, deliver)
        self._device = device
        self._timed: deque[tuple[Event, Event, Event]] = deque()  # copying begins, ends; the batch is there

    def deliver(self, read: HostBatch, members: BatchMembers) -> Delivered:
        device, values = self._device, torch.from_numpy(read.values)
        with device.copying():
            begun, start = device.event(), time.perf_counter()
            try:
                rows = device.copy(values)
            except BaseException:
                self.buffers.give_back(read.values, None)  # no memory on the device: nothing is being copied
                raise
            copied, queued = device.event(), time.perf_counter()
            self.buffers.give_back(read.values, copied)
            rows = self._kind.decode_tensor(torch, rows)
            if self._deliver is not None:
                rows = rows.to(self._deliver)
            given = {"lengths": read.lengths, "documents": members.documents, "labels": members.labels}
            small: dict[str, Any] = {
                name: None if array is None else device.send(array) for name, array in given.items()
            }
            small["columns"] = {name: device.send(array) for name, array in members.columns.items()}
            ids = None if read.token_ids is None else device.send(read.token_ids).long()
            batch: Batch | PackedBatch
            if self.padded:
                batch = self._pad(rows, ids, read.lengths, members.keys, small)
            else:
                offsets = device.send(offsets_of(read.lengths).astype(np.int32))
                longest = int(read.lengths.max(initial=0))
                batch = PackedBatch(rows, offsets, longest, ids, key_array=members.keys, **small)
            ready = device.event()
        if device.asynchronous:
            with self._counting:
                self._timed.append((begun, copied, ready))
        else:
            self._spend(queued - start, time.perf_counter() - queued)
        return Delivered(batch, ready)

    def spent(self) -> tuple[float, float]:
        with self._counting:
            while self._timed and self._timed[0][2].query():
                begun, copied, ready = self._timed.popleft()
                self._copied += begun.elapsed_time(copied) / 1000
                self._decoded += copied.elapsed_time(ready) / 1000
        return super().spent()

    def arrive(self, delivered: Delivered) -> Batch | PackedBatch:
        stream = self._device.consumer()
        self._device.wait(stream, delivered.ready)
        for value in vars(delivered.batch).values():
            for tensor in value.values() if isinstance(value, dict) else (value,):
                if isinstance(tensor, torch.Tensor):
                    self._device.record(tensor, stream)
        return delivered.batch

    def _pad(
        self,
        rows: torch.Tensor,
        ids: torch.Tensor | None,
        lengths: NDArray[np.int64],
        keys: NDArray[np.uint8],
        small: dict[str, Any],
    ) -> Batch:
        count, longest = len(lengths), int(lengths.max(initial=0))
        where = self._device.send(row_indices(np.arange(count) * longest, lengths, None))
        activations = rows.new_zeros((count * longest, rows.shape[1])).index_copy_(0, where, rows)
        mask = torch.arange(longest, device=rows.device) < small["lengths"][:, None]
        if ids is not None:
            ids = ids.new_zeros(count * longest).index_copy_(0, where, ids).view(count, longest)
        return Batch(activations.view(count, longest, -1), mask.long(), ids, key_array=keys, **small)

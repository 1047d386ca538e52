"""From mixed rows to the batch that the consumer gets: on the host, or on an accelerator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.format import codec
from actcache.io.buffers import BufferPool

#: What stands beside the rows of a batch, by name, ``[n]``.
Beside = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class DeliveredRows:
    """The rows of a batch on their way."""

    rows: Any  # [n, hidden] or [n, sites, hidden]
    beside: Mapping[str, Any]
    ready: Any = None  # the event at which they will be there


class RowDelivery(ABC):
    """Makes batches of mixed rows. ``deliver`` is called by the thread that reads, ``arrive`` by the consumer's."""

    buffers: BufferPool  # host buffers for mixes

    @abstractmethod
    def deliver(self, parts: Sequence[NDArray[np.generic]], beside: Beside) -> DeliveredRows:
        """Make a batch of one or more runs of stored rows."""

    def done(self, memory: NDArray[np.generic]) -> None:
        """Have the memory of a mix used again once nothing that was delivered needs it."""
        self.buffers.give_back(memory, None)

    def arrive(self, delivered: DeliveredRows) -> DeliveredRows:
        """Return a batch that the consumer may use from here on."""
        return delivered


class HostRows(RowDelivery):
    """NumPy arrays, or, where ``torch`` is the module, tensors of the CPU, over the memory of the mix."""

    def __init__(self, dtype: str, torch: Any, buffers: int) -> None:
        self.buffers = BufferPool(buffers)
        self._codec, self._torch, self._bits = codec.get(dtype), torch, dtype == "bfloat16"

    def deliver(self, parts: Sequence[NDArray[np.generic]], beside: Beside) -> DeliveredRows:
        stored = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self._torch is None:
            return DeliveredRows(self._codec.decode(stored), beside)
        rows = self._torch.from_numpy(stored)
        rows = rows.view(self._torch.bfloat16) if self._bits else rows
        return DeliveredRows(rows, {name: self._torch.from_numpy(array) for name, array in beside.items()})


class AcceleratorRows(RowDelivery):
    """Copies from pinned memory, on a stream of their own; see ``accelerator.py``."""

    def __init__(self, dtype: str, device: Any, buffers: int) -> None:
        from actcache.reader.accelerator import PinnedBuffers

        self.buffers = PinnedBuffers(buffers, device.allocate)
        self._device, self._bits = device, dtype == "bfloat16"

    def deliver(self, parts: Sequence[NDArray[np.generic]], beside: Beside) -> DeliveredRows:
        import torch

        device = self._device
        with device.copying():
            copies = [device.copy(torch.from_numpy(part)) for part in parts]
            rows = copies[0] if len(copies) == 1 else torch.cat(copies)
            rows = rows.view(torch.bfloat16) if self._bits else rows
            sent = {name: device.send(array) for name, array in beside.items()}
            return DeliveredRows(rows, sent, device.event())

    def done(self, memory: NDArray[np.generic]) -> None:
        with self._device.copying():
            self.buffers.give_back(memory, self._device.event())

    def arrive(self, delivered: DeliveredRows) -> DeliveredRows:
        stream = self._device.consumer()
        self._device.wait(stream, delivered.ready)
        for tensor in (delivered.rows, *delivered.beside.values()):
            self._device.record(tensor, stream)
        return delivered


def row_delivery(dtype: str, device: Any, buffers: int) -> RowDelivery:
    """Return the delivery to a torch device, from so many buffers of mixes; None for NumPy arrays."""
    if device is None:
        return HostRows(dtype, None, buffers)
    import torch  # only those who name a device need it

    device = torch.device(device)
    if device.type == "cpu":
        return HostRows(dtype, torch, buffers)
    from actcache.reader.streams import async_device

    return AcceleratorRows(dtype, async_device(device), buffers)

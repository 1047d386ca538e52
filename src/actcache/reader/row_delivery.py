"""From mixed rows to the batch that the consumer gets: on the host, or on an accelerator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.format import codec
from actcache.format.moments import Moments
from actcache.io.buffers import BufferPool

#: What stands beside the rows of a batch, by name, ``[n]``.
Beside = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class DeliveredRows:
    """The rows of a batch on their way."""

    rows: Any  # [n, hidden] or [n, sites, hidden]
    beside: Mapping[str, Any]
    ready: Any = None  # the event at which they will be there


@dataclass(frozen=True)
class Normalization:
    """What is taken away from rows, and what the rest is multiplied by: float32, to stand beside a row."""

    shift: NDArray[np.float32] | None
    scale: NDArray[np.float32]

    @classmethod
    def by(cls, kind: str | None, moments: Sequence[Moments], *, stacked: bool) -> Normalization | None:
        """Return how to make rows alike by their statistics at each site; None where nobody asks."""
        if kind is None:
            return None
        if kind == "mean-norm":
            scales = [np.full(1, np.sqrt(len(one.mean)) / (one.mean_norm or 1.0)) for one in moments]
            shifts = None
        else:
            scales = [1 / np.where(one.std > 0, one.std, 1) for one in moments]
            shifts = [one.mean for one in moments]
        scale, shift = (
            None if some is None else (np.stack(some) if stacked else some[0]).astype(np.float32)
            for some in (scales, shifts)
        )
        assert scale is not None
        return cls(shift, scale)

    def numpy(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        wide = np.array(rows, np.float32)
        if self.shift is not None:
            wide -= self.shift
        wide *= self.scale
        return wide

    def on(self, send: Callable[[NDArray[Any]], Any]) -> Callable[[Any], Any]:
        """Return the same for tensors, where ``send`` brings the constants to their device."""
        shift, scale = None if self.shift is None else send(self.shift), send(self.scale)

        def apply(rows: Any) -> Any:
            wide = rows.float()
            return (wide if shift is None else wide - shift) * scale

        return apply


class RowDelivery(ABC):
    """Makes batches of mixed rows. ``deliver`` is called by the thread that reads, ``arrive`` by the consumer's."""

    buffers: BufferPool  # host buffers for mixes
    joins = False  # whether several runs of rows are delivered as fast as one

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

    def __init__(self, dtype: str, torch: Any, buffers: int, normalization: Normalization | None) -> None:
        self.buffers = BufferPool(buffers)
        self._normalization = normalization
        self._applied = None if torch is None or normalization is None else normalization.on(torch.from_numpy)
        self._codec, self._torch = codec.get(dtype), torch

    def deliver(self, parts: Sequence[NDArray[np.generic]], beside: Beside) -> DeliveredRows:
        stored = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self._torch is None:
            decoded = self._codec.decode(stored)
            return DeliveredRows(decoded if self._normalization is None else self._normalization.numpy(decoded), beside)
        if self._codec.form in codec.FLOATS:
            rows = self._codec.decode_tensor(self._torch, self._torch.from_numpy(stored))
        else:  # on the host the compiled loops are faster
            rows = self._torch.from_numpy(self._codec.decode(stored))
        if self._applied is not None:
            rows = self._applied(rows)
        return DeliveredRows(rows, {name: self._torch.from_numpy(array) for name, array in beside.items()})


class AcceleratorRows(RowDelivery):
    """Copies from pinned memory, on a stream of their own; see ``accelerator.py``."""

    joins = True

    def __init__(self, dtype: str, device: Any, buffers: int, normalization: Normalization | None) -> None:
        from actcache.reader.accelerator import PinnedBuffers

        self.buffers = PinnedBuffers(buffers, device.allocate)
        self._device, self._codec = device, codec.get(dtype)
        self._normalization = normalization
        self._applied: Callable[[Any], Any] | None = None  # its constants live on the stream for copies

    def deliver(self, parts: Sequence[NDArray[np.generic]], beside: Beside) -> DeliveredRows:
        import torch

        device = self._device
        with device.copying():
            copies = [device.copy(torch.from_numpy(part)) for part in parts]
            rows = copies[0] if len(copies) == 1 else torch.cat(copies)
            rows = self._codec.decode_tensor(torch, rows)
            if self._normalization is not None:
                if self._applied is None:
                    self._applied = self._normalization.on(device.send)
                rows = self._applied(rows)
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


def row_delivery(dtype: str, device: Any, buffers: int, normalization: Normalization | None) -> RowDelivery:
    """Return the delivery to a torch device, from so many buffers of mixes; None for NumPy arrays."""
    if device is None:
        return HostRows(dtype, None, buffers, normalization)
    import torch  # only those who name a device need it

    device = torch.device(device)
    if device.type == "cpu":
        return HostRows(dtype, torch, buffers, normalization)
    from actcache.reader.streams import async_device

    return AcceleratorRows(dtype, async_device(device), buffers, normalization)

"""What delivery needs of a device that works beside the processor: pinned memory, a stream for copies, events.

Delivery knows ``AsyncDevice`` alone. ``TorchDevice`` is every accelerator of torch that has streams (CUDA, ROCm,
XPU), by torch's device-neutral API; ``OneStreamDevice`` is one that has not (MPS). The tests put a simulated
device in their place, which completes everything as late as this contract allows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray


class Event(Protocol):
    """A point in the order of a stream's work."""

    def query(self) -> bool:
        """Return whether all work before it has ended."""
        ...

    def synchronize(self) -> None:
        """Have the processor wait until all work before it has ended."""
        ...

    def elapsed_time(self, end: Any, /) -> float:
        """Return the milliseconds from this event to another; both have passed."""
        ...


class AsyncDevice(ABC):
    """A device with a stream of its own for copies to it. Thread-safe, but for one thread at a time in ``copying``.

    What a thread does with tensors of the device inside ``copying`` is queued on that stream, in its order, and so are
    ``copy``, ``send`` and ``event``, which are called there alone. Streams run beside each other.
    """

    device: torch.device
    asynchronous: bool  # whether copies run while the processor goes on, so that only events can time them

    @abstractmethod
    def allocate(self, nbytes: int) -> NDArray[np.uint8]:
        """Return host memory that copies to the device can be taken from while the processor goes on."""

    @abstractmethod
    def copying(self) -> Any:
        """Return a context: what the thread queues in it is queued on the stream for copies."""

    @abstractmethod
    def copy(self, source: torch.Tensor) -> torch.Tensor:
        """Queue a copy of host memory that was allocated here; it must not change before an ``event`` after it."""

    @abstractmethod
    def send(self, array: NDArray[Any]) -> torch.Tensor:
        """Queue a copy of a small array, which may change at once."""

    @abstractmethod
    def event(self) -> Event:
        """Queue an event."""

    @abstractmethod
    def consumer(self) -> Any:
        """Return the stream on which the calling thread queues work at the moment."""

    @abstractmethod
    def wait(self, stream: Any, event: Any) -> None:
        """Have what is queued on a stream from here on wait for an event; the processor goes on."""

    @abstractmethod
    def record(self, tensor: torch.Tensor, stream: Any) -> None:
        """Say that a stream uses a tensor: its memory is used again only after what is queued there when it is freed.

        Without this, memory belongs to the stream on which it was allocated, and is used again in that one's order.
        """


def async_device(device: torch.device) -> AsyncDevice:
    """Return how copies to a device of torch are made."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type == device.type and device.type != "mps":
        return TorchDevice(device)
    return OneStreamDevice(device)


class TorchDevice(AsyncDevice):
    """An accelerator with streams: CUDA, ROCm (which torch names cuda), XPU, and others that keep torch's contract."""

    asynchronous = True

    def __init__(self, device: torch.device) -> None:
        if device.index is None:  # another thread may have another current device
            device = torch.accelerator.current_stream().device
        self.device = device
        self._stream = torch.Stream(device=device)

    def allocate(self, nbytes: int) -> NDArray[np.uint8]:
        array: NDArray[np.uint8] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        return array

    @contextmanager
    def copying(self) -> Iterator[None]:
        # `set_stream` makes the stream's device the current one, too; the last call puts that back as it was.
        elsewhere, here = torch.accelerator.current_stream(), torch.accelerator.current_stream(self.device)
        torch.accelerator.set_stream(self._stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(here)
            torch.accelerator.set_stream(elsewhere)

    def copy(self, source: torch.Tensor) -> torch.Tensor:
        return source.to(self.device, non_blocking=True)

    def send(self, array: NDArray[Any]) -> torch.Tensor:
        # The pinned copy is freed at once; torch uses its memory again only when the copy out of it has ended.
        return torch.from_numpy(np.ascontiguousarray(array)).pin_memory().to(self.device, non_blocking=True)

    def event(self) -> Event:
        event: Event = self._stream.record_event(torch.Event(self.device, enable_timing=True))
        return event

    def consumer(self) -> Any:
        return torch.accelerator.current_stream(self.device)

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def record(self, tensor: torch.Tensor, stream: Any) -> None:
        tensor.record_stream(stream)


class _Passed:
    """An event that has passed when it is made. It is no clock: the processor waited, and can time that itself."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Any, /) -> float:
        return 0.0


class OneStreamDevice(AsyncDevice):
    """A device whose work is one queue, as torch has it for MPS: ordinary host memory, and copies that are waited for.

    torch's MPS queues everything on one stream (``torch.Stream("mps")`` is the default one), and its ``record_stream``
    does not exist. So there is nobody to wait for: what the consumer queues comes after the copies, and memory that is
    freed is used again in that order. Copies are not left to run behind the processor, because no machine was at hand
    to prove that this is safe.
    """

    asynchronous = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocate(self, nbytes: int) -> NDArray[np.uint8]:
        return np.empty(nbytes, np.uint8)

    @contextmanager
    def copying(self) -> Iterator[None]:
        yield

    def copy(self, source: torch.Tensor) -> torch.Tensor:
        return source.to(self.device, copy=True)  # never the buffer itself, even where memory is one

    def send(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, copy=True)

    def event(self) -> Event:
        return _Passed()

    def consumer(self) -> Any:
        return None

    def wait(self, stream: Any, event: Any) -> None:
        pass

    def record(self, tensor: torch.Tensor, stream: Any) -> None:
        pass

"""A device that does everything as late as it may, in whatever order it is told, and spoils memory as soon as it may.

It has real torch tensors, of the processor, but what is queued on its streams happens only when ``step`` lets a stream
do its next piece of work, or when somebody waits for an event: then just what that event needs, and nothing else. Work
of one stream is done in order; streams know of each other only by events.

- Memory holds ``POISON`` until something is written into it.
- Host memory that ``allocate`` returned is spoilt when its owner drops it.
- Device memory that is freed is spoilt in the order of the stream that it was allocated on, as allocators use it
  again; of memory that was recorded on another stream, only after what that one had queued when it was freed.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from actcache.reader.streams import AsyncDevice

POISON = 0x7B  # a number that is no test's: 1.3e36 as float32, 8 and more digits as an integer


class SimulatedEvent:
    def __init__(self, device: SimulatedDevice, stream: SimulatedStream, number: int) -> None:
        self._device, self.stream, self.number = device, stream, number
        self.waited = False

    def query(self) -> bool:
        return self.stream.done > self.number

    def synchronize(self) -> None:
        self.waited = True
        while not self.query():
            self._device.advance(self.stream)

    def elapsed_time(self, end: SimulatedEvent, /) -> float:
        assert self.query()
        assert end.query()
        return float(end.number - self.number)


class SimulatedStream:
    """Work in order: each piece is done when the event that it waits for, if any, has passed."""

    def __init__(self, name: str) -> None:
        self.name, self.queued, self.done = name, 0, 0
        self.work: deque[tuple[SimulatedEvent | None, Callable[[], None]]] = deque()

    def queue(self, do: Callable[[], None], after: SimulatedEvent | None = None) -> int:
        self.work.append((after, do))
        self.queued += 1
        return self.queued - 1

    @property
    def ready(self) -> bool:
        return bool(self.work) and (self.work[0][0] is None or self.work[0][0].query())


class _Block:
    """A piece of memory, which the simulation keeps when everybody else has dropped it."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = np.full(max(nbytes, 1), POISON, np.uint8)
        self.users: list[SimulatedStream] = []  # streams that it was recorded on

    def spoil(self) -> None:
        self.bytes[:] = POISON


class SimulatedDevice(AsyncDevice):
    """See the module. One thread at a time queues work on a stream, and one has it done."""

    asynchronous = True
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.copies = SimulatedStream("copies")
        self.streams = [self.copies]
        self.current: SimulatedStream | None = None  # the consumer's
        self.copies_done = 0
        self._blocks: dict[int, _Block] = {}

    # --- what delivery asks for ---

    def allocate(self, nbytes: int) -> np.ndarray:
        block = _Block(nbytes)
        lent = block.bytes[:nbytes]
        weakref.finalize(lent, block.spoil).atexit = False
        return lent

    @contextmanager
    def copying(self) -> Iterator[None]:
        with self.on(self.copies):
            yield

    def copy(self, source: torch.Tensor) -> torch.Tensor:
        with _as_it_is():
            target = self._empty(source.shape, source.dtype, self.copies)
            seen, shadow = torch.from_numpy(source.numpy()[...]), self.shadow(target)
        self.copies.queue(lambda: self._copied(shadow, seen))
        return target

    def send(self, array: np.ndarray) -> torch.Tensor:
        with _as_it_is():
            return self.copy(torch.from_numpy(array.copy()))

    def event(self) -> SimulatedEvent:
        return self.record_event(self.copies)

    def consumer(self) -> Any:
        return self.current

    def wait(self, stream: Any, event: Any) -> None:
        stream.queue(_nothing, after=event)

    def record(self, tensor: torch.Tensor, stream: Any) -> None:
        self._block_of(tensor).users.append(stream)

    # --- what the tests ask for ---

    def new_stream(self, name: str) -> SimulatedStream:
        self.streams.append(SimulatedStream(name))
        return self.streams[-1]

    @contextmanager
    def on(self, stream: SimulatedStream) -> Iterator[None]:
        """Queue what torch is asked for on a stream."""
        with _Kernels(self, stream):
            yield

    def record_event(self, stream: SimulatedStream) -> SimulatedEvent:
        return SimulatedEvent(self, stream, stream.queue(_nothing))

    def step(self, stream: SimulatedStream) -> None:
        """Do a stream's next piece of work, which is ``ready``."""
        _, do = stream.work.popleft()
        with _as_it_is():
            do()
        stream.done += 1

    def advance(self, stream: SimulatedStream) -> None:
        """Do a stream's next piece of work, and what it waits for."""
        after = stream.work[0][0]
        while after is not None and not after.query():
            self.advance(after.stream)
        self.step(stream)

    def finish(self) -> None:
        """Do everything."""
        for stream in self.streams:
            while stream.work:
                self.advance(stream)

    def shadow(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor over the same memory that does not keep it from being freed."""
        with _as_it_is():
            storage, block = tensor.untyped_storage(), self._blocks.get(tensor.untyped_storage().data_ptr())
            if block is None:
                return tensor
            memory = torch.from_numpy(block.bytes)[: storage.nbytes()].view(tensor.dtype)
            return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _empty(self, shape: Any, dtype: torch.dtype, stream: SimulatedStream) -> torch.Tensor:
        nbytes = int(np.prod(tuple(shape), dtype=np.int64)) * dtype.itemsize
        block = _Block(nbytes)
        lent = block.bytes[:]
        place = lent.ctypes.data
        self._blocks[place] = block
        weakref.finalize(lent, self._freed, place, stream).atexit = False
        return torch.from_numpy(lent)[:nbytes].view(dtype).view(tuple(shape))

    def _freed(self, place: int, stream: SimulatedStream) -> None:
        block = self._blocks.pop(place)
        others = [user for user in block.users if user is not stream]
        if not others:
            stream.queue(block.spoil)
            return
        pool = self.new_stream("memory that was recorded")
        for event in [self.record_event(user) for user in dict.fromkeys(others)]:
            pool.queue(_nothing, after=event)
        pool.queue(block.spoil)

    def _block_of(self, tensor: torch.Tensor) -> _Block:
        return self._blocks[tensor.untyped_storage().data_ptr()]

    def _copied(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)
        self.copies_done += 1


class _Kernels(TorchDispatchMode):
    """Queues what torch computes. Views are made at once: they only say where to look."""

    def __init__(self, device: SimulatedDevice, stream: SimulatedStream) -> None:
        super().__init__()
        self._device, self._stream = device, stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        returned = func._schema.returns[0].alias_info
        if returned is not None and not returned.is_write:
            return func(*args, **kwargs)
        shadows = [self._device.shadow(value) if isinstance(value, torch.Tensor) else value for value in args]
        if returned is not None:  # in place
            self._stream.queue(lambda: func(*shadows, **kwargs))
            return args[0]
        shapes = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in args]
        like = func(*shapes, **{**kwargs, "device": "meta"} if "device" in kwargs else kwargs)
        made = self._device._empty(like.shape, like.dtype, self._stream)
        shadow = self._device.shadow(made)
        self._stream.queue(lambda: shadow.copy_(func(*shadows, **kwargs)))
        return made


@contextmanager
def _as_it_is() -> Iterator[None]:
    """Have torch do things at once, whatever mode it is in."""
    with torch._C._DisableTorchDispatch():
        yield


def _nothing() -> None:
    pass

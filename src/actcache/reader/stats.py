"""What a reader tells about itself: where the time went, for people and for monitoring systems."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from actcache.io.metrics import Metric, prometheus_text
from actcache.io.notebook import Shown

__all__ = ["Metric", "ReaderStats", "prometheus_text"]


def _counter(short: str, unit: str, description: str) -> Any:
    """Return a field that counts from 0, and is exported."""
    exported = Metric("", short, "counter", unit, description)
    return field(default=0.0 if unit == "s" else 0, metadata={"exported": exported})


@dataclass
class ReaderStats(Shown):
    """Counts since the reader was made, over all epochs. Times in seconds.

    Reading, copying and decoding happen beside each other and beside the consumer's steps: their times add up to more
    than what passes on the clock, and none of them is lost time. That is ``wait_seconds``.
    """

    epochs: int = _counter("epochs", "{epoch}", "Epochs that were read to their end")
    batches: int = _counter("batches", "{batch}", "Batches handed to the consumer")
    documents: int = _counter("documents", "{document}", "Documents read")
    ram_documents: int = _counter("ram.documents", "{document}", "Of which from the RAM cache")
    local_documents: int = _counter("local.documents", "{document}", "Of which from the local cache")
    tokens: int = _counter("tokens", "{token}", "Tokens read")
    nbytes: int = _counter("io", "By", "Activations read, as stored, without padding")
    # In the thread that reads ahead:
    read_seconds: float = _counter("read.time", "s", "Reading: look-up, rows, checksums")
    deliver_seconds: float = _counter("deliver.time", "s", "From host buffer to batch, in the reading thread")
    # By the device's own clock where it is a CUDA device; decoding is the rest of making a batch, masks among it:
    copy_seconds: float = _counter("copy.time", "s", "Copying to the device")
    decode_seconds: float = _counter("decode.time", "s", "Decoding and padding")
    # In the consumer's:
    compute_seconds: float = _counter("compute.time", "s", "The lower half, for documents that were missing")
    wait_seconds: float = _counter("wait.time", "s", "The consumer waited for a batch")
    first_seconds: float = _counter("first_wait.time", "s", "Of which for the first batches of epochs")
    step_seconds: float = _counter("step.time", "s", "The consumer worked between two batches")
    ready: int = 0  # batches that stood ready when the consumer asked, summed over its requests

    @property
    def read_gb_per_second(self) -> float:
        """GB (10**9 bytes) of activations a second of reading."""
        return self.nbytes / self.read_seconds / 1e9 if self.read_seconds else 0.0

    @property
    def stall_fraction(self) -> float:
        """The share of the consumer's time that it waited, first batches of epochs aside."""
        waited = max(0.0, self.wait_seconds - self.first_seconds)
        total = waited + self.step_seconds
        return waited / total if total else 0.0

    @property
    def queue_depth(self) -> float:
        """Batches that stood ready when the consumer asked for one, on average."""
        return self.ready / self.batches if self.batches else 0.0

    def metrics(self) -> list[Metric]:
        """Return what to export to a monitoring system, with names and units as OpenTelemetry has them."""
        counters = [one.metadata["exported"]._replace(attribute=one.name) for one in fields(self) if one.metadata]
        return [one._replace(value=float(getattr(self, one.attribute))) for one in (*counters, *_GAUGES)]

    def verdict(self) -> str:
        """Return in one line what the consumer's time went to."""
        if not self.batches:
            return "nothing was read yet"
        stalled = self.stall_fraction
        if self.compute_seconds > max(self.read_seconds, self.step_seconds):
            return f"filling: the lower half took {self.compute_seconds:.1f} s for documents that were not stored yet"
        if stalled <= 0.02:
            return f"compute-bound: loading hid behind {1 - stalled:.1%} of the steps"
        return (
            f"loading-bound: the consumer waited {stalled:.1%} of its time; reading gives "
            f"{self.read_gb_per_second:.2f} GB/s"
        )


_GAUGES = [
    Metric("stall_fraction", "stall", "gauge", "1", "Share of the consumer's time that it waited, first batches aside"),
    Metric("queue_depth", "queue.depth", "gauge", "{batch}", "Batches that stood ready when asked for, on average"),
]

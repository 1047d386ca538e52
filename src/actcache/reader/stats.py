"""What a reader tells about itself: where the time went, for people and for monitoring systems."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from actcache.io.notebook import Shown

_PREFIX = "actcache.reader."
#: OpenTelemetry's units -> what Prometheus wants names to end in.
_SUFFIXES = {"s": "_seconds", "By": "_bytes", "1": "_ratio"}


class Metric(NamedTuple):
    """One measurement as plain data, with name, kind and unit of OpenTelemetry and Prometheus."""

    attribute: str  # of the object that is measured
    short: str  # its name without the prefix
    kind: str  # ``"counter"`` only grows, ``"gauge"`` does not
    unit: str  # in UCUM, as OpenTelemetry writes it
    description: str
    value: float = 0.0

    @property
    def name(self) -> str:
        """The name for OpenTelemetry: ``actcache.reader.read.time``."""
        return f"{_PREFIX}{self.short}"

    @property
    def prometheus_name(self) -> str:
        """The name for Prometheus: ``actcache_reader_read_time_seconds_total``."""
        total = "_total" if self.kind == "counter" else ""
        return self.name.replace(".", "_") + _SUFFIXES.get(self.unit, "") + total


def prometheus_text(metrics: Iterable[Metric], **labels: str) -> str:
    """Return measurements in Prometheus' text format (0.0.4), for a textfile collector or an HTTP handler, with
    ``labels`` (``rank="0"``) on each."""
    tags = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    lines = []
    for metric in metrics:
        name = metric.prometheus_name
        lines += [f"# HELP {name} {metric.description}", f"# TYPE {name} {metric.kind}"]
        lines.append(f"{name}{{{tags}}} {metric.value!r}" if tags else f"{name} {metric.value!r}")
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


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

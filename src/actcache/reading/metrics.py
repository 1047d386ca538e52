"""Measurements for monitoring systems as plain data: names, kinds and units of OpenTelemetry and Prometheus."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

_PREFIX = "actcache.reader."
#: OpenTelemetry's units -> what Prometheus wants names to end in.
_SUFFIXES = {"s": "_seconds", "By": "_bytes", "1": "_ratio"}


class Row(NamedTuple):
    """What is said about one measurement.

    Attributes:
        attribute: of the object that is measured.
        short: its name without the prefix.
        kind: ``"counter"`` only grows, ``"gauge"`` does not.
        unit: in UCUM, as OpenTelemetry writes it.
    """

    attribute: str
    short: str
    kind: str
    unit: str
    description: str


class Metric(NamedTuple):
    """One measurement and its value; see ``Row``."""

    attribute: str
    short: str
    kind: str
    unit: str
    description: str
    value: float

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
    """Return measurements in Prometheus' text format (0.0.4), for a textfile collector or an HTTP handler.

    Args:
        labels: put on every one of them, such as ``rank="0"``.
    """
    tags = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    lines = []
    for metric in metrics:
        name = metric.prometheus_name
        lines += [f"# HELP {name} {metric.description}", f"# TYPE {name} {metric.kind}"]
        lines.append(f"{name}{{{tags}}} {metric.value!r}" if tags else f"{name} {metric.value!r}")
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

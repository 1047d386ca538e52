"""Measurements as plain data, for monitoring systems, and the counters of this process. Nothing has to be installed."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from actcache.io.workers import ProcessLock

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
    scope: str = "reader"  # what it is of
    attributes: tuple[tuple[str, str], ...] = ()  # that tell values of one name apart: ``(("operation", "get"),)``

    @property
    def name(self) -> str:
        """The name for OpenTelemetry: ``actcache.reader.read.time``."""
        return f"actcache.{self.scope}.{self.short}"

    @property
    def prometheus_name(self) -> str:
        """The name for Prometheus: ``actcache_reader_read_time_seconds_total``."""
        total = "_total" if self.kind == "counter" else ""
        return self.name.replace(".", "_") + _SUFFIXES.get(self.unit, "") + total


def prometheus_text(metrics: Iterable[Metric], **labels: str) -> str:
    """Return measurements in Prometheus' text format (0.0.4), for a textfile collector or an HTTP handler, with
    ``labels`` (``rank="0"``) on each. Those of one name have to follow each other."""
    lines = []
    before = ""
    for metric in metrics:
        name = metric.prometheus_name
        tags = ",".join(f'{one}="{_escaped(value)}"' for one, value in [*metric.attributes, *labels.items()])
        if name != before:
            lines += [f"# HELP {name} {metric.description}", f"# TYPE {name} {metric.kind}"]
        lines.append(f"{name}{{{tags}}} {metric.value!r}" if tags else f"{name} {metric.value!r}")
        before = name
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class Counters:
    """Counters of one process, by operation. Thread-safe; a forked child goes on from its parent's.

    Args:
        kinds: name, unit and description of each.
    """

    def __init__(self, scope: str, kinds: Sequence[tuple[str, str, str]]) -> None:
        self._scope, self._kinds, self._lock = scope, kinds, ProcessLock()
        self._values: dict[tuple[str, str], float] = {}

    def add(self, operation: str, **amounts: float) -> None:
        """Add to some counters of an operation; in their names ``_`` stands for a dot."""
        with self._lock:
            for name, amount in amounts.items():
                where = name.replace("_", "."), operation
                self._values[where] = self._values.get(where, 0.0) + amount

    def metrics(self) -> list[Metric]:
        """Return what was counted until now; nothing of what never happened."""
        with self._lock:
            values = dict(self._values)
        return [
            Metric("", name, "counter", unit, description, float(value), self._scope, (("operation", operation),))
            for name, unit, description in self._kinds
            for (of, operation), value in sorted(values.items())
            if of == name
        ]


#: What this process has asked of object stores.
OBJECTS = Counters(
    "objects",
    [
        ("requests", "{request}", "Requests that were answered"),
        ("failures", "{request}", "Requests that failed and were made again, or given up"),
        ("time", "s", "Time from a request to its answer, of all requests together, repetitions among it"),
        ("received", "By", "Bytes of objects received"),
        ("sent", "By", "Bytes of objects sent"),
    ],
)


def process_metrics() -> list[Metric]:
    """Return the counters of this process: requests of object stores, by operation. Thread-safe."""
    return OBJECTS.metrics()


#: What a log record has of its own; the rest was given as ``extra``.
_OWN = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
_RANKS = ("RANK", "SLURM_PROCID", "JOB_COMPLETION_INDEX", "OMPI_COMM_WORLD_RANK")


class JsonFormatter(logging.Formatter):
    """Formats a log record as one line of JSON: ``time`` (UTC), ``level``, ``logger``, ``message``, ``pid``, ``rank``
    where a launcher has numbered this process, ``error`` with its traceback, and whatever was given as ``extra``.
    Thread-safe."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
        }
        if rank := next((os.environ[name] for name in _RANKS if name in os.environ), None):
            line["rank"] = rank
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        line |= {name: value for name, value in vars(record).items() if name not in _OWN}
        return json.dumps(line, ensure_ascii=False, default=str)

"""What a trace of torch's profiler says of copies to a device: whether kernels ran beside them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

Interval = tuple[float, float]


@dataclass(frozen=True)
class CopiesAndKernels:
    """Copies from the host in a trace, and how much of their time a kernel ran, too; None where there are none."""

    copies: int
    kernels: int
    share: float | None


def profiled(device: torch.device) -> Any:
    """Return a profiler of the processor, and of the accelerator where that is the device."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU] + [
        kind for name, kind in kinds.__members__.items() if name.lower() == device.type != "cpu"
    ]
    return torch.profiler.profile(activities=activities)


def copies_and_kernels(trace: Path) -> CopiesAndKernels:
    """Look for copies from the host, and for kernels, in a trace that was exported (``.json``, or ``.json.gz``)."""
    with gzip.open(trace) if trace.suffix == ".gz" else trace.open("rb") as file:
        events = json.load(file)["traceEvents"]
    copies: list[Interval] = []
    kernels: list[Interval] = []
    for event in events:
        kind, name = event.get("cat"), event.get("name", "")
        if event.get("ph") != "X" or kind not in ("kernel", "gpu_memcpy"):
            continue
        interval = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        if kind == "kernel":
            kernels.append(interval)
        elif "HtoD" in name or "HostToDevice" in name:
            copies.append(interval)
    spent = sum(end - begin for begin, end in copies)
    return CopiesAndKernels(len(copies), len(kernels), overlap(copies, kernels) / spent if spent else None)


def overlap(ones: Sequence[Interval], others: Sequence[Interval]) -> float:
    """Return how long both kinds of intervals ran at the same time; those of one kind may overlap each other."""
    edges = sorted({edge for interval in (*ones, *others) for edge in interval})
    if len(edges) < 2:
        return 0.0
    points = np.array(edges)
    covered = []
    for intervals in (ones, others):
        begins, ends = (np.searchsorted(points, edge) for edge in np.array(intervals, float).reshape(-1, 2).T)
        covered.append(np.cumsum(np.bincount(begins, minlength=len(points)) - np.bincount(ends, minlength=len(points))))
    both = (covered[0] > 0) & (covered[1] > 0)
    return float(np.diff(points)[both[:-1]].sum())

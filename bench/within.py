"""Turns of contestants for as long as there is time, on devices that work beside the processor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

MOST = 15  # rounds


def synchronize(device: torch.device) -> None:
    """Wait until a device has done everything."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def turns(contestants: Mapping[str, Callable[[], None]], until: float, most: int = MOST) -> dict[str, np.ndarray]:
    """Time contestants round by round, each round beginning with another one; return their seconds, ``[rounds]``.

    A round warms up and does not count, one counts in any case, and others follow as long as they end before
    ``until`` (of ``time.monotonic``).
    """
    names = list(contestants)
    rounds: list[dict[str, float]] = []
    for number in range(most + 1):
        begin = time.monotonic()
        spent = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            contestants[name]()
            spent[name] = time.perf_counter() - start
        rounds.append(spent)
        end = time.monotonic()
        if number and end + (end - begin) > until:
            break
    return {name: np.array([spent[name] for spent in rounds[1:]]) for name in names}

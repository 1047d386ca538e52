"""GB/s from host memory to a device, by torch alone: from pinned and from pageable memory. A part of ``bench.cuda``.

python -m bench.bus --device cuda --seconds 20 --json bus.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.within import synchronize, turns

SIZES = (1 << 20, 16 << 20, 256 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    found = measure(torch.device(options.device), options.seconds, SIZES[:1] if options.tiny else SIZES)
    options.json.write_text(json.dumps(found))


def measure(device: torch.device, seconds: float, sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """Return the GB/s of copies, by kind of memory and size in MiB. On the processor itself there is no bus to cross,
    and nothing to pin for it."""
    until = time.monotonic() + seconds
    found: dict[str, Any] = {}
    for number, size in enumerate(sizes):
        hosts = {"pageable": torch.ones(size, dtype=torch.uint8)}
        if device.type not in ("cpu", "mps"):
            hosts["pinned"] = hosts["pageable"].pin_memory()
        target = torch.empty(size, dtype=torch.uint8, device=device)
        copies = max(4, (64 << 20) // size)

        def copying(host: torch.Tensor, target: torch.Tensor, copies: int) -> Callable[[], None]:
            def turn() -> None:
                for _ in range(copies):
                    target.copy_(host, non_blocking=True)
                synchronize(device)

            return turn

        now = time.monotonic()
        share = now + max(0.0, until - now) / (len(sizes) - number)
        measured = turns({name: copying(host, target, copies) for name, host in hosts.items()}, share)
        for name, spent in measured.items():
            found.setdefault(name, {})[f"{size >> 20} MiB"] = float(copies * size / spent.min() / 1e9)
    return {"gb_per_second": found}


if __name__ == "__main__":
    main()

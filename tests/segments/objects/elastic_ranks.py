"""What one rank does under ``torchrun`` in test_elastic.py: trains from S3, and goes on from the last checkpoint.

A document counts when the checkpoint counts that was written after its step: whatever happens later to that process.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import actcache
from actcache.reader.reader import Reader
from tests.support import key, recipe, rows

EVERY = 3  # steps from checkpoint to checkpoint


def main(config: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    Path(config["folder"], f"pid-{dist.get_rank()}").write_text(str(os.getpid()), encoding="utf-8")
    if "model" not in config:
        with actcache.open(config["url"], "r", **config["options"]) as store:
            keys = [key(number) for number in range(config["count"])]
            train(config, store.space(recipe()).reader(keys, batch_size=4, shuffle=True, seed=3, device="cpu"))
    else:
        with (
            actcache.open(config["url"], **config["options"]) as store,
            actcache.Recycler.from_pretrained(
                config["model"], layer=2, store=store, dtype="float32", device="cpu"
            ) as recycler,
        ):
            reader = recycler.reader(config["texts"], batch_size=4, shuffle=True, seed=3, on_missing="compute")
            train(config, reader, recycler.space.flush)
    dist.destroy_process_group()


def train(config: dict[str, Any], reader: Reader, flush: Callable[[], object] = lambda: None) -> None:
    rank, checkpoint = dist.get_rank(), Path(config["folder"], "checkpoint.json")
    saved: dict[str, Any] = {"epochs": [[]], "digests": [{}], "computed": [0.0]}
    if checkpoint.exists():
        saved = json.loads(checkpoint.read_text(encoding="utf-8"))
        reader.load_state_dict(saved["state"])
    mine: list[tuple[int, str]] = []
    steps = 0

    def save(*, end: bool = False) -> None:
        flush()  # what was computed for a document that counts is not computed again
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (mine, reader.stats().compute_seconds - before))
        for part, seconds in parts:
            saved["epochs"][-1] += [number for number, _ in part]
            saved["digests"][-1] |= dict(part)
            saved["computed"][-1] = max(saved["computed"][-1], seconds)
        mine.clear()
        if end:
            for name, empty in (("epochs", []), ("digests", {}), ("computed", 0.0)):
                saved[name].append(empty)
        if rank == 0:
            new = checkpoint.with_suffix(".new")
            new.write_text(json.dumps({**saved, "state": reader.state_dict()}), encoding="utf-8")
            os.replace(new, checkpoint)

    while len(saved["epochs"]) <= config.get("epochs", 1):
        before = reader.stats().compute_seconds
        for batch in reader:
            lengths = batch.lengths.tolist()
            for number, length, activations in zip(batch.documents.tolist(), lengths, batch.activations, strict=True):
                stored = activations[:length].numpy()
                if "model" not in config:
                    np.testing.assert_array_equal(stored, rows(number))
                mine.append((number, hashlib.sha256(stored.tobytes()).hexdigest()))
            dist.all_reduce(batch.activations.sum().double())  # ranks keep pace, as with gradients
            time.sleep(config.get("seconds", 0))
            steps += 1
            if steps % EVERY == 0:
                save()
            if config.get("kill") == [rank, steps]:
                os.kill(os.getpid(), signal.SIGKILL)
        save(end=True)
        dist.barrier()  # what the others have computed in this epoch is durable now


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

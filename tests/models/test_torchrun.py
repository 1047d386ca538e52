"""``torchrun`` with two processes: a reduced model under DDP, fed by the reader, and gone on with by one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, AutoModelForSequenceClassification

from actcache import Recycler
from tests.support import PYTHONPATH

COUNT = 37  # an odd number: the last round is split smaller
TEXTS = [f"document {i} says " + "la " * (i % 13) + "." for i in range(COUNT)]
OPTIONS: dict[str, Any] = {"batch_size": 4, "shuffle": True, "seed": 3}

SCRIPT = """
import datetime, json, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification
from actcache import Recycler

store, full, out, wanted = sys.argv[1:]
wanted = json.loads(wanted)
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=90))
rank = dist.get_rank()
torch.manual_seed(rank)  # what is equal in the end was made equal
recycler = Recycler.from_pretrained(full, layer=2, store=store, dtype="float32", device="cpu")
model = AutoModelForSequenceClassification.from_pretrained(full, num_labels=2)
model = DistributedDataParallel(recycler.reduce(model.train()))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
reader = recycler.reader(wanted["texts"], labels=wanted["labels"], **wanted["options"])
epochs, state, gradients = [], None, []
for epoch in range(2):
    seen = []
    for number, batch in enumerate(reader):
        model(**batch.model_inputs()).loss.backward()
        gradients.append(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
        optimizer.step()
        optimizer.zero_grad()
        seen.append(batch.documents.tolist())
        if epoch == 1 and number == 1:
            state = reader.state_dict()
    epochs.append(seen)
parameters = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
told = {"epochs": epochs, "length": len(reader), "state": state, "gradients": gradients, "parameters": parameters}
with open(f"{out}-{rank}.json", "w") as file:
    json.dump(told, file)
dist.destroy_process_group()
"""


@pytest.mark.long  # everyday: ranks in tests/reader/test_reader.py, DDP in test_modes.py
def test_two_ranks_train_and_one_goes_on(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    full = tmp_path / "full"
    make_model(AutoModelForSequenceClassification).save_pretrained(full)
    tokenizer.save_pretrained(full)
    labels = [i % 2 for i in range(COUNT)]
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with Recycler(
        AutoModel.from_pretrained(full).eval(), tokenizer, layer=2, store=tmp_path / "store", dtype="float32"
    ) as recycler:
        recycler.fill(TEXTS, progress=False)

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += [script, tmp_path / "store", full, tmp_path / "told"]
    command += [json.dumps({"texts": TEXTS, "labels": labels, "options": OPTIONS})]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=200, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr

    one, two = (json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(2))
    for epoch in range(2):
        assert len(one["epochs"][epoch]) == len(two["epochs"][epoch]) == one["length"] == two["length"]
        seen = [n for told in (one, two) for batch in told["epochs"][epoch] for n in batch]
        assert sorted(seen) == list(range(COUNT))
    assert one["epochs"][0] != one["epochs"][1]
    assert one["gradients"] == two["gradients"]  # averaged by DDP, so that equal
    assert one["parameters"] == two["parameters"]
    assert min(one["gradients"]) > 0

    # One process goes on in the middle of the second epoch: what is left, each once.
    assert one["state"] == two["state"]
    before = {n for told in (one, two) for batch in told["epochs"][1][:2] for n in batch}
    with Recycler(
        AutoModel.from_pretrained(full).eval(), tokenizer, layer=2, store=tmp_path / "store", dtype="float32"
    ) as recycler:
        reader = recycler.reader(TEXTS, labels=labels, **OPTIONS)
        reader.load_state_dict(one["state"])
        rest = [n for batch in reader for n in batch.documents.tolist()]
    assert len(rest) == COUNT - len(before)
    assert sorted([*before, *rest]) == list(range(COUNT))

"""speculators' own ``train`` over samples of a store.

Run by ``make test-clients``: speculators has an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actcache
from actcache.errors import SpaceNotFoundError, StoreNotFoundError, UsageError
from actcache.models.clients.draft_samples import DraftSamples
from tests.models.clients.drafting import HIDDEN, SITES, hidden_states, samples, save_verifier
from tests.support import PYTHONPATH, ROOT, segment_files

pytest.importorskip("hs_connectors", reason="speculators is not installed: make test-clients")

import datasets
from hs_connectors import HiddenStatesBackend
from safetensors.torch import save_file

from actcache.models.clients import speculators as client

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]  # the libraries' own

COUNT = 16
IDS = samples(COUNT)
CREATED: dict[str, Any] = {"model": "tiny", "hidden_size": HIDDEN, "dtype": "float32", "source": "tests"}


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_verifier(tmp_path_factory.mktemp("verifier"))


@pytest.fixture
def folder(verifier: Path, tmp_path: Path) -> Path:
    """A store with the samples, and a data set of them in another order."""
    with actcache.open(tmp_path / "store") as store, DraftSamples.create(store, SITES, **CREATED) as made:
        made.put(IDS, [hidden_states(verifier, ids) for ids in IDS])
    save_data(tmp_path / "data", np.random.default_rng(1).permutation(COUNT))
    return tmp_path


def save_data(folder: Path, order: Any) -> None:
    columns = {
        "input_ids": [IDS[i].tolist() for i in order],
        "loss_mask": [[1] * len(IDS[i]) for i in order],
        "seq_len": [len(IDS[i]) for i in order],
    }
    datasets.Dataset.from_dict(columns).with_format("torch").save_to_disk(folder)


def arguments(folder: Path, **changes: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    HiddenStatesBackend.registry["actcache"].add_train_args(parser)
    given = {"actcache_store": str(folder / "store"), "actcache_layers": "1,2,3,4", **changes}
    parser.set_defaults(**given, target_layer_ids=None, verifier_name_or_path=None)
    return parser.parse_args([])


@pytest.fixture
def transfer(folder: Path) -> Iterator[Any]:
    made = client.StoreBackend.from_train_args(arguments(folder), str(folder / "data"))
    yield made
    made.close()


def test_the_real_command_writes_a_checkpoint(verifier: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "tests.models.clients.drafting", "train"]
    given = {
        "verifier-name-or-path": verifier,
        "data-path": folder / "data",
        "save-path": folder / "out",
        "log-dir": folder / "logs",
        "hidden-states-backend": "actcache",
        "actcache-store": folder / "store",
        "on-missing": "raise",
        "hidden-states-dtype": "float32",
        "total-seq-len": 128,
        "epochs": 1,
        "num-workers": 0,
        "num-layers": 1,
        "draft-attn-impl": "eager",
        "loss-implementation": "eager",
    }
    command += [part for name, value in given.items() for part in (f"--{name}", str(value))]
    command += ["--target-layer-ids", "1", "2", "3"]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    checkpoint = folder / "out" / "0"
    assert (checkpoint / "model.safetensors").stat().st_size > 1000
    assert json.loads((checkpoint / "config.json").read_text())["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert "mismatch" not in done.stdout


def test_a_sample_is_found_by_its_tokens(verifier: Path, folder: Path, transfer: Any) -> None:
    """Whatever the order of the data set, also where the transfer travelled to a loader's worker."""
    travelled = pickle.loads(pickle.dumps(transfer))  # noqa: S301
    data = datasets.load_from_disk(folder / "data")
    for position in range(COUNT):
        for one in (transfer, travelled):
            sample = one.get_cached(position)
            assert torch.equal(sample["token_ids"], data[position]["input_ids"])
            assert torch.equal(sample["hidden_states"], hidden_states(verifier, data[position]["input_ids"].numpy()))
    travelled.close()


def test_a_flipped_byte_makes_a_sample_unavailable(verifier: Path, folder: Path, transfer: Any) -> None:
    """And what is generated in its place is served from then on."""
    data = datasets.load_from_disk(folder / "data")
    ids = data[5]["input_ids"].numpy()
    right = hidden_states(verifier, ids)
    fingerprint = DraftSamples.find(actcache.open(folder / "store"), SITES).spaces[2].recipe.fingerprint
    file = segment_files(folder / "store" / "spaces" / fingerprint)[0]
    content = bytearray(file.read_bytes())
    content[content.index(right[:, 2].contiguous().numpy().tobytes()) + 7] ^= 4
    file.write_bytes(content)
    assert transfer.get_cached(5) is None
    assert transfer.get_cached(6) is not None
    for rows in (right * float("nan"), right):  # the trainer refuses the first one, and so is it never stored
        save_file({"hidden_states": rows.clone(), "token_ids": torch.from_numpy(ids)}, folder / "one.safetensors")
        transfer.get_generated({"hidden_states_path": str(folder / "one.safetensors")})
    transfer.delete(str(folder / "one.safetensors"))
    assert torch.equal(transfer.get_cached(5)["hidden_states"], right)


_FILL = """
import sys
import actcache
from actcache.models.clients.draft_samples import DraftSamples
from tests.models.clients.drafting import *
from pathlib import Path
ids = samples({count})[int(sys.argv[3])::2]
with actcache.open(sys.argv[1]) as store, DraftSamples.find(store, SITES) as made:
    for one in ids:
        made.put([one], [hidden_states(Path(sys.argv[2]), one)])
        made.flush()
"""


def test_two_processes_fill_while_training_reads(verifier: Path, tmp_path: Path) -> None:
    save_data(tmp_path / "data", range(COUNT))
    with actcache.open(tmp_path / "store") as store:
        DraftSamples.create(store, SITES, **CREATED).close()
    transfer = client.StoreBackend.from_train_args(arguments(tmp_path), str(tmp_path / "data"))
    assert transfer.get_cached(0) is None
    code, environment = _FILL.format(count=COUNT), {**os.environ, "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-c", code, str(tmp_path / "store"), str(verifier)]
    fillers = [subprocess.Popen([*command, str(part)], cwd=ROOT, env=environment) for part in range(2)]
    seen: dict[int, Any] = {}
    while len(seen) < COUNT:
        running = any(filler.poll() is None for filler in fillers)
        for position in set(range(COUNT)) - seen.keys():
            if (sample := transfer.get_cached(position)) is not None:
                seen[position] = sample["hidden_states"]
        assert running or len(seen) == COUNT
    assert [filler.wait(60) for filler in fillers] == [0, 0]
    for position, rows in seen.items():
        torch.testing.assert_close(rows, hidden_states(verifier, IDS[position]), atol=1e-5, rtol=0)
    transfer.close()


def test_arguments_that_do_not_fit(folder: Path) -> None:
    def refused(error: type[Exception], why: str, **changes: Any) -> None:
        with pytest.raises(error, match=why):
            client.StoreBackend.from_train_args(arguments(folder, **changes), str(folder / "data"))

    refused(UsageError, "needs --actcache-store", actcache_store=None)
    refused(StoreNotFoundError, "nowhere", actcache_store=str(folder / "nowhere"))
    refused(SpaceNotFoundError, "no space for 9", actcache_layers="1,2,3,9")
    refused(UsageError, "separated by commas", actcache_layers="1,,2")
    assert not (folder / "nowhere").exists()
    launch = client.StoreBackend.build_kv_transfer_config(argparse.Namespace(hidden_states_path="/x"))
    assert launch["kv_connector_extra_config"] == {"shared_storage_path": "/x"}

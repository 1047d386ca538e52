"""Golden stores with columns of the caller's own, read by this package and by the independent reader."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np

import actcache
from tests.golden.make import HERE, files, own_of
from tests.golden.reader import digests
from tests.golden.test_golden import WITHOUT_ACTCACHE
from tests.support import key, put, recipe
from tests.support.backends import each

FOLDER = HERE / "columns"


@each()
def test_others_read_it(kind):
    root, held = FOLDER / kind.name / "store", json.loads((FOLDER / kind.name / "holds.json").read_text())
    assert files(root) == json.loads((FOLDER / kind.name / "files.json").read_text())
    command = [sys.executable, "-c", WITHOUT_ACTCACHE, str(HERE / "reader.py"), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.sep, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["spaces"] == held["spaces"]


@each()
def test_actcache_reads_it_and_goes_on(kind, tmp_path):
    shutil.copytree(FOLDER / kind.name / "store", tmp_path / "store")
    held = json.loads((FOLDER / kind.name / "holds.json").read_text())["spaces"][recipe().fingerprint]
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        keys = list(space.keys())
        found = {}
        for one, entry in zip(keys, space.get(keys), strict=True):
            arrays = {"values": entry.activations, "token_ids": entry.token_ids, **entry.extras}
            found[one] = arrays | {f"columns.{name}": array for name, array in entry.columns.items()}
        assert digests(found) == {one: dict(arrays) for one, arrays in held.items()}
        put(space, [30], columns={name: [array] for name, array in own_of(30).items()})
        space.flush()
        np.testing.assert_array_equal(space.get([key(30)])[0].columns["words"], own_of(30)["words"])

"""Stores that were written once stay readable, by this package and by anybody who has read docs/format.md."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid

import fsspec
import numpy as np
import pytest

import actcache
from actcache.errors import FormatVersionError
from actcache.format import codec
from actcache.store import description
from tests.golden.make import CODECS, HERE, files
from tests.golden.reader import digests
from tests.support import put, recipe
from tests.support.backends import each

WITHOUT_ACTCACHE = """
import runpy, sys
sys.modules["actcache"] = None
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(params=["", "codecs"], ids=["version 1", "version 2"])
def golden(kind, request):
    """A golden store and what it holds."""
    folder = HERE / kind.name / request.param
    return folder / "store", json.loads((folder / "holds.json").read_text())


@each()
def test_its_files_are_as_they_were_written(golden):
    root, _ = golden
    assert files(root) == json.loads((root.parent / "files.json").read_text())


@each()
@pytest.mark.parametrize("dtype", CODECS)
def test_releases_before_codecs_refuse_them_by_name(kind, dtype, monkeypatch, tmp_path):
    """They knew version 1 of the description of a space, which is read before anything else; others are served."""
    monkeypatch.setattr(description, "SPACE_VERSION", 1)
    shutil.copytree(HERE / kind.name / "codecs/store", tmp_path / "store")  # LMDB leaves a lock where it reads
    with actcache.open(tmp_path / "store", "r") as store:
        with pytest.raises(FormatVersionError, match="format version 2, newer than this release"):
            store.recipe(recipe(dtype=dtype).fingerprint)
        with store.space(recipe()) as space:
            assert len(space) == 9


@each()
def test_others_read_it(golden):
    """The independent reader, in a process where actcache cannot be imported."""
    root, held = golden
    command = [sys.executable, "-c", WITHOUT_ACTCACHE, str(HERE / "reader.py"), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.sep, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == held


@each()
def test_actcache_reads_it_and_goes_on(golden, kind, tmp_path):
    root, held = golden
    shutil.copytree(root, tmp_path / "store")
    for options in kind.options:
        with actcache.open(tmp_path / "store", "r", **options) as store:
            check(store, held)
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        assert put(space, range(100, 110)) == 10
        space.flush()
        assert len(space) == len(held["spaces"][recipe().fingerprint]) + 10
    with actcache.open(tmp_path / "store", "r") as store:
        with store.space(recipe()) as space:
            assert len(space) == len(held["spaces"][recipe().fingerprint]) + 10
        held["spaces"].pop(recipe().fingerprint)
        check(store, held)


@pytest.fixture
def journaled():
    folder = HERE / "safetensors/journaled"
    return folder / "store", json.loads((folder / "holds.json").read_text())


def test_a_store_of_version_3(journaled, tmp_path):
    """As it was written, read by others, read and written in a folder and in an object store."""
    root, held = journaled
    assert files(root) == json.loads((root.parent / "files.json").read_text())
    command = [sys.executable, "-c", WITHOUT_ACTCACHE, str(HERE / "reader.py"), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.sep, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == held
    memory, name = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    memory.put(str(root), f"{name}/store", recursive=True)
    shutil.copytree(root, tmp_path / "store")
    for url in (tmp_path / "store", f"memory:/{name}/store"):
        with actcache.open(url, "r") as store:
            check(store, held)
        with actcache.open(url) as store, store.space(recipe()) as space:
            assert put(space, range(100, 110)) == 10
        with actcache.open(url, "r") as store, store.space(recipe()) as space:
            assert len(space) == len(held["spaces"][recipe().fingerprint]) + 10
    memory.rm(name, recursive=True)


def check(store, held):
    by_name = {found.fingerprint: found for found in store.recipes()}
    for fingerprint, entries in held["spaces"].items():
        dtype = by_name[fingerprint].dtype
        with store.space(by_name[fingerprint]) as space:
            assert space.damaged() == {}
            keys = list(space.keys())
            assert [key.hex() for key in keys] == sorted(entries)
            for key, entry in zip(keys, space.get(keys), strict=True):
                values = codec.get(dtype).stored_rows(np.asarray(entry.activations, np.float32))
                if dtype == "float8_e4m3":  # whose scales lose a last digit
                    values = space.read_packed([key]).columns["values"]
                arrays = {"values": values, **dict(entry.extras)}
                if entry.token_ids is not None:
                    arrays["token_ids"] = entry.token_ids
                assert digests({key: arrays}) == {key.hex(): entries[key.hex()]}
    assert set(store.collections()) == set(held["collections"])
    for name, (keys, named) in held["collections"].items():
        collection = store.collection(name)
        assert [row.tobytes().hex() for row in collection.keys] == keys
        assert collection.ids == named

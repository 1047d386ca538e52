"""doctor: facts against the operating system's, secrets kept, and every kind of place."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil

import numpy as np
import pytest

from tests.cli.running import cachectl
from tests.support import make_store, recipe


def diagnosed(*arguments):
    result = cachectl("doctor", *arguments, "--json")
    assert result.code in (0, 3), result.err
    return json.loads(result.out)


def test_versions_and_backends():
    found = diagnosed()["facts"]
    assert found["versions"]["numpy"] == np.__version__
    assert found["versions"]["actcache"] == importlib.metadata.version("actcache")
    assert found["backends"]["hdf5"] == "works"
    assert set(found["extras"]) >= {"models", "zarr", "lmdb", "s3"}
    text = cachectl("doctor").out
    assert f"numpy: {np.__version__}" in text
    assert "Example" not in text


def test_an_extra_that_is_missing(monkeypatch):
    def absent(name):
        if name == "lmdb":
            raise importlib.metadata.PackageNotFoundError(name)
        return importlib.metadata.version(name)

    monkeypatch.setattr("actcache.admin.machine.version", absent)
    facts = diagnosed()["facts"]
    assert "pip install 'actcache[lmdb]'" in facts["extras"]["lmdb"]
    assert facts["backends"]["lmdb"] == facts["extras"]["lmdb"]
    assert facts["backends"]["hdf5"] == "works"


def test_a_store(tmp_path):
    make_store(tmp_path / "store", range(3))
    before = sorted(path for path in (tmp_path / "store").rglob("*"))
    found = diagnosed(tmp_path / "store")
    assert found["facts"]["store"]["spaces"] == "1"
    place = found["facts"]["place"]
    free = float(place["free"].split()[0].replace(",", ""))
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free / (1 << 30), rel=0.2, abs=0.2)
    assert place["hard links"] == "yes"
    assert sorted(path for path in (tmp_path / "store").rglob("*")) == before
    (tmp_path / "store/spaces" / recipe().fingerprint / "recipe.json").write_text("{")
    assert any("recipe.json" in warning for warning in diagnosed(tmp_path / "store")["warnings"])


def test_places_without_a_store(tmp_path):
    found = diagnosed(tmp_path / "a/b")
    assert "not there yet" in found["facts"]["place"]["path"]
    assert found["usable"]
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("x")
    for url in (tmp_path / "file", f"nothing:{tmp_path}", "lmdb:/proc/none"):
        result = cachectl("doctor", url)
        assert (result.code == 3) == (url != "lmdb:/proc/none"), result.out
        assert "Traceback" not in result.err


def test_memory_is_named():
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no /dev/shm")
    assert any("memory" in warning for warning in diagnosed("/dev/shm/actcache-none")["warnings"])


def test_a_bucket_that_is_not_there_and_no_secrets(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "terribly-secret")
    monkeypatch.setenv("AWS_REGION", "nowhere-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    url = "s3://bucket/prefix?endpoint_url=http://127.0.0.1:9&retry_seconds=1"
    result = cachectl("doctor", url)
    assert result.code == 3
    assert "cannot be opened" in result.out
    assert "warning: " in result.out
    assert "nowhere-1" in result.out
    assert "127.0.0.1" in result.out
    assert "terribly" not in result.out


def test_what_reads_rows_is_told(monkeypatch):
    assert diagnosed()["facts"]["machine"]["read path"].startswith("compiled loops")
    monkeypatch.setattr("actcache.io.loops.missing", "no library")
    found = diagnosed()
    assert found["facts"]["machine"]["read path"] == "NumPy: no library"
    assert any("several times slower" in warning for warning in found["warnings"])

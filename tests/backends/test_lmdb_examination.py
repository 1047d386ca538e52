"""Structural damage is found in another process, before anybody reads what would crash him."""

from __future__ import annotations

import os

import pytest

import actcache
from actcache.errors import FormatError
from tests.support import check, put, recipe, run

pytestmark = pytest.mark.processes


def test_an_intact_space(tmp_path):
    with actcache.open(f"lmdb:{tmp_path}/store") as store, store.space(recipe()) as space:
        assert space.verify().intact
        put(space, range(50))
        space.flush()
        assert space.verify().intact
        assert space._driver.examine() == {}


@pytest.mark.parametrize("count", [2, pytest.param(6, marks=pytest.mark.long)])
def test_damage_inside_of_pages_is_an_error_and_no_crash(tmp_path, count):
    """Branch and leaf pages of zeros or noise, in processes of their own: each ends by itself."""
    with actcache.open(f"lmdb:{tmp_path}/store") as store, store.space(recipe()) as space:
        put(space, range(400))
        space.flush()
    (file,) = (tmp_path / "store").glob("spaces/*/lmdb/*/data.mdb")
    whole = file.read_bytes()
    pages = [n for n in range(2, len(whole) // 4096) if whole[n * 4096 + 10] & 0x03]  # branches and leaves
    code = """
import sys, actcache
from actcache.errors import ActcacheError
from tests.support import *
try:
    with actcache.open(sys.argv[1], "r", examine=True) as store:
        space = store.space(recipe())
        found = space.verify()
        print("found", found.damaged, len(found.corrupt))
except ActcacheError as error:
    print("error", type(error).__name__)
"""
    said = []
    for number in pages[:: max(1, len(pages) // count)]:
        file.write_bytes(whole[: number * 4096 + 16] + os.urandom(64) + whole[number * 4096 + 80 :])
        said.append(run(code, tmp_path / "store"))
    assert any("error" in line or "corrupt" in line for line in said), said
    file.write_bytes(whole)
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        assert space.verify().intact
        check(space, dict.fromkeys(range(400), 0), range(405))


def test_after_damage_was_found_nothing_is_read(tmp_path, monkeypatch):
    with actcache.open(f"lmdb:{tmp_path}/store") as store, store.space(recipe()) as space:
        put(space, range(5))
        space.flush()
        from actcache_lmdb import datafile

        monkeypatch.setattr(datafile, "examine", lambda folder: "page 7 is no page")
        with pytest.raises(FormatError, match="page 7"):
            space.verify()

"""Random damage to any file of a store: right numbers, a miss, or an error of ours. Never a hang, nor much memory.

Where the core reads, never a signal either.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests import damage
from tests.backends import each
from tests.support import run

_GOLDEN = {}


@pytest.fixture
def golden(kind, tmp_path_factory):
    """The store that is damaged, made once a backend."""
    if kind.name not in _GOLDEN:
        _GOLDEN[kind.name] = tmp_path_factory.mktemp("golden") / "store"
        damage.make(kind, _GOLDEN[kind.name])
    return _GOLDEN[kind.name]


@pytest.fixture
def work():
    """A folder in memory: thousands of small files are written and removed."""
    folder = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    yield Path(folder)
    shutil.rmtree(folder)


def examine(kind, golden, work, first, last):
    """Damages first..last-1, each in a process of its own: a mapping that goes wrong is a signal there."""
    code = "import sys; from tests.damage import main; main(*sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]))"
    out = run(code, kind.name, golden, work, first, last, timeout=60 + last - first)
    return Counter(json.loads(out.splitlines()[-1]))


@pytest.mark.timeout(250)
@each()
def test_damages(kind, golden, work):
    counts = examine(kind, golden, work / "work", 0, 150)
    # The damages did something, and mostly left the rest alone.
    ways = len(kind.options)
    assert counts["right"] > 150 * ways * 8
    assert counts["absent"] > 20 * ways
    assert counts["corrupt"] > ways
    assert counts["store refused"] + counts["space refused"] > 5 * ways


@pytest.mark.long
@pytest.mark.timeout(3600)
@each()
@pytest.mark.parametrize("part", range(4))
def test_many_damages(kind, golden, work, part):
    print(kind.name, examine(kind, golden, work / "work", 1000 * (part + 1), 1000 * (part + 2)))


@each()
def test_the_store_that_is_damaged_is_whole(kind, golden):
    """The test of the test: without damage, all is read and right."""
    counts = Counter()
    damage.examine(kind, golden, "", counts)
    assert counts == {"right": len(kind.options) * (24 - len(damage.DELETED)), "absent": 0}

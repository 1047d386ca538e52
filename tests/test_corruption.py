"""Random damage to any file of a store: right numbers, a miss, or an error of ours. Never a signal, never a hang."""

from __future__ import annotations

import ast

import pytest

from tests import damage
from tests.support import run


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    root = tmp_path_factory.mktemp("golden") / "store"
    damage.make(root)
    return root


def examine(golden, work, first, last):
    """Damages first..last-1, in a process of its own: a mapping that goes wrong is a signal there."""
    work.mkdir()
    out = run(
        f"from tests.damage import main; main({str(golden)!r}, {str(work)!r}, {first}, {last})",
        timeout=damage.SECONDS * 10,
    )
    return ast.literal_eval(out.splitlines()[-1])


@pytest.mark.timeout(200)
def test_damages(golden, tmp_path):
    counts = examine(golden, tmp_path / "work", 0, 240)
    # The damages did something, and mostly left the rest alone.
    assert counts["right"] > 240 * 2 * 12
    assert counts["absent"] > 150
    assert counts["corrupt"] > 10
    assert counts["store refused"] > 5
    assert counts["space refused"] > 5


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(20))
def test_many_damages(golden, tmp_path, part):
    examine(golden, tmp_path / "work", 1000 * (part + 1), 1000 * (part + 2))


def test_the_store_that_is_damaged_is_whole(golden):
    """The test of the test: without damage, all is read and right."""
    from collections import Counter

    counts = Counter()
    damage.read(golden, "", counts, mapped=True)
    damage.read(golden, "", counts, mapped=False)
    assert counts == {"right": 2 * (24 - len(damage.DELETED)), "absent": 0}

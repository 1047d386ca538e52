"""``cachectl compact`` says how far it is, in bytes."""

from __future__ import annotations

import io
import itertools
import sys

import actcache
from actcache.io.progress import Meter
from tests.cli.running import cachectl
from tests.support import check, key, make_store, put, recipe
from tests.support.backends import each


@each()
def test_bytes_that_are_moved(kind, tmp_path):
    """From nothing to all of them, never back; a compaction that has nothing to do says nothing."""
    url = kind.url(tmp_path / "store")
    make_store(url, range(60), segments=6)
    told = []
    with actcache.open(url) as store, store.space(recipe()) as space:
        put(space, range(20), version=1, overwrite=True)
        space.delete([key(n) for n in range(40, 50)])
        done = space.compact(waste=0.0, grace=0.0, progress=lambda *numbers: told.append(numbers))
        assert done.segments_written
        held = {**dict.fromkeys(range(20, 60), 0), **dict.fromkeys(range(20), 1)}
        check(space, {n: v for n, v in held.items() if not 40 <= n < 50}, range(65))
        rows = space.usage().tokens * 8 * 4
    (total,) = {total for _, total in told}
    assert total >= rows
    assert told[-1] == (total, total)
    assert all(before <= after for (before, _), (after, _) in itertools.pairwise(told))


def test_the_command_shows_them(tmp_path, monkeypatch):
    """Each space is a step; the unit is bytes."""
    make_store(tmp_path / "store", range(60), segments=6)
    shown = io.StringIO()
    seen = []

    class Watched(Meter):
        def __call__(self, step, done, total):
            seen.append((step, done, total))
            super().__call__(step, done, total)
            shown.write(self._rates())

    monkeypatch.setattr(sys.modules["actcache.cli.compact"], "Meter", Watched)
    assert cachectl("compact", tmp_path / "store").code == 0
    assert {step for step, _, _ in seen} == {recipe().fingerprint}
    assert seen[-1][1] == seen[-1][2] > 0
    assert "B/s" in shown.getvalue()


def test_what_stays_for_a_while_is_said(tmp_path):
    make_store(tmp_path / "store", range(60), segments=6)
    before = sum(path.stat().st_size for path in (tmp_path / "store").rglob("segments/*"))
    said = cachectl("compact", tmp_path / "store").out
    assert f"{before / 1024:,.1f} KiB that were replaced stay for 10 min" in said
    assert f"cachectl compact {tmp_path / 'store'} removes them" in said
    assert "stay" not in cachectl("compact", tmp_path / "store", "--grace", 0).out

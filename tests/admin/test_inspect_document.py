"""``cachectl inspect`` of one document, by its text or key: against what was put."""

from __future__ import annotations

import numpy as np
import pytest

import actcache
from actcache.admin import report
from actcache.errors import MissingEntryError
from tests.cli.inspected import COUNT, NAME, damage, filled, strict
from tests.cli.running import cachectl
from tests.support import ids, key, length, make_store, recipe, rows, segment_files
from tests.support.backends import each


@pytest.fixture
def store(tmp_path):
    return filled(tmp_path / "store")


@each()
def test_a_document(kind, tmp_path):
    url = kind.url(tmp_path / "store")
    make_store(url, range(COUNT))
    make_store(url, range(5, 8), layer=2, dtype="float16")
    n = 6
    found = strict(cachectl("inspect", url, "--text", f"document {n}", "--json"))
    assert found["key"] == key(n).hex()
    entries = {one["space"]: one for one in found["entries"]}
    assert set(entries) == {NAME, recipe(layer=2, dtype="float16").fingerprint}
    one = entries[NAME]
    assert (one["tokens"], one["dtype"], one["hidden_size"]) == (length(n), "float32", 8)
    assert one["token_ids"] == ids(n).tolist()
    assert one["nbytes"] == length(n) * (8 * 4 + 4)
    assert one["intact"]
    assert one["statistics"]["mean"] == pytest.approx(rows(n).mean())
    with actcache.open(url, "r") as opened, opened.space(recipe()) as space:
        assert int(one["checksum"], 16) == space.checksums([key(n)])[0]
    names = [
        path.name for path in (tmp_path / "store" / "spaces" / NAME).glob("segments/*" if kind.segmented else "*/*")
    ]
    assert one["segment"] in names
    assert [one["space"] for one in strict(cachectl("inspect", url, "--key", key(29).hex(), "--json"))["entries"]] == [
        NAME
    ]
    for option in (("--key", key(n).hex()), ("--key", key(n).hex()[:11].upper())):
        assert strict(cachectl("inspect", url, *option, "--json")) == found
    only = strict(cachectl("inspect", url, "--text", f"document {n}", "--space", NAME, "--json"))
    assert only["entries"] == [one]
    shown = cachectl("inspect", url, "--text", f"document {n}").out
    for fact in (key(n).hex(), f"{length(n)} tokens x 8 float32", one["segment"], "intact", str(ids(n)[0])):
        assert fact in shown


def test_a_document_with_spans(store):
    spans = np.arange(6).reshape(3, 2)
    with actcache.open(store) as opened, opened.space(recipe()) as space:
        space.put([key(99)], [np.ones((3, 8), np.float32)], spans=[spans], word_ids=[[-1, 0, 1]])
    (one,) = strict(cachectl("inspect", store, "--text", "document 99", "--json"))["entries"]
    assert one["extras"] == {"spans": spans.tolist(), "word_ids": [-1, 0, 1]}
    assert one["token_ids"] is None
    assert one["nbytes"] == 3 * (8 * 4 + 8 + 4)
    assert "spans [0,1] [2,3] [4,5]" in cachectl("inspect", store, "--text", "document 99").out


def test_a_document_in_windows(tmp_path):
    """Found without being told the stride, which a space's recipe does not name."""
    url, changes = tmp_path / "store", {"too_long": "windows", "max_length": 9}
    specs = {3: 4, 0: 2}  # stride -> windows
    with actcache.open(url) as opened, opened.space(recipe(**changes)) as space:
        for stride, count in specs.items():
            put_windows(space, key(0), actcache.windows(9, stride), count)
        put_windows(space, key(1), actcache.windows(9, 3), 1)
    found = strict(cachectl("inspect", url, "--text", "document 0", "--json"))
    seen = [(one["window"]["stride"], one["window"]["number"], one["window"]["last"]) for one in found["entries"]]
    assert seen == [(0, 0, False), (0, 1, True), (3, 0, False), (3, 1, False), (3, 2, False), (3, 3, True)]
    assert [one["tokens"] for one in found["entries"]] == [1, 2, 1, 2, 3, 4]
    keys = actcache.windows(9, 3).keys(key(0), 4)
    assert [one["key"] for one in found["entries"]][2:] == [name.hex() for name in keys]
    assert strict(cachectl("inspect", url, "--key", key(0).hex(), "--json")) == found
    (alone,) = strict(cachectl("inspect", url, "--key", keys[2].hex()[:20], "--json"))["entries"]
    assert (alone["tokens"], alone["window"]) == (3, None)
    shown = cachectl("inspect", url, "--text", "document 1").out
    assert "window 0, the last" in shown
    with actcache.open(url) as opened, opened.space(recipe(**changes)) as space:
        space.delete([keys[1]])
    found = strict(cachectl("inspect", url, "--text", "document 0", "--json"))
    assert [one["window"]["stride"] for one in found["entries"]] == [0, 0, 3]  # as far as they go


def put_windows(space, document, spec, count):
    space.put(spec.keys(document, count), [np.full((1 + n, 8), n + 1, np.float32) for n in range(count)])


def test_documents_that_are_not_there(store):
    line = cachectl("inspect", store, "--text", "another").refused(3)
    assert "has no entry for the text 'another': looked into 1 space" in line
    cachectl("inspect", store, "--key", "0" * 64).refused(3)
    absent = next(f"{n:03x}" for n in range(4096) if not any(key(i).hex().startswith(f"{n:03x}") for i in range(COUNT)))
    assert f"begins with {absent}" in cachectl("inspect", store, "--key", absent).refused(3)
    for wrong in ("", "xyz", "0" * 65, "0x12"):
        assert "hexadecimal" in cachectl("inspect", store, "--key", wrong).refused(2)
    digits = [key(n).hex()[0] for n in range(COUNT)]
    doubled = next(digit for digit in digits if digits.count(digit) > 1)
    assert f"{digits.count(doubled)} keys begin with {doubled}" in cachectl("inspect", store, "--key", doubled).refused(
        2
    )
    cachectl("inspect", store, "--text", "").refused(2)
    with actcache.open(store, "r") as opened, pytest.raises(MissingEntryError):
        report.document_by_text(opened, "another")


def test_a_corrupt_document(store):
    bad = damage(segment_files(store / "spaces" / NAME)[0], 2)
    result = cachectl("inspect", store, "--key", bad.hex(), "--json")
    assert result.code == 4
    (one,) = strict(result)["entries"]
    assert (one["intact"], one["statistics"], one["token_ids"]) == (False, None, None)
    assert "CORRUPT" in cachectl("inspect", store, "--key", bad.hex()).out

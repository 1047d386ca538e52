"""Which entries of a space belong to a document, found by probing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from actcache.errors import MissingEntryError
from actcache.format.keys import Windows, document_key
from actcache.store.document_entries import StoredWindow, check_found, entry_keys, find_entries, stored_windows

SPEC = Windows(16, 4)
WHOLE, SHORT, CUT, ABSENT, HOLED = DOCUMENTS = [document_key(text) for text in ("whole", "short", "cut", "no", "hole")]


class Keys:
    """What is asked of a space; counts the look-ups."""

    def __init__(self, keys):
        self.keys, self.asked = set(keys), 0

    def contains(self, keys):
        self.asked += 1
        return np.array([key in self.keys for key in keys], bool)


@pytest.fixture
def space():
    return Keys(
        [
            *entry_keys(WHOLE, 3, SPEC),
            *entry_keys(SHORT, 1, SPEC),
            *entry_keys(CUT, 3, SPEC)[:2],
            *entry_keys(HOLED, 4, SPEC)[::2],
        ]
    )


def test_documents_that_are_wholly_there(space):
    found = find_entries(space, DOCUMENTS, SPEC)
    assert found == [entry_keys(WHOLE, 3, SPEC), entry_keys(SHORT, 1, SPEC), [], [], []]
    assert space.asked == 3  # one look-up a window, of all documents that go on
    with pytest.raises(MissingEntryError, match=r"3 of 5 documents .* position 2") as caught:
        check_found(DOCUMENTS, found)
    assert caught.value.keys == [CUT, ABSENT, HOLED]


def test_windows_that_are_there(space):
    """Those of incomplete documents, too, up to the first that is missing."""
    found = list(stored_windows(space, DOCUMENTS, SPEC))
    assert [(window.document, window.number) for window in found] == [
        *((0, 0), (1, 0), (2, 0), (4, 0)),
        *((0, 1), (2, 1)),
        (0, 2),
    ]
    assert found[1] == StoredWindow(1, 0, True, SPEC.key(SHORT, 0, last=True))
    assert list(stored_windows(space, [], SPEC)) == []


def test_documents_that_are_not_cut():
    space = Keys([WHOLE])
    assert find_entries(space, [WHOLE, ABSENT], None) == [[WHOLE], []]
    assert entry_keys(WHOLE, 1, None) == [WHOLE]


def test_torch_is_not_needed():
    code = "import sys, actcache.store.document_entries; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

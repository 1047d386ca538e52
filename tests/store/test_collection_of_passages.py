"""Collections whose documents are lists of passages: kept as given, refused where they are none."""

from __future__ import annotations

import numpy as np
import pytest

import actcache
from actcache.errors import FormatError, ShapeError, UsageError
from actcache.format import safetensors
from actcache.store.collection import Collection, _checksum
from tests.support import key

KEYS = [key(n) for n in (4, 2, 4, 9, 2)]
DOCUMENTS, OWN = [0, 0, 1, 1, 3], [[1, 5], [0, 2], [3, 4], [1, 9], [0, 1]]


def test_documents_and_own_tokens_are_kept(tmp_path):
    with actcache.open(tmp_path / "s") as store:
        store.put_collection("c", KEYS, ["a", "a", "b", "b", "c"], documents=DOCUMENTS, own=OWN)
        store.put_collection("plain", KEYS)
        found, plain = store.collection("c"), store.collection("plain")
    assert found.documents.tolist() == DOCUMENTS
    assert found.own.tolist() == OWN
    assert (found.document_count, len(found), found.first.tolist()) == (4, 5, [0, 1, 3])
    assert (plain.documents, plain.own, plain.document_count) == (None, None, 5)
    empty = Collection.of([], documents=[], own=np.empty((0, 2), np.int64))
    assert Collection.from_bytes(empty.to_bytes(), "c").document_count == 0


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"documents": [0, 1]}, ShapeError, "5 keys and documents"),
        ({"documents": [0, 1, 0, 2, 3]}, UsageError, "ascending"),
        ({"documents": [-1, 0, 0, 2, 3]}, UsageError, "from 0 on"),
        ({"documents": [0, 0.5, 1, 2, 3]}, UsageError, "whole numbers"),
        ({"own": [[0, 1]]}, ShapeError, "5 keys and own"),
        ({"own": [[0, 1], [2, 2], [0, 1], [0, 1], [0, 1]]}, UsageError, "none of them empty"),
        ({"own": [[0, 1], [-1, 2], [0, 1], [0, 1], [0, 1]]}, UsageError, "pairs of positions"),
        ({"own": np.zeros((5, 2))}, UsageError, "own are whole numbers"),
    ],
)
def test_what_does_not_fit_the_keys_is_refused(given, error, match):
    with pytest.raises(error, match=match):
        Collection.of(KEYS, **given)


@pytest.mark.parametrize("name", ["documents", "own"])
def test_a_file_that_says_something_else_is_refused(name):
    good = Collection.of(KEYS, documents=DOCUMENTS, own=OWN).to_bytes()
    metadata, arrays = safetensors.loads(good, "c")
    for wrong in (arrays[name][:-1], arrays[name].astype(np.uint8), -arrays[name] - 1):
        changed = {**arrays, name: wrong}
        with pytest.raises(FormatError, match="c"):
            Collection.from_bytes(safetensors.dumps(changed, {**metadata, "checksum": _checksum(changed)}), "c")

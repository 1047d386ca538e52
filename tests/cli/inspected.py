"""What the tests of ``cachectl inspect`` share: a store, its output as JSON, and a flipped bit."""

from __future__ import annotations

import json

import h5py

from tests.support import make_store, recipe

COUNT = 30
NAME = recipe().fingerprint


def strict(result):
    """JSON as RFC 8259 has it: no NaN, no Infinity."""

    def refuse(constant):
        raise AssertionError(constant)

    assert result.code in (0, 4), result.err
    return json.loads(result.out, parse_constant=refuse)


def filled(url):
    """Make a store of 30 documents in three segments; return its URL."""
    make_store(url, range(COUNT), segments=3)
    return url


def damage(path, entry=0):
    """Change one bit of the rows of a segment's entry; return the entry's key."""
    with h5py.File(path) as file:
        begin = file["values"].id.get_offset() + int(file["offsets"][entry]) * 8 * 4
        name = file["keys"][entry].tobytes()
    data = bytearray(path.read_bytes())
    data[begin] ^= 1
    path.write_bytes(data)
    return name

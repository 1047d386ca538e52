"""Prefixes of any characters that an object store's keys can have; those that are refused: ``test_faults``."""

from __future__ import annotations

import uuid

import pytest

from tests.segments.test_strange_names import round_trip

STRANGE = " a b%20 100% #*[a]{b}\\c'\"|<>^`~&;=+@$:é日😀\u200b- /.hidden/a.zarr/%2e%2e"


@pytest.mark.parametrize("how", ["obstore", "s3fs", pytest.param("zarr", marks=pytest.mark.long)])
def test_a_prefix_of_strange_characters(bucket, how):
    options = bucket.options if how == "zarr" else {**bucket.options, "client": how}
    round_trip(f"{'zarr:' if how == 'zarr' else ''}s3://{bucket.name}/{STRANGE}", **options)
    assert bucket.listed() == [
        f"{STRANGE.strip('/')}/{name}" for name in ("actcache.json", "collections/some.safetensors")
    ]


def test_a_name_in_memory_of_strange_characters():
    round_trip(f"memory://{uuid.uuid4().hex}/{STRANGE}")


def test_the_longest_prefix(bucket):
    prefix = "p/" * 399 + "xy"
    round_trip(f"zarr:s3://{bucket.name}/{prefix}", **bucket.options)
    assert f"{prefix}/actcache.json" in bucket.listed()

"""The conformance suite on object stores."""

from __future__ import annotations

import uuid

import fsspec
import pytest

from actcache.testing.conformance import BackendConformance


class TestS3(BackendConformance):
    """Where S3 makes a difference: how objects are listed, made once, replaced, removed; the rest is TestMemory's."""

    everyday = (
        "test_get_returns_what_was_put",
        "test_present_keys_are_skipped_unless_overwritten",
        "test_delete",
        "test_two_writers",
        "test_flushed_entries_are_seen_by_others",
        "test_a_space_is_deleted_with_all_that_belongs_to_it",
        "test_absent_stores_and_spaces",
        "test_read_only",
        "test_closing_flushes",
        "test_blobs",
        "test_collections",
        "test_pickling_carries_the_url_and_the_recipe",
        "test_random_operations_against_a_dictionary",
    )
    steps = 20

    @pytest.fixture
    def url(self, bucket):
        self.options = bucket.options
        return bucket.url


@pytest.mark.long
class TestS3ForLong(TestS3):
    steps = 500


class TestZarrOnS3(BackendConformance):
    """Many objects a segment, each some requests: what that makes a difference to; the rest is TestZarrInMemory's."""

    everyday = ("test_get_returns_what_was_put", "test_two_writers", "test_closing_flushes")

    @pytest.fixture
    def url(self, bucket):
        self.options = bucket.options
        return f"zarr:{bucket.url}"


class TestMemory(BackendConformance):
    @pytest.fixture
    def url(self):
        name = uuid.uuid4().hex
        yield f"memory://{name}/store"
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


class TestZarrInMemory(BackendConformance):
    @pytest.fixture
    def url(self):
        name = uuid.uuid4().hex
        yield f"zarr:memory://{name}/store"
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)

    steps = 40


@pytest.mark.long
class TestZarrInMemoryForLong(TestZarrInMemory):
    steps = 500


class TestSafetensorsInAFolder(BackendConformance):
    @pytest.fixture
    def url(self, tmp_path):
        return f"safetensors:{tmp_path}/store"

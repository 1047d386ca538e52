"""The conformance suite on object stores."""

from __future__ import annotations

import uuid

import fsspec
import pytest

from actcache.testing.conformance import BackendConformance


class TestS3(BackendConformance):
    @pytest.fixture
    def url(self, bucket):
        self.options = bucket.options
        return bucket.url


class TestZarrOnS3(BackendConformance):
    """Many objects a segment, so that the everyday run does without the longest test."""

    @pytest.fixture
    def url(self, bucket):
        self.options = bucket.options
        return f"zarr:{bucket.url}"

    @pytest.mark.long
    def test_random_operations_against_a_dictionary(self, url):
        super().test_random_operations_against_a_dictionary(url)


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

    @pytest.mark.long
    def test_random_operations_against_a_dictionary(self, url):
        super().test_random_operations_against_a_dictionary(url)


class TestSafetensorsInAFolder(BackendConformance):
    @pytest.fixture
    def url(self, tmp_path):
        return f"safetensors:{tmp_path}/store"

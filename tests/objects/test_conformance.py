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


class TestS3WithS3fs(BackendConformance):
    """As in a process that was forked, where obstore cannot work."""

    @pytest.fixture
    def url(self, bucket):
        self.options = {**bucket.options, "client": "s3fs"}
        return bucket.url


class TestZarrOnS3(BackendConformance):
    @pytest.fixture
    def url(self, bucket):
        self.options = bucket.options
        return f"zarr:{bucket.url}"


class TestHDF5OnS3(BackendConformance):
    @pytest.fixture
    def url(self, bucket):
        self.options = bucket.options
        return f"hdf5:{bucket.url}"


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


class TestSafetensorsInAFolder(BackendConformance):
    @pytest.fixture
    def url(self, tmp_path):
        return f"safetensors:{tmp_path}/store"

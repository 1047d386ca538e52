"""The conformance suite on every backend that is installed, and on both ways of reading rows."""

from __future__ import annotations

from typing import ClassVar

import pytest

from actcache.testing.conformance import BackendConformance
from actcache.testing.memory import backend as memory

#: What reads rows.
READING = (
    "test_results_are_aligned_and_misses_explicit",
    "test_an_entry_larger_than_a_segment",
    "test_optional_arrays",
    "test_codecs",
    "test_read_into",
    "test_scatter_into",
    "test_reader",
)


class TestMemory(BackendConformance):
    @pytest.fixture
    def url(self, request):
        name = request.node.name
        yield f"ram:{name}"
        memory.forget(name)


class TestHDF5(BackendConformance):
    @pytest.fixture
    def url(self, tmp_path):
        return f"hdf5:{tmp_path}/store"


class TestHDF5ByReading(TestHDF5):
    """As on a network file system, where a mapping would not be safe."""

    options: ClassVar = {"mapped": False}
    everyday = READING


class TestZarr(BackendConformance):
    @pytest.fixture
    def url(self, tmp_path):
        return f"zarr:{tmp_path}/store"


class TestZarrByReading(TestZarr):
    options: ClassVar = {"mapped": False}
    everyday = READING


class TestDefault(BackendConformance):
    """Which is HDF5."""

    everyday = ("test_closing_flushes", "test_absent_stores_and_spaces", "test_usage")

    @pytest.fixture
    def url(self, tmp_path):
        return str(tmp_path / "store")

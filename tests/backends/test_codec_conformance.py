"""The conformance suite for a lossy codec, a lossless one and one on top of the other, on every backend.

The numbers of the suite are exact in all of them, so everything that it asks holds word for word.
"""

from __future__ import annotations

from tests.backends import test_conformance, test_lmdb_conformance
from tests.segments.objects import test_conformance as objects

#: What reads rows, or moves them.
_READING = (*test_conformance.READING, "test_random_operations_against_a_dictionary")

for _base in (
    test_conformance.TestHDF5,
    test_conformance.TestHDF5ByReading,
    test_conformance.TestZarr,
    test_conformance.TestMemory,
    test_lmdb_conformance.TestLMDB,
    test_lmdb_conformance.TestLMDBGrowing,
    objects.TestMemory,
    objects.TestSafetensorsInAFolder,
    objects.TestZarrInMemory,
):
    for _dtype in ("int8", "float16+zstd", "int8+zstd"):
        _name = f"{_base.__module__.rpartition('.')[0].rpartition('.')[2]}_{_base.__name__}_{_dtype}"
        _every_day = (_base.__name__, _dtype) in {
            ("TestHDF5", "int8"),
            ("TestHDF5ByReading", "float16+zstd"),
            ("TestZarr", "int8+zstd"),
            ("TestLMDB", "int8+zstd"),
            ("TestSafetensorsInAFolder", "float16+zstd"),
        }
        _attributes = {"dtype": _dtype, "steps": 40, "everyday": _READING if _every_day else ()}
        globals()[f"Test_{_name}"] = type(f"Test_{_name}", (_base,), _attributes)

"""The conformance suite on lmdb: with a map that is plenty, with one that has to grow, and with removal at once."""

from __future__ import annotations

from typing import ClassVar

import pytest

from actcache.testing.conformance import BackendConformance

#: What makes the file grow, or removes something from it.
WRITING = (
    "test_get_returns_what_was_put",
    "test_present_keys_are_skipped_unless_overwritten",
    "test_delete",
    "test_two_writers",
    "test_random_operations_against_a_dictionary",
    "test_an_entry_larger_than_a_segment",
    "test_a_space_is_deleted_with_all_that_belongs_to_it",
)


class TestLMDB(BackendConformance):
    @pytest.fixture
    def url(self, tmp_path):
        return f"lmdb:{tmp_path}/store"


class TestLMDBGrowing(TestLMDB):
    options: ClassVar = {"map_size": 1 << 16}
    everyday = WRITING


class TestLMDBRemovingAtOnce(TestLMDB):
    """What was superseded goes with the next transaction: snapshots are renewed all the time."""

    options: ClassVar = {"grace": 0}
    everyday = WRITING

"""The conformance suite on lmdb: with a map that is plenty, with one that has to grow, and with removal at once."""

from __future__ import annotations

from typing import ClassVar

import pytest

from actcache.testing.conformance import BackendConformance


class TestLMDB(BackendConformance):
    @pytest.fixture
    def url(self, tmp_path):
        return f"lmdb:{tmp_path}/store"


class TestLMDBGrowing(TestLMDB):
    options: ClassVar = {"map_size": 1 << 16}


class TestLMDBRemovingAtOnce(TestLMDB):
    """What was superseded goes with the next transaction: snapshots are renewed all the time."""

    options: ClassVar = {"grace": 0}

"""The driver of a segmented space: a catalog, and what is done to its segments."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from actcache.backend import Block, BytesDone, Columns, Compaction, SegmentFormat, SpaceDriver
from actcache.errors import ReadOnlyError
from actcache.segments import compaction, quarantine
from actcache.segments.catalog import Catalog
from actcache.segments.places.place import Place
from actcache.segments.snapshot import SegmentedSnapshot


class SegmentedSpace(SpaceDriver):
    """Implements ``SpaceDriver`` for one folder of segments, ``spaces/<fingerprint>``."""

    def __init__(
        self,
        format: SegmentFormat,
        place: Place,
        fingerprint: str,
        columns: Columns,
        *,
        writable: bool,
        journaled: bool = False,
    ) -> None:
        self.catalog = Catalog(format, place, fingerprint, columns, writable=writable, journaled=journaled)
        self._writable = writable
        self._tiers = compaction.TieredMerge(self.catalog)

    def snapshot(self) -> SegmentedSnapshot:
        return self.catalog.snapshot()

    def append(self, block: Block) -> None:
        self._check_writable()
        name = self.catalog.publish(block)
        if self.merges_tiers:
            with self.catalog.lock:
                self._tiers.add(name, block.tokens)
        self.catalog.index_if_due()

    def delete(self, keys: NDArray[np.uint8]) -> int:
        self._check_writable()
        return self.catalog.delete(keys)

    def compact(
        self, *, target_bytes: int, waste: float, grace: float, progress: BytesDone = lambda done, total: None
    ) -> Compaction:
        self._check_writable()
        with self.catalog.lock:
            done = compaction.compact(self.catalog, target_bytes, waste, grace, progress)
            if done.segments_merged or done.segments_removed:
                self.catalog.snapshot(exact=True)
                self.catalog.write_index()
        return done

    def quarantine(self, keys: NDArray[np.uint8]) -> int:
        self._check_writable()
        return quarantine.quarantine(self.catalog, keys)

    def examine(self) -> dict[str, str]:
        return quarantine.examine(self.catalog)

    def set_aside(self) -> list[str]:
        self._check_writable()
        return quarantine.set_aside(self.catalog)

    def close(self) -> None:
        self.catalog.close()

    def _check_writable(self) -> None:
        if not self._writable:
            raise ReadOnlyError(f"{self.catalog.where} was opened with mode='r'; open the store with mode='a' to write")

"""A place that holds a certain store: nothing is published or removed there once that store has gone.

The folder of a store may be moved, removed or unmounted while it is open, and the objects of a prefix may be deleted.
What would be written afterwards would lie in no store, or in another one that somebody has made there meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.backend import Block, Compaction, SegmentFiles, Snapshot, SpaceDriver, StoredFile
from actcache.errors import StoreGoneError
from actcache.segments.places import marker
from actcache.segments.places.place import Place

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from actcache.segments.rows import RowSource
    from actcache.segments.segment import Segment


class StandingPlace(Place):
    """Wraps a place; see ``Place``. All that changes something looks at the marker first, a small read.

    Args:
        place: where the store lies.
        standing: its marker, as of when it was opened.

    Raises (what changes something):
        StoreGoneError: the store is not there any more; nothing was changed.
    """

    def __init__(self, place: Place, standing: marker.Marker) -> None:
        self.where = place.where
        self._place = place
        self._marker = standing.data

    def check(self) -> None:
        found = self._place.read(marker.NAME)
        if found is None:
            raise StoreGoneError(
                f"the store that was opened at {self.where} is not there any more (there is no {marker.NAME}): it was "
                "moved, removed or unmounted; bring it back, or open it at its new place"
            )
        if found != self._marker:
            raise StoreGoneError(
                f"another store lies at {self.where} than the one that was opened: that one was moved or removed; "
                "bring it back, or open the one that is there now"
            )

    def make(self) -> None:
        self._place.make()

    def names(self, folder: str) -> list[str]:
        return self._place.names(folder)

    def read(self, name: str) -> bytes | None:
        return self._place.read(name)

    def publish(self, name: str, write: Callable[[Path], None], *, replace: bool = False) -> bool:
        self.check()
        return self._place.publish(name, write, replace=replace)

    def publish_bytes(self, name: str, data: bytes, *, replace: bool) -> bool:
        self.check()
        return self._place.publish_bytes(name, data, replace=replace)

    def remove(self, name: str) -> bool:
        self.check()
        return self._place.remove(name)

    def move(self, name: str, target: str) -> bool:
        self.check()
        return self._place.move(name, target)

    def sync_names(self, folder: str) -> None:
        self._place.sync_names(folder)

    def age(self, name: str) -> float | None:
        return self._place.age(name)

    def segment(self, name: str) -> SegmentFiles:
        return self._place.segment(name)

    def local_copy(self, name: str) -> Path:
        return self._place.local_copy(name)

    def rows(self, segments: list[Segment]) -> RowSource:
        return self._place.rows(segments)

    def remove_folder(self, folder: str) -> bool:
        self.check()
        return self._place.remove_folder(folder)

    def listing(self, *, exact: bool) -> dict[str, StoredFile]:
        return self._place.listing(exact=exact)

    def sweep(self, older_than: float) -> int:
        self.check()
        return self._place.sweep(older_than)

    def close(self) -> None:
        self._place.close()


class StandingSpace(SpaceDriver):
    """Wraps an engine's space, whose files do not go through the place; see ``SpaceDriver``.

    A snapshot that was taken before the store went serves what it showed: the engine has its files open.
    """

    def __init__(self, space: SpaceDriver, place: Place) -> None:
        self._space = space
        self._place = place

    @property
    def merges_tiers(self) -> bool:
        return self._space.merges_tiers

    @merges_tiers.setter
    def merges_tiers(self, allowed: bool) -> None:
        self._space.merges_tiers = allowed

    def append(self, block: Block) -> None:
        self._place.check()
        self._space.append(block)

    def delete(self, keys: NDArray[np.uint8]) -> int:
        self._place.check()
        return self._space.delete(keys)

    def snapshot(self) -> Snapshot:
        self._place.check()
        return self._space.snapshot()

    def compact(self, **how: Any) -> Compaction:
        self._place.check()
        return self._space.compact(**how)

    def quarantine(self, keys: NDArray[np.uint8]) -> int:
        self._place.check()
        return self._space.quarantine(keys)

    def examine(self) -> dict[str, str]:
        self._place.check()
        return self._space.examine()

    def set_aside(self) -> list[str]:
        self._place.check()
        return self._space.set_aside()

    def close(self) -> None:
        self._space.close()

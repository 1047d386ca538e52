"""The place where a store lies: named things below a root, each published whole or not at all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from actcache.backend import SegmentFiles, StoredFile
from actcache.segments.rows import RowSource
from actcache.segments.segment import Segment, is_name

T = TypeVar("T")

_LOOKS = 5


class Place(ABC):
    """Names are relative to the root, their parts joined by ``/``; a name is a file's or a whole segment's.

    Thread-safe, and safe beside other processes. Failures of disk or network are raised as ``StoreError`` or one of its
    subclasses; what is said about other exceptions below is all there is.
    """

    where: str  # the root, for messages
    #: Whether it costs requests to look into a segment: an index file is then published along with each.
    indexes_each: bool = False

    @abstractmethod
    def make(self) -> None:
        """Make the root where a place has one that can be absent. Publishing makes none."""

    def check_bucket(self) -> None:  # noqa: B027 (a folder is made where there is none)
        """Raise ``StoreNotFoundError`` where there is nothing that a store could be made in."""

    def check(self) -> None:  # noqa: B027 (a place of its own has nothing to compare with)
        """Raise ``StoreGoneError`` where the store that was opened here is not here any more."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Return the names of the files and complete segments in a folder (``""`` is the root), without the folder's
        own name, sorted; subfolders count as names. Empty where there is no such folder."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Return a small file's bytes, None where there is none."""

    @abstractmethod
    def publish(self, name: str, write: Callable[[Path], object], *, replace: bool = False) -> bool:
        """Have ``write(path)`` write a local file or folder, then give it its name here, durably, all or nothing.

        Returns False where the name stands already and ``replace`` is False; it is left as it is.
        """

    def publish_along(self, name: str, write: Callable[[Path], object]) -> None:
        """Publish what tells of what was published just now: without another look whether the store stands."""
        self.publish(name, write, replace=True)

    @abstractmethod
    def publish_bytes(self, name: str, data: bytes, *, replace: bool) -> bool:
        """Publish a small file."""

    @abstractmethod
    def remove(self, name: str) -> bool:
        """Remove a file or a segment, durably: from the first moment on it is no longer listed, even where this is cut
        short. Return whether it was there."""

    @abstractmethod
    def move(self, name: str, target: str) -> bool:
        """Give a file or segment another name, durably; at each moment one of the two names is complete. Return whether
        it was there."""

    @abstractmethod
    def sync_names(self, folder: str) -> None:
        """Make the names in a folder durable that other processes gave."""

    @abstractmethod
    def age(self, name: str) -> float | None:
        """Return the seconds since something was published, by the place's own clock; None where it is gone."""

    @abstractmethod
    def segment(self, name: str) -> SegmentFiles:
        """Return access to a segment's files; nothing is read yet."""

    def lost(self, folder: str) -> frozenset[str]:
        """Return the names in a folder of segments that were found to be gone while they were read, each once."""
        return frozenset()

    def beginning(self, name: str, nbytes: int, whole: int = 0) -> tuple[bytes, int] | None:
        """Return the first bytes of a file that never changes, or all of one of ``whole`` bytes at most, and its size;
        None where it costs nothing to map all of it. Raises ``FileNotFoundError`` where it is gone."""
        return None

    @abstractmethod
    def local_copy(self, name: str) -> Path:
        """Return the path of a file that can be mapped: the file itself, or a copy that is removed with this object.

        Raises ``FileNotFoundError`` where it is gone.
        """

    @abstractmethod
    def rows(self, segments: list[Segment]) -> RowSource:
        """Return a source for the rows of these segments; the list grows while it is in use."""

    @abstractmethod
    def remove_folder(self, folder: str) -> bool:
        """Remove a folder and all below it, durably; return whether it was there.

        Where the place can rename, it goes at once. Where it cannot, its own files go first, in the order of their
        names but ``recipe.json`` before all, then segments, and tombstones last: what is deleted never comes back, and
        calling this again removes the rest.
        """

    @abstractmethod
    def listing(self, *, exact: bool) -> dict[str, StoredFile]:
        """Return all files below the root by their names, temporary ones included.

        ``exact`` ages go by the place's own clock, even where a temporary file has to be written for that.
        """

    @abstractmethod
    def sweep(self, older_than: float) -> int:
        """Remove what killed writers left behind (temporary files, unfinished uploads) that is older than so many
        seconds; return how many things were removed."""

    @abstractmethod
    def close(self) -> None:
        """Release connections and local copies. Does nothing the second time."""


def unique_names(place: Place, folder: str, suffix: str) -> list[str]:
    """Return the names in a folder without their suffix, sorted; foreign names are not ours to read."""
    names = place.names(folder)
    return sorted(stem for name in names if name.endswith(suffix) and is_name(stem := name.removesuffix(suffix)))


def steady(look: Callable[[], tuple[T, bool]]) -> T:
    """Return what ``look`` sees; again, some times, while it says that other processes have replaced what it listed."""
    for _ in range(_LOOKS):
        seen, whole = look()
        if whole:
            break
    return seen

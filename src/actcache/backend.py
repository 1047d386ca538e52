"""The plug-in contracts: what a backend implements, and nothing else.

A backend is an object behind an entry point of the group ``actcache.backends`` whose name is the scheme of its URLs. It
is one of three things:

- a ``SegmentFormat``: writes one immutable ragged block to a file or directory and says where its arrays lie. The core
  brings naming, publication, the index, tombstones, compaction and the reading of extents, in a folder or on an object
  store. The hdf5, zarr and s3 backends are such.
- a ``SpaceEngine``: keeps one space in a folder in its own way (``SpaceDriver``, ``Snapshot``); the core brings the
  store around it. The lmdb backend is one.
- a ``Backend``: brings a whole store of its own (``StoreDriver`` as well). The in-memory oracle
  ``actcache.testing.memory`` is one.

``actcache.testing.conformance`` is the suite that each has to pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of what is stored, the contracts name these; so backends find them here.
from actcache.format.checksum import Expected as Expected
from actcache.format.ragged import EXTRAS as EXTRAS
from actcache.format.ragged import OWN as OWN
from actcache.format.ragged import TOKEN_IDS as TOKEN_IDS
from actcache.format.ragged import VALUES as VALUES
from actcache.format.ragged import Block as Block
from actcache.format.ragged import Extent as Extent
from actcache.format.ragged import placed
from actcache.io.loops import Placing as Placing

#: The dtype and trailing shape that each ragged array of a space has, by name. ``OWN`` comes when it is declared, while
#: the space is open; no entry has it before.
Columns = Mapping[str, tuple[str, tuple[int, ...]]]

# --- segment formats: how a library lays one immutable block out in files ---------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What a segment says about itself."""

    extents: Mapping[str, Extent]  # by the names of ``Block.arrays``
    metadata: Mapping[str, str]  # what ``SegmentFormat.write`` was given


class SegmentFiles(ABC):
    """The files of one segment, for reading, wherever it lies. Thread-safe."""

    where: str  # how an error names the segment
    path: Path | None  # None on an object store

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of its files relative to the segment, sorted; ``[""]`` where it is one file.

        Raises:
            FormatError: it holds links or pipes, or more files than a segment has.
            FileNotFoundError: the segment is gone.
        """

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the bytes of a file. Raises as ``names``; ``FormatError`` also where the segment has no such file."""

    @abstractmethod
    def read(self, name: str, offset: int, nbytes: int) -> bytes:
        """Return ``nbytes`` bytes of a file, fewer where it ends before. Raises as ``size`` does."""


class SegmentFormat(ABC):
    """Writes and describes one kind of segment. Stateless and thread-safe."""

    name: str  # the backend's name, recorded in the store
    suffix: str  # of segment names, with the dot
    commit: str = ""  # where a segment is several files: the one that an object store is given last

    @abstractmethod
    def write(self, path: Path, block: Block, metadata: Mapping[str, str]) -> None:
        """Write a block and its metadata to ``path``, which does not exist yet.

        The core has the files synced and the name published afterwards; a crash in between leaves nothing visible.
        Where the arrays are files of their own, ``path`` becomes a directory. ``OSError`` passes through.
        """

    @abstractmethod
    def layout(self, files: SegmentFiles) -> Layout:
        """Return where each array of a segment lies, and its metadata.

        Trusts nothing it reads: no memory is allocated by a size that the file declares. The core checks the extents
        against the size of the file.

        Raises:
            FormatError: this is no segment of this format, or it is damaged.
            FileNotFoundError: the segment is gone.
        """


# --- snapshots: what is visible at one moment -------------------------------------------------------------------------


@dataclass(frozen=True)
class EntryLocations:
    """Where the entries of a batch of keys are; arrays aligned with the request, ``[n]`` each.

    ``segment`` and ``row`` are the backend's own; the core only hands them back.
    """

    tokens: NDArray[np.int64]  # 0 where the key is absent
    checksums: NDArray[np.uint64]
    segment: NDArray[np.int64]
    row: NDArray[np.int64]

    @property
    def found(self) -> NDArray[np.bool_]:
        return self.tokens > 0

    def __getitem__(self, which: slice | NDArray[np.generic]) -> EntryLocations:
        return EntryLocations(self.tokens[which], self.checksums[which], self.segment[which], self.row[which])


@dataclass(frozen=True)
class Usage:
    """What a space holds."""

    entries: int
    tokens: int
    nbytes: int
    segments: int


#: Name of a ragged array -> C-contiguous buffer in the stored dtype, for the rows of a whole batch; in the order of
#: ``format.checksum.ORDER``.
Buffers = Mapping[str, NDArray[np.generic]]


class Snapshot(ABC):
    """An immutable view of a space. Thread-safe; stays valid until its space is closed."""

    @abstractmethod
    def locate(self, keys: NDArray[np.uint8]) -> EntryLocations:
        """Look up ``[n, 32]`` keys in one go."""

    @abstractmethod
    def has(self, column: str, located: EntryLocations) -> NDArray[np.bool_]:
        """Return which entries have that ragged array, ``[n]``; False where the key is absent."""

    def have(self, column: str) -> bool | None:
        """Return whether every entry of the space has that ragged array, or none; None where only some have it, or that
        is not known at once."""
        return None

    def may_have(self, column: str) -> bool:
        """Return False where no entry of the space has that ragged array, as far as that is known at once."""
        return True

    @abstractmethod
    def extra_checksums(self, located: EntryLocations) -> NDArray[np.uint64]:
        """Return the checksums of the optional arrays, ``[n]``; 0 where there are none."""

    @abstractmethod
    def gather(
        self, located: EntryLocations, out: Buffers, width: int | None, expected: Expected | None
    ) -> NDArray[np.int64]:
        """Read the rows of ``located``'s entries into the buffers of ``out``; return the positions of bad ones.

        Args:
            out: what is read, and where it goes. With ``width`` None, entry i's rows follow those of entry i-1
                (packed); else they begin at row ``i * width`` and are followed by zeros.
            expected: what each entry's digests have to be; None where nothing is verified. A backend that reads by
                ``actcache.io.loops.gather`` passes its ``digests`` on, any other ends with its ``wrong``.

        Raises:
            SegmentGoneError: what was located is no longer there; a new snapshot will know more.
            FormatError: a segment is too small for what the index says.
            KeyError: an entry has no array of that name.
        """

    def place(
        self, located: EntryLocations, out: Buffers, placing: Placing, expected: Expected | None
    ) -> NDArray[np.int64]:
        """Read rows as ``gather`` does, but activations not one after another; returns and raises what that does.

        Where a backend has nothing faster, they are read packed first.

        Args:
            out: the buffer of ``values`` may have rows that lie apart, each contiguous; the others are packed.
            placing: how the rows of ``values`` get into their buffer.
        """
        return placed(out, {VALUES: placing}, located.tokens, lambda rows: self.gather(located, rows, None, expected))

    def read_at_once(
        self,
        keys: NDArray[np.uint8],
        out: Buffers,
        width: int | None,
        seed: int | None,
        placing: Placing | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Look up ``[n, 32]`` keys and read their rows as ``gather`` does, in one go; a backend that cannot has none.

        Args:
            seed: of the digests that entries are compared with (``format.checksum.chain_seed``); None: nothing is
                verified.
            placing: how the rows of ``values`` get into their buffer, as of ``place``; None: one after another.

        Returns:
            The tokens of each entry, ``[n]``, 0 where it is absent, and the positions of bad ones. None where
            ``locate`` and ``gather`` have to be called instead: nothing that ``out`` holds then means anything.
        """
        return None

    @abstractmethod
    def read_ahead(self, located: EntryLocations) -> bool:
        """Ask the operating system to load the rows of these entries soon; a hint, returns at once.

        Return False where there seemed to be nothing to ask for, as all is in memory: who reads on then says less of
        what comes, and reads one batch at a time.
        """

    @abstractmethod
    def keys(self) -> NDArray[np.uint8]:
        """Return the distinct live keys, ``[n, 32]``, in the order of their bytes."""

    @abstractmethod
    def usage(self) -> Usage: ...

    @abstractmethod
    def damaged(self) -> dict[str, str]:
        """Return segments that could not be read, name -> what is wrong; their entries are absent."""

    def whereabouts(self, located: EntryLocations) -> tuple[list[str], NDArray[np.int64]]:
        """Return names of segments (or of an engine's own files), and which of them holds each entry, ``[n]``.

        A segment's file is named so in the store's listing, but for its suffix; -1 where an entry is absent. A backend
        without segments returns no names and -1 throughout.
        """
        return [], np.full(len(located.tokens), -1, np.int64)


# --- drivers: a space, and a store of spaces --------------------------------------------------------------------------

#: How long a replaced segment stays for readers that have it in a snapshot.
GRACE_SECONDS = 600.0

#: Told how many bytes are done and how many there are to do.
BytesDone = Callable[[int, int], None]


@dataclass(frozen=True)
class Compaction:
    """What a compaction did."""

    segments_merged: int = 0
    segments_written: int = 0
    segments_removed: int = 0  # after their grace period
    bytes_freed: int = 0


class SpaceDriver(ABC):
    """One space of a store. ``append`` and ``delete`` are called from one thread at a time, ``snapshot`` from any."""

    #: Whether ``append`` may merge small segments on the way. For ten minutes what it merged lies there twice.
    merges_tiers: bool = True

    @abstractmethod
    def append(self, block: Block) -> None:
        """Make a block visible, all of it or nothing; it is durable when this returns.

        Where a key stands already, the new entry is the one that later snapshots serve.
        """

    @abstractmethod
    def delete(self, keys: NDArray[np.uint8]) -> int:
        """Delete every stored copy of these keys, durably; return how many of the keys were there."""

    @abstractmethod
    def snapshot(self) -> Snapshot:
        """Return a view of all that is visible now."""

    def compact(
        self, *, target_bytes: int, waste: float, grace: float, progress: BytesDone = lambda done, total: None
    ) -> Compaction:
        """Give back space and join what is scattered; readers, writers and other compactors may be at work.

        Args:
            target_bytes: of rows, about what a merged segment gets at most.
            waste: the share of deleted or overwritten rows from which on a segment is rewritten.
            grace: seconds for which what was replaced stays, for readers that still use it.
            progress: told now and then how many bytes are moved and how many there are to move.

        A backend that has nothing to compact need not implement it.
        """
        return Compaction()

    def quarantine(self, keys: NDArray[np.uint8]) -> int:
        """Take corrupt entries out of the space, their bytes kept aside where the backend can; return how many."""
        return self.delete(keys)

    def examine(self) -> dict[str, str]:
        """Look at every segment anew, trusting no index; return which are damaged, name -> what is wrong."""
        return self.snapshot().damaged()

    def set_aside(self) -> list[str]:
        """Move damaged segments (see ``examine``) out of the way, after saving what can be; return their names."""
        return []

    @abstractmethod
    def close(self) -> None:
        """Release files and memory; may tidy up. Does nothing the second time."""


@dataclass(frozen=True)
class StoredFile:
    """A file or object of a store, as it lies."""

    nbytes: int
    age: float  # seconds since it was last written; infinite where readers write to it, too
    owner: str | None = None  # the user whose file it is, where the place knows


class StoreDriver(ABC):
    """A root that holds spaces and small named blobs (recipes, canaries, collections). Thread-safe."""

    #: Tells the store from another one that lies at the same place later; empty where a backend cannot tell.
    identity: bytes = b""

    @abstractmethod
    def read_blob(self, name: str) -> bytes | None:
        """Return a blob, None where there is none."""

    @abstractmethod
    def write_blob(self, name: str, data: bytes, *, replace: bool) -> bool:
        """Write a blob durably, all or nothing; return False where it stands and ``replace`` is False."""

    @abstractmethod
    def delete_blob(self, name: str) -> bool:
        """Delete a blob durably; return whether it was there."""

    @abstractmethod
    def blobs(self, prefix: str) -> list[str]:
        """Return the names of the blobs in the folder ``prefix`` (without subfolders), sorted."""

    @abstractmethod
    def spaces(self) -> list[str]:
        """Return the fingerprints of the spaces, sorted."""

    @abstractmethod
    def space(self, fingerprint: str, columns: Columns) -> SpaceDriver:
        """Open a space whose recipe blob was written."""

    @abstractmethod
    def delete_space(self, fingerprint: str) -> bool:
        """Delete a space with all that belongs to it, durably; return whether it was there.

        Whenever this is cut short, the space is either whole, or has no recipe and is no longer a space; calling it
        again removes the rest. Readers that have it open find its entries absent. What a writer publishes later is a
        new space's, whose recipe is written again.
        """

    @abstractmethod
    def listing(self) -> dict[str, StoredFile]:
        """Return every file of the store, temporary ones included, by its name below the root (parts joined by ``/``).

        A backend without files names what it holds in the same way.
        """

    def sweep(self, older_than: float) -> int:
        """Remove what killed writers left behind that is older than so many seconds; return how many things."""
        return 0

    @abstractmethod
    def close(self) -> None:
        """Release everything. Does nothing the second time."""


# --- engines and backends: what an entry point names ------------------------------------------------------------------


class SpaceEngine(ABC):
    """A plug-in that keeps each space in a local folder in its own way; the rest is the core's. Thread-safe."""

    name: str  # the backend's name, recorded in the store
    options: frozenset[str] = frozenset()  # names of the keyword options that ``actcache.open`` takes for it
    locks: frozenset[str] = frozenset()  # names of files that readers write to, whose age says nothing

    def check_folder(self, root: Path) -> None:  # noqa: B027 (most can work anywhere)
        """Refuse, when a store is opened, a root where this engine cannot work (a network file system, say).

        Raises ``StoreError``, saying what to use instead.
        """

    @abstractmethod
    def open(self, folder: Path, columns: Columns, *, writable: bool, options: Mapping[str, Any]) -> SpaceDriver:
        """Open the space that is kept in ``folder``; an empty one where the folder has nothing of this engine's.

        The folder may hold files of the core too (``recipe.json``) and may not exist yet.
        """


class Backend(ABC):
    """A plug-in with a store of its own."""

    name: str

    @abstractmethod
    def open(self, location: str, *, mode: str, options: Mapping[str, Any]) -> StoreDriver:
        """Open the store at ``location`` (the URL without its scheme).

        Args:
            mode: ``"r"`` reads an existing store, ``"a"`` also writes and creates it.
            options: the caller's keyword options, for this backend alone.

        Raises:
            StoreNotFoundError, NotAStoreError, ReadOnlyError, FormatVersionError.
        """

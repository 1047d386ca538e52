"""A space: all entries of one recipe."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache import checksum, codec
from actcache.arrays import to_buffer
from actcache.backend import TOKEN_IDS, VALUES, Block, Snapshot, SpaceDriver, Usage
from actcache.entry import Entry, ReadReport, check_digits, check_lists, columns_of, encode_entry, listed
from actcache.errors import ClosedError, CorruptEntryError, ReadOnlyError, ShapeError
from actcache.key import Keys, key_array, key_list
from actcache.lastuse import LastUse
from actcache.lookahead import Lookahead
from actcache.maintenance import Maintained
from actcache.ragged import offsets_of
from actcache.reader import Reader
from actcache.recipe import Recipe
from actcache.request import Request, looking_again
from actcache.writer import Writer

if TYPE_CHECKING:
    from actcache.store import Store


_SPACES: weakref.WeakSet[Space] = weakref.WeakSet()
_CLOSED = "the space is closed; open it again with store.space(recipe)"


class Space(Maintained):
    """Made by ``Store.space``. Any number of threads may read and write; writes take turns.

    Reads see what this object has put, flushed or not, and what other processes had flushed when the space was opened,
    last flushed, or last refreshed.
    """

    def __init__(
        self, store: Store, driver: SpaceDriver, recipe: Recipe, *, created: bool, segment_bytes: int, seconds: float
    ) -> None:
        self.recipe = recipe  #: as stored by whoever created the space
        self.created = created  #: whether this call created it
        self._store = store
        self._codec = codec.get(recipe.dtype, recipe.via)
        self._columns = columns_of(recipe)
        self._seed = checksum.space_seed(recipe.fingerprint, recipe.dtype, recipe.hidden_size)
        self._segments: dict[str, Any] = {"segment_bytes": segment_bytes, "segment_seconds": seconds}
        self._used = LastUse(store.driver, recipe.fingerprint, writable=store.writable)
        self._closed = False
        self._open(driver)
        _SPACES.add(self)

    def _open(self, driver: SpaceDriver) -> None:
        self._driver = driver
        self._write_lock = threading.RLock()
        self._snapshot_lock = threading.Lock()
        self._writer: Writer | None = None
        if self._store.writable:
            self._writer = Writer(self._append, self._columns, self._seed, **self._segments)
        self._snapshot: Snapshot | None = driver.snapshot()
        self._ahead = Lookahead()
        self._forked = False

    def _take_snapshot(self) -> None:
        # One after the other: the older of two would hide what the writer has published and forgotten meanwhile.
        with self._snapshot_lock:
            self._snapshot = self._driver.snapshot()

    def after_fork(self) -> None:
        """Have a fork's child open everything anew: the parent's threads, locks and pending entries are not its."""
        self._write_lock = threading.RLock()
        self._forked = True

    # --- writing -----------------------------------------------------------------------------------------------------

    def put(
        self,
        keys: Keys,
        arrays: Sequence[Any],
        token_ids: Sequence[Any] | None = None,
        *,
        spans: Sequence[Any] | None = None,
        word_ids: Sequence[Any] | None = None,
        type_ids: Sequence[Any] | None = None,
        overwrite: bool = False,
    ) -> int:
        """Store entries: all that are new, or, where anything is wrong with one of them, none.

        Args:
            keys: of the documents, each once.
            arrays: one ``[tokens, hidden]`` floating point array or tensor a key, on any device, in the dtype that the
                rows were computed in.
            token_ids: one ``[tokens]`` array a key.
            spans, word_ids, type_ids: optional arrays, ``[tokens, 2]``, ``[tokens]`` and ``[tokens]``.
            overwrite: whether to replace what is there; else keys that are present are skipped.

        Returns:
            How many were stored. They are durable after ``flush``.

        Raises:
            KeyFormatError: a key is none, or stands twice.
            ShapeError: numbers of arrays, shapes or dtypes do not fit the recipe; see ``actcache.entry.check_digits``.
            NonFiniteError, CodecOverflowError: an array holds NaN or infinity, or a value too large for the codec.
            StoreError: read-only, disk full, ...
        """
        given = {TOKEN_IDS: token_ids, "spans": spans, "word_ids": word_ids, "type_ids": type_ids}
        lists = {VALUES: listed(VALUES, arrays)}
        lists |= {name: listed(name, rows) for name, rows in given.items() if rows is not None}
        check_digits(lists[VALUES], self.recipe)
        return self._put(keys, lists, self._codec, overwrite=overwrite)

    def _put(self, keys: Keys, lists: Mapping[str, Sequence[Any]], stored_as: codec.Codec, *, overwrite: bool) -> int:
        writer = self._writing()
        all_keys = key_array(keys)
        names = key_list(all_keys)
        check_lists(names, lists)
        with self._write_lock:
            wanted = np.ones(len(all_keys), bool) if overwrite else ~self.contains(all_keys)
            which = np.flatnonzero(wanted).tolist()
            encoded = [encode_entry(names[i], lists, i, self._columns, stored_as) for i in which]
            for i, stored in zip(which, encoded, strict=True):
                writer.add(names[i], stored)
        return len(encoded)

    def _append(self, block: Block) -> None:
        self._driver.append(block)
        self._store.describe(self.recipe)  # it may have been deleted under us
        self._take_snapshot()  # before the writer forgets the block

    def flush(self) -> None:
        """Make everything that was put durable, and visible to others.

        Raises:
            StoreError: the disk is full, ...; nothing is lost, a later flush tries again.
            StoreGoneError: the store was moved or removed; once it is back, a later flush stores what was put.
        """
        writer, before = self._writing(), self._snapshot
        writer.flush()
        if self._snapshot is before:  # else it was taken just now, after the last block was published
            self.refresh()

    def delete(self, keys: Keys) -> int:
        """Delete entries, durably; return how many of the keys were there."""
        wanted = key_array(keys)
        with self._write_lock:
            self._writing().flush()
            count = self._driver.delete(wanted)
            self.refresh()
        return count

    # --- reading -----------------------------------------------------------------------------------------------------

    @looking_again
    def get(self, keys: Keys, *, verify: bool = True) -> list[Entry | None]:
        """Return the entries of the keys, in their order; None where there is none.

        Raises:
            CorruptEntryError: entries fail their checksums; it names them.
        """
        wanted = key_array(keys)
        request = self._request(wanted)
        total = int(request.lengths.sum())
        values = np.empty((total, self.recipe.hidden_size), self._codec.stored)
        ids = np.empty(total, np.int32)
        corrupt = set(request.read({VALUES: values, TOKEN_IDS: ids}, None, verify=verify))
        offsets, has_ids = offsets_of(request.lengths).tolist(), request.has(TOKEN_IDS)
        entries: list[Entry | None] = []
        for i, (begin, end) in enumerate(itertools.pairwise(offsets)):
            if begin == end:
                entries.append(None)
                continue
            extras, intact = request.read_extras(i)
            if not intact:
                corrupt.add(i)
            entries.append(Entry(self._codec.decode(values[begin:end]), ids[begin:end] if has_ids[i] else None, extras))
        self._refuse_corrupt(wanted, corrupt)
        return entries

    @looking_again
    def read_into(self, keys: Keys, out: Any, *, token_ids: Any = None, verify: bool = True) -> ReadReport:
        """Read rows in the stored dtype straight into the caller's buffer.

        Args:
            out: NumPy array or CPU tensor, C-contiguous: ``[rows, hidden]`` to have the entries packed one after
                another (absent ones take no rows), or ``[n, length, hidden]`` to have each padded with zeros.
            token_ids: int32, ``[rows]`` or ``[n, length]``: filled alike.
            verify: whether to check the entries' checksums.

        Raises:
            ShapeError: a buffer is too small or of the wrong dtype. Nothing was read.
            CorruptEntryError: it names the entries; the rows of all others are in place.
        """
        wanted = key_array(keys)
        buffer = to_buffer(out, self._codec.stored, "out")
        ids = None if token_ids is None else to_buffer(token_ids, np.dtype(np.int32), "token_ids")
        hidden = self.recipe.hidden_size
        if buffer.ndim not in (2, 3) or buffer.shape[-1] != hidden:
            raise ShapeError(f"out must be [rows, {hidden}] or [n, length, {hidden}], not {list(buffer.shape)}")
        if ids is not None and ids.shape != buffer.shape[:-1]:
            raise ShapeError(f"token_ids must be {list(buffer.shape[:-1])} beside this out, not {list(ids.shape)}")
        request = self._request(wanted)
        width = buffer.shape[1] if buffer.ndim == 3 else None
        longest, total = int(request.lengths.max(initial=0)), int(request.lengths.sum())
        if width is None and total > len(buffer):
            raise ShapeError(f"these entries have {total} rows and out has {len(buffer)}")
        if width is not None and (longest > width or len(wanted) > len(buffer)):
            raise ShapeError(
                f"{len(wanted)} entries of up to {longest} tokens do not fit an out of {list(buffer.shape)}"
            )
        flat_ids = np.empty(buffer.size // hidden, np.int32) if ids is None else ids.reshape(-1)
        if ids is not None and not request.has(TOKEN_IDS)[request.lengths > 0].all():
            raise ShapeError("some of these entries were stored without token ids; leave token_ids out")
        rows = {VALUES: buffer.reshape(-1, hidden), TOKEN_IDS: flat_ids}
        self._refuse_corrupt(wanted, request.read(rows, width, verify=verify))
        return ReadReport(request.lengths)

    def read_ahead(self, keys: Keys) -> None:
        """Ask the operating system to load these entries soon; returns at once."""
        snapshot = self._view()
        snapshot.read_ahead(self._ahead.locate(snapshot, key_array(keys)))

    def lengths(self, keys: Keys) -> NDArray[np.int64]:
        """Return the tokens of each entry, ``[n]`` int64, 0 where it is absent."""
        return self._request(key_array(keys)).lengths

    def has(self, column: str, keys: Keys) -> NDArray[np.bool_]:
        """Return which entries have a ragged array (``token_ids``, ``spans``, ``word_ids``, ``type_ids``), ``[n]``."""
        return self._request(key_array(keys)).has(column)

    def checksums(self, keys: Keys) -> NDArray[np.uint64]:
        """Return each entry's checksum, ``[n]``: other contents have another; 0 where it is absent or not published."""
        return self._request(key_array(keys)).checksums

    def contains(self, keys: Keys) -> NDArray[np.bool_]:
        """Return which keys are there, ``[n]``."""
        return self.lengths(keys) > 0

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and bool(self.contains([key])[0])

    def keys(self) -> Iterator[bytes]:
        """Iterate over the keys, unpublished ones included."""
        return iter(key_list(self.key_array()))

    def key_array(self) -> NDArray[np.uint8]:
        """Return all keys as ``[n, 32]`` uint8, sorted."""
        self._check_open()
        pending = self._writer.keys() if self._writer is not None else []
        return np.unique(np.concatenate([self._view().keys(), key_array(pending)]), axis=0)

    def __len__(self) -> int:
        return len(self.key_array())

    def refresh(self) -> None:
        """See what other processes have flushed or deleted since."""
        self._check_open()
        self._take_snapshot()

    def usage(self) -> Usage:
        """Return how many entries, tokens, bytes and segments are published."""
        return self._view().usage()

    def damaged(self) -> dict[str, str]:
        """Return segments that could not be read, name -> what is wrong; their entries are absent."""
        return self._view().damaged()

    def reader(self, keys: Keys, **options: Any) -> Reader:
        """Iterate over entries in batches; see ``actcache.reader.Reader`` for the options."""
        return Reader(self, keys, **options)

    # --- closing -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Flush and release everything. Does nothing the second time."""
        if self._closed:
            return
        if self._forked:  # in a fork's child that has done nothing with it, there is nothing to close
            self._closed = True
            self._store.forget(self)
            return
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            self._closed = True
            self._store.forget(self)
            self._snapshot = None
            self._driver.close()

    def __enter__(self) -> Space:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return self._store.space, (self.recipe,)  # what travels is the store's URL and the recipe, never a handle

    def __repr__(self) -> str:
        return f"<Space {self.recipe.fingerprint} of {self.recipe.model} layer {self.recipe.layer}>"

    def _request(self, keys: NDArray[np.uint8]) -> Request:
        self._check_open()  # before the writer is looked at: a fork has another
        self._used.note()
        return Request(self._view, self._writer, self._seed, keys, self._ahead)

    def _refuse_corrupt(self, keys: NDArray[np.uint8], corrupt: Sequence[int] | set[int]) -> None:
        if corrupt:
            bad = key_list(keys[sorted(corrupt)])
            raise CorruptEntryError(
                f"{len(bad)} of {len(keys)} entries fail their checksum, the first is {bad[0].hex()}: "
                "space.delete(error.keys) makes them misses, fill computes them again",
                bad,
            )

    def _view(self) -> Snapshot:
        self._check_open()
        if (snapshot := self._snapshot) is None:  # another thread closed it just now
            raise ClosedError(_CLOSED)
        return snapshot

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(_CLOSED)
        if self._forked:
            with self._write_lock:
                if self._forked:
                    self._open(self._store.driver.space(self.recipe.fingerprint, self._columns))

    def _writing(self) -> Writer:
        self._check_open()
        if self._writer is None:
            raise ReadOnlyError("the store was opened with mode='r'; open it with mode='a' to write")
        return self._writer


def _after_fork() -> None:
    for space in list(_SPACES):
        space.after_fork()


os.register_at_fork(after_in_child=_after_fork)

"""A space: all entries of one recipe, put, read, looked up, checked and mended."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache import backend
from actcache.backend import OWN, TOKEN_IDS, VALUES, Block, Snapshot, StoreDriver
from actcache.entries import entry
from actcache.entries.entry import Entry, OwnColumns, PackedEntries, ReadReport
from actcache.entries.incoming import Incoming, Lists, Packed, check_digits, check_distinct
from actcache.entries.read import LookupCache, Request, retry_on_stale_snapshot
from actcache.entries.writer import SEGMENT_BYTES, Writer, Written
from actcache.errors import ClosedError, CorruptEntryError, FormatError, ReadOnlyError, ShapeError, UsageError
from actcache.format import checksum, codec
from actcache.format.arguments import check_choice, dtype_name, to_buffer, whole
from actcache.format.columns import Schema, as_arrays
from actcache.format.keys import Keys, key_array, key_list
from actcache.format.moments import Moments
from actcache.format.ragged import PAYLOAD, offsets_of, row_indices, runs
from actcache.format.recipe import Recipe
from actcache.io import loops
from actcache.io.loops import Placing, Pooled, Scattered
from actcache.io.notebook import Shown, table
from actcache.io.workers import available_cpus
from actcache.reader.pooling import pooled
from actcache.reader.reader import Reader
from actcache.reader.rows import RowReader
from actcache.store import contributions
from actcache.store.contributions import Contribution
from actcache.store.description import space_blob, write_recipe
from actcache.store.last_use import LastUse
from actcache.store.own_columns import DeclaredColumns
from actcache.store.statistics import KeptStatistics

COMPACT_BYTES = 2 << 30

_PART_BYTES = 16 << 20  # read and checked at once by a thread
_CLOSED = "the space is closed; open it again with store.space(recipe)"
_SPACES: weakref.WeakSet[Space] = weakref.WeakSet()

Progress = Callable[[int, int], None]  # called with the entries that have been checked and how many there are


@dataclass(frozen=True)
class IntegrityReport(Shown):
    """What ``verify`` found."""

    entries: int  # that were read and checked
    nbytes: int  # of their activations
    corrupt: list[bytes] = field(default_factory=list)  # keys of entries that fail their checksums
    damaged: dict[str, str] = field(default_factory=dict)  # segments that cannot be read, name -> what is wrong

    @property
    def intact(self) -> bool:
        return not self.corrupt and not self.damaged


@dataclass(frozen=True)
class Repair(Shown):
    """What ``repair`` did."""

    quarantined: list[bytes]  # keys of corrupt entries, which are misses now
    set_aside: list[str]  # segments that could not be read, which are out of the way now


class Space:
    """Made by ``Store.space``. Any number of threads may read and write; writes take turns.

    Reads see what this object has put, flushed or not, and what other processes had flushed when the space was opened,
    last flushed, or last refreshed.
    """

    def __init__(
        self,
        driver: StoreDriver,
        recipe: Recipe,
        *,
        created: bool,
        stands: bool,
        writable: bool,
        segment_bytes: int,
        segment_seconds: float,
        reopen: Callable[[Recipe], Space],
        on_close: Callable[[Space], object],
    ) -> None:
        self.recipe = recipe  #: as stored by whoever created the space
        self.created = created  #: whether this call created it, or what is stored first will
        self._stands = stands
        self._store = driver
        self._reopen, self._on_close = reopen, on_close
        if codec.get(recipe.dtype).compressed:
            loops.zstd_is_compiled()  # says what to install, where it takes something
        self._codec, self._put_as = codec.get(recipe.dtype), codec.get(recipe.dtype, recipe.via)
        self._columns = dict(entry.columns_of(recipe))
        self._given = {**self._columns, VALUES: ("", (recipe.hidden_size,))}  # as callers give them
        self._seed = checksum.space_seed(recipe.fingerprint, recipe.dtype, recipe.hidden_size)
        self._writable = writable
        self._segments: dict[str, Any] = {"segment_bytes": segment_bytes, "segment_seconds": segment_seconds}
        self._statistics = KeptStatistics(driver, recipe, writable=writable)
        self._known: tuple[weakref.ref[Snapshot], Moments] | None = None  # statistics of a snapshot
        self._used = LastUse(driver, recipe.fingerprint, writable=writable and stands)
        self._closed = False
        self._open()
        _SPACES.add(self)

    def _open(self) -> None:
        self._columns.pop(OWN, None)
        compressed = {PAYLOAD: ("|u1", ())} if self._codec.compressed else {}
        self._stored = {**self._columns, **compressed}  # which the driver looks into: a schema may come
        self._own = DeclaredColumns(self._store, self.recipe.fingerprint, (self._columns, self._given, self._stored))
        self._driver = self._store.space(self.recipe.fingerprint, self._stored)
        self._write_lock = threading.RLock()
        self._snapshot_lock = threading.Lock()
        self._writer: Writer | None = None
        if self._writable:
            self._writer = Writer(self._append, self._columns, self._seed, **self._segments)
        self._snapshot: Snapshot | None = self._driver.snapshot()
        self._own.look(self._snapshot)
        self._lookups = LookupCache()
        self._forked = False

    def _take_snapshot(self) -> None:
        # One after the other: the older of two would hide what the writer has published and forgotten meanwhile.
        with self._snapshot_lock:
            snapshot = self._driver.snapshot()
            self._own.look(snapshot)
            self._snapshot = snapshot

    def after_fork(self) -> None:
        """Have a fork's child open everything anew: the parent's threads, locks and pending entries are not its."""
        self._write_lock = threading.RLock()
        self._forked = True

    # --- writing -----------------------------------------------------------------------------------------------------

    @property
    def stands(self) -> bool:
        """Whether the space is there; one that was opened ``late`` is not before something is stored in it."""
        return self._stands

    def make(self) -> None:
        """Have the space stand in the store, durably, though nothing is stored in it yet."""
        if not self._stands:
            write_recipe(self._store, self.recipe)
            self._stands = True
            self._used = LastUse(self._store, self.recipe.fingerprint, writable=self._writable)

    def put(
        self,
        keys: Keys,
        arrays: Sequence[Any],
        token_ids: Sequence[Any] | None = None,
        *,
        spans: Sequence[Any] | None = None,
        word_ids: Sequence[Any] | None = None,
        type_ids: Sequence[Any] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        overwrite: bool = False,
    ) -> int:
        """Store entries: all that are new, or, where anything is wrong with one of them, none.

        Args:
            keys: of the documents, each once.
            arrays: one ``[tokens, hidden]`` floating point array or tensor a key, on any device, in the dtype that the
                rows were computed in.
            token_ids: one ``[tokens]`` array a key.
            spans, word_ids, type_ids: optional arrays, ``[tokens, 2]``, ``[tokens]`` and ``[tokens]``.
            columns: arrays of the caller's own, by name: one ``[tokens, ...]`` array a key, of any dtype of fixed size.
                A space has one set of them, that of the first entries that have any.
            overwrite: whether to replace what is there; else keys that are present are skipped.

        Returns:
            How many were stored. They are durable after ``flush``.

        Raises:
            KeyFormatError: a key is none, or stands twice.
            ShapeError: numbers of arrays, shapes or dtypes do not fit the recipe (``entries.incoming.check_digits``).
            NonFiniteError, CodecOverflowError: an array holds NaN or infinity, or a value too large for the codec.
            UsageError: other columns than this space has; a column's name is taken, or its dtype an object.
            StoreError: read-only, disk full, ...
        """
        given = {TOKEN_IDS: token_ids, "spans": spans, "word_ids": word_ids, "type_ids": type_ids}
        lists = Lists({VALUES: arrays} | {name: rows for name, rows in given.items() if rows is not None})
        check_digits({f"array {i}": array for i, array in enumerate(lists.lists[VALUES])}, self.recipe)
        if columns is not None:
            self.make()  # the columns are declared in it
            lists = lists.beside(OWN, self._own.lists(key_array(keys), lists.lists[VALUES], columns))
        return self._put(keys, lists, self._put_as, overwrite=overwrite)

    def put_packed(
        self,
        keys: Keys,
        values: Any,
        offsets: Any,
        token_ids: Any = None,
        *,
        spans: Any = None,
        word_ids: Any = None,
        type_ids: Any = None,
        columns: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> int:
        """Store entries whose rows follow one another in one array: all that are new, or, where anything is wrong with
        one of them, none. Faster than ``put``: no step is taken a document.

        Args:
            keys: of the documents, each once; best as ``[n, 32]`` uint8.
            values: ``[T, hidden]`` floating point, an array or tensor, on any device, in the dtype that the rows were
                computed in.
            offsets: ``[n + 1]`` whole numbers from 0 to T: entry i has rows ``offsets[i]:offsets[i + 1]``, one or more.
            token_ids: ``[T]``.
            spans, word_ids, type_ids: optional arrays, ``[T, 2]``, ``[T]`` and ``[T]``.
            columns: arrays of the caller's own, by name, ``[T, ...]``; see ``put``.
            overwrite: whether to replace what is there; else keys that are present are skipped.

        Returns:
            How many were stored. They are durable after ``flush``. The arrays are the caller's again.

        Raises:
            KeyFormatError, ShapeError, NonFiniteError, CodecOverflowError, StoreError: as ``put``; also offsets that do
                not cut the rows into entries are a ``ShapeError``.
        """
        given = {TOKEN_IDS: token_ids, "spans": spans, "word_ids": word_ids, "type_ids": type_ids}
        check_digits({VALUES: values}, self.recipe)
        packed = Packed({VALUES: values} | {name: rows for name, rows in given.items() if rows is not None}, offsets)
        if columns is not None:
            self.make()
            packed = packed.beside(OWN, self._own.records(as_arrays(columns), len(packed.arrays[VALUES])))
        return self._put(keys, packed, self._put_as, overwrite=overwrite)

    def put_stored(self, keys: Keys, columns: Mapping[str, NDArray[Any]], offsets: NDArray[np.int64]) -> int:
        """Store entries that come from a space of this recipe, in stored form; what is there is skipped. ``put`` would
        round the rows once more to what the recipe says.

        Args:
            keys: each once.
            columns: the ragged arrays by name, ``values`` among them, as ``read_packed`` returns them.
            offsets: ``[n + 1]``, as those of ``put_packed``.

        Raises:
            ShapeError: an array is of another shape or dtype than this space stores.
            FormatError: rows hold what no writer stores.
        """
        names, writer = key_array(keys), self._writing()
        check_distinct(names)
        for name, array in columns.items():
            dtype, trailing = self._columns[name]
            if array.dtype.str != dtype or array.shape != (offsets[-1], *trailing):
                wanted = f"{np.dtype(dtype)} {[int(offsets[-1]), *trailing]}"
                raise ShapeError(f"{name} is {array.dtype} {list(array.shape)}, and the space stores {wanted}: use put")
        if len(self._codec.stray(columns[VALUES])) or not np.isfinite(self._codec.decode(columns[VALUES])).all():
            raise FormatError("these rows hold infinity, NaN, or a scale that is none: no writer stores such rows")
        with self._write_lock:
            fresh = np.flatnonzero(~self.contains(names))
            lengths = np.diff(offsets)[fresh]
            rows = row_indices(offsets[:-1][fresh], lengths, None)

            def fill(out: Mapping[str, NDArray[Any]]) -> None:
                for name, buffer in out.items():
                    buffer[:] = columns[name][rows]

            writer.add(names[fresh], lengths, frozenset(columns), fill)
        return len(fresh)

    # --- the caller's own columns ------------------------------------------------------------------------------------

    @property
    def schema(self) -> Schema | None:
        """The caller's own columns; None where no entry has any."""
        return self._own.schema

    @property
    def ragged(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and trailing shape of each ragged array that an entry may have."""
        return dict(self._columns)

    def declare(self, schema: Schema) -> Schema:
        """Have the space's own columns be these, durably; return what they are: those of whoever came first."""
        self._writing()
        self.make()
        return self._own.declare(schema)

    @retry_on_stale_snapshot
    def read_columns(self, keys: Keys) -> OwnColumns:
        """Return the caller's own columns of the entries, packed, verified; their rows are not read.

        ``CorruptEntryError`` names entries that fail the checksum of their optional arrays.
        """
        wanted = key_array(keys)
        found, corrupt = self._own.read(self._request(wanted), self._columns)
        self._refuse_corrupt(wanted, corrupt.tolist())
        return found

    def put_block(self, block: Block) -> None:
        """Publish entries that are in stored form already, as one segment; durable when this returns.

        For whoever has read them, verified, under an equal recipe: nothing is looked at, computed or copied. What
        stands here under one of the keys is replaced. ``StoreError``: nothing of the block is there.
        """
        with self._write_lock:
            self._writing().flush()  # what was put before is older
            self._append(block)

    def _put(self, keys: Keys, given: Incoming, stored_as: codec.Codec, *, overwrite: bool) -> int:
        writer = self._writing()
        names = key_array(keys)
        check_distinct(names)
        given.check(len(names))
        with self._write_lock:
            wanted = np.ones(len(names), bool) if overwrite else ~self.contains(names)
            fresh = np.flatnonzero(wanted)
            if not len(fresh):
                return 0
            lengths, encode = given.encoding(fresh, names, self._given, stored_as)
            writer.add(names[fresh], lengths, given.columns, encode)
        return len(fresh)

    def _append(self, block: Block) -> None:
        self.make()
        self._driver.append(block)
        self._statistics.note(block)
        write_recipe(self._store, self.recipe)  # it may have been deleted under us
        self._take_snapshot()  # before the writer forgets the block

    def _writing(self) -> Writer:
        self._check_open()
        if self._writer is None:
            raise ReadOnlyError("the store was opened with mode='r'; open it with mode='a' to write")
        return self._writer

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

    @property
    def written(self) -> Written:
        """What was put through this object, and how much of it is durable by now. Entries become durable in the order
        in which they were put."""
        return self._writing().written

    def delete(self, keys: Keys) -> int:
        """Delete entries, durably; return how many of the keys were there."""
        wanted = key_array(keys)
        with self._write_lock:
            self._writing().flush()
            count = self._driver.delete(wanted)
            self.refresh()
        return count

    # --- reading -----------------------------------------------------------------------------------------------------

    @retry_on_stale_snapshot
    def get(self, keys: Keys, *, dtype: str | None = None, verify: bool = True) -> list[Entry | None]:
        """Return the entries of the keys, in their order; None where there is none.

        Args:
            dtype: of the activations: ``float32``, ``float16``; None for the stored one where NumPy has it and it is a
                float, else float32.
            verify: whether to check the entries' checksums.

        Raises:
            CorruptEntryError: it names entries that fail their checksums.
            CodecOverflowError: a number is too large for float16.
        """
        if dtype is not None:
            dtype = dtype_name(dtype)
            check_choice("dtype", dtype, ("float32", "float16"))
        wanted = key_array(keys)
        packed, corrupt = self._read_all(self._request(wanted), verify=verify)
        self._refuse_corrupt(wanted, corrupt)
        rows = self._numbers(packed.columns[VALUES], dtype)
        has = {name: there.tolist() for name, there in packed.has.items()}
        entries: list[Entry | None] = []
        for i, (begin, end) in enumerate(itertools.pairwise(packed.offsets.tolist())):
            others = {name: packed.columns[name][begin:end] for name, there in has.items() if there[i]}
            own = others.pop(OWN, None)
            mine = {} if own is None or self.schema is None else self.schema.unpack(own)
            entries.append(Entry(rows[begin:end], others.pop(TOKEN_IDS, None), others, mine) if end > begin else None)
        return entries

    def _numbers(self, stored: NDArray[Any], dtype: str | None) -> NDArray[Any]:
        if dtype is None or dtype == self._codec.form:
            return self._codec.decode(stored)
        out = np.empty((len(stored), self.recipe.hidden_size), dtype)
        codec.decode_as(self._codec, stored, dtype, out)
        return out

    @retry_on_stale_snapshot
    def read_packed(self, keys: Keys) -> PackedEntries:
        """Return the entries of the keys in stored form, as few large arrays; ``CorruptEntryError`` as of ``get``."""
        wanted = key_array(keys)
        packed, corrupt = self._read_all(self._request(wanted), verify=True)
        self._refuse_corrupt(wanted, corrupt)
        return packed

    @retry_on_stale_snapshot
    def read_into(
        self, keys: Keys, out: Any, *, token_ids: Any = None, dtype: str | None = None, verify: bool = True
    ) -> ReadReport:
        """Read rows straight into the caller's buffer, in stored form or as numbers of any float dtype.

        Args:
            out: NumPy array or CPU tensor, C-contiguous: ``[rows, hidden]`` to have the entries packed one after
                another (absent ones take no rows), or ``[n, length, hidden]`` to have each padded with zeros.
            token_ids: int32, ``[rows]`` or ``[n, length]``: filled alike.
            dtype: of ``out``: ``float32``, ``float16`` or ``bfloat16`` (NumPy: its bits, uint16); None for stored form,
                whose rows have other columns than ``hidden`` where they are codes with scales (docs/codecs.md).
            verify: whether to check the entries' checksums.

        Raises:
            ShapeError: a buffer is too small or of the wrong dtype. Nothing was read.
            CorruptEntryError: it names the entries; the rows of all others are in place.
            CodecOverflowError: a number is too large for ``dtype``.
        """
        wanted = key_array(keys)
        if dtype is not None:
            dtype = dtype_name(dtype)
            check_choice("dtype", dtype, codec.FLOATS)
        as_stored = dtype is None or dtype == self._codec.form
        buffer = to_buffer(out, self._codec.stored if as_stored else codec.get(str(dtype)).stored, "out")
        ids = None if token_ids is None else to_buffer(token_ids, np.dtype(np.int32), "token_ids")
        stored_width = self._columns[VALUES][1][0]
        columns = stored_width if as_stored else self.recipe.hidden_size
        if buffer.ndim not in (2, 3) or buffer.shape[-1] != columns:
            raise ShapeError(f"out must be [rows, {columns}] or [n, length, {columns}], not {list(buffer.shape)}")
        if ids is not None and ids.shape != buffer.shape[:-1]:
            raise ShapeError(f"token_ids must be {list(buffer.shape[:-1])} beside this out, not {list(ids.shape)}")
        width = buffer.shape[1] if buffer.ndim == 3 else None
        flat = buffer.reshape(-1, columns)
        flat_ids = np.empty(len(flat), np.int32) if ids is None else ids.reshape(-1)
        rows = {TOKEN_IDS: flat_ids, VALUES: flat}  # in the order of the chain of digests
        if as_stored and (lengths := self._read_at_once(wanted, rows, width, verify=verify)) is not None:
            self._refuse_corrupt(wanted, self._stray(lengths, flat, width))
            return ReadReport(lengths)
        request = self._request(wanted)
        longest, total = int(request.lengths.max(initial=0)), int(request.lengths.sum())
        if width is None and total > len(buffer):
            raise ShapeError(f"these entries have {total} rows and out has {len(buffer)}")
        if width is not None and (longest > width or len(wanted) > len(buffer)):
            raise ShapeError(
                f"{len(wanted)} entries of up to {longest} tokens do not fit an out of {list(buffer.shape)}"
            )
        count = total if width is None else len(wanted) * width
        stored = flat if as_stored else np.empty((count, stored_width), self._codec.stored)
        if ids is not None and not request.has(TOKEN_IDS)[request.lengths > 0].all():
            raise ShapeError("some of these entries were stored without token ids; leave token_ids out")
        corrupt = self._read(request, {VALUES: stored, TOKEN_IDS: flat_ids}, width, verify=verify)
        if not as_stored:
            begins = offsets_of(request.lengths) if width is None else np.arange(len(wanted) + 1) * width
            for i in corrupt:
                stored[begins[i] : begins[i + 1]] = 0  # what stands there may be no rows
            try:
                codec.decode_as(self._codec, stored, str(dtype), flat[:count])
            finally:
                self._refuse_corrupt(wanted, corrupt)
        self._refuse_corrupt(wanted, corrupt)
        return ReadReport(request.lengths)

    @retry_on_stale_snapshot
    def scatter_into(
        self,
        keys: Keys,
        out: NDArray[Any],
        targets: NDArray[np.int64],
        *,
        token_ids: NDArray[np.int32] | None = None,
    ) -> ReadReport:
        """Read rows in stored form to places all over the caller's buffer: row j of all that is read, one entry after
        another, becomes ``out[targets[j]]``. So rows are mixed by the one copy that brings them.

        Args:
            out: ``[room, ...]`` in the stored dtype, rows as wide as they are stored, each contiguous; they may lie
                apart (``array[:, 3]``).
            targets: int64 ``[rows]``, each number once.
            token_ids: int32 ``[rows]``, filled one entry after another.

        Raises:
            ShapeError: a buffer is of another dtype or width, or there are more or fewer targets than rows. What is in
                the buffers means nothing.
            IndexError: ``out`` has no such row.
            CorruptEntryError: it names the entries; the rows of all others are in place.
        """
        wanted, width = key_array(keys), self._columns[VALUES][1][0]
        if out.dtype != self._codec.stored or out.shape[1:] != (width,) or out.strides[-1] != out.itemsize:
            raise ShapeError(f"out must be {self._codec.stored} [room, {width}], not {out.dtype} {list(out.shape)}")
        lengths = self._place(wanted, out, Scattered(targets), len(targets), token_ids)
        if self._codec.form not in codec.FLOATS:
            stray = self._codec.stray_among(out, targets)
            self._refuse_corrupt(wanted, _entries_of(stray, offsets_of(lengths)))
        return ReadReport(lengths)

    @retry_on_stale_snapshot
    def pool_into(
        self, keys: Keys, out: NDArray[Any], how: str, rows: int, *, at: NDArray[np.int64] | None = None
    ) -> ReadReport:
        """Read one row of each entry, without bringing the others anywhere. Of spaces that store numbers (float32,
        float16, bfloat16), compressed or not.

        Args:
            out: ``[n, hidden]``, C-contiguous. Rows of absent entries are left alone.
            how: see ``actcache.io.loops.Pooled``: float32 for ``"mean"`` and ``"max"``, else the stored dtype.
            rows: how many all these entries have together.
            at: int64 ``[n]`` positions, from 0.

        Raises:
            ShapeError: a buffer is of another dtype or shape, or there are more or fewer rows.
            IndexError: an entry has no such position.
            CorruptEntryError: it names the entries; the rows of all others are in place.
        """
        wanted, form = key_array(keys), self._codec.form
        if form not in codec.FLOATS:
            raise UsageError(f"rows of {form} are decoded before they are pooled: use pooled()")
        dtype = self._codec.stored if how == "at" else np.dtype(np.float32)
        if out.dtype != dtype or out.shape != (len(wanted), self.recipe.hidden_size) or not out.flags.c_contiguous:
            raise ShapeError(f"out must be {dtype} [{len(wanted)}, {self.recipe.hidden_size}], contiguous")
        return ReadReport(self._place(wanted, out, Pooled(how, form, at), rows, None))

    def _place(
        self,
        keys: NDArray[np.uint8],
        out: NDArray[Any],
        placing: Placing,
        total: int,
        token_ids: NDArray[np.int32] | None,
    ) -> NDArray[np.int64]:
        """Read entries that have so many rows together to where they belong; return their lengths."""
        ids = np.empty(total, np.int32) if token_ids is None else to_buffer(token_ids, np.dtype(np.int32), "token_ids")
        if ids.shape != (total,):
            raise ShapeError(f"token_ids must be [{total}], not {list(ids.shape)}")
        rows: dict[str, NDArray[Any]] = {TOKEN_IDS: ids, VALUES: out}  # in the order of the chain of digests
        if (lengths := self._read_at_once(keys, rows, None, placing, verify=True)) is not None:
            _check_total(lengths, total)
            return lengths
        request = self._request(keys)
        _check_total(request.lengths, total)
        if token_ids is not None and not request.has(TOKEN_IDS)[request.lengths > 0].all():
            raise ShapeError("some of these entries were stored without token ids; leave token_ids out")
        self._refuse_corrupt(keys, request.place(rows, placing, verify=True))
        return request.lengths

    def _read(self, request: Request, out: dict[str, NDArray[Any]], width: int | None, *, verify: bool) -> list[int]:
        """Read entries; return the positions of those that are corrupt, or hold what no writer stores."""
        corrupt = request.read(out, width, verify=verify)
        return sorted({*corrupt, *self._stray(request.lengths, out.get(VALUES), width)})

    def _stray(self, lengths: NDArray[np.int64], rows: NDArray[Any] | None, width: int | None) -> list[int]:
        """Return the positions of entries that hold what no writer stores, of packed or padded stored rows."""
        if rows is None:
            return []
        starts = offsets_of(lengths, width)
        return _entries_of(self._codec.stray(rows[: starts[-1]]), starts)

    def _read_at_once(
        self,
        keys: NDArray[np.uint8],
        out: backend.Buffers,
        width: int | None,
        placing: Placing | None = None,
        *,
        verify: bool,
    ) -> NDArray[np.int64] | None:
        """Read what is published, verified and in memory by one call; None where it takes more (see ``Request``)."""
        self._check_open()
        if self._writer is not None and len(self._writer):
            return None  # then the snapshot: a block that is published in between is in it
        seed = checksum.chain_seed(self._seed, out) if verify else None
        read = self._view().read_at_once(keys, out, width, seed, placing)
        if read is None:
            return None
        self._used.note()
        lengths, corrupt = read
        if len(corrupt):
            self._refuse_corrupt(keys, corrupt.tolist())
        return lengths

    def read_ahead(self, keys: Keys) -> bool:
        """Ask the operating system to load these entries soon; returns at once. False where there seemed to be nothing
        to ask for."""
        snapshot = self._view()
        return snapshot.read_ahead(self._lookups.locate(snapshot, key_array(keys)))

    def reader(self, keys: Keys, **options: Any) -> Reader:
        """Iterate over entries in batches; see ``actcache.Reader`` for the options."""
        return Reader(self, keys, **options)

    def rows(self, keys: Keys | None = None, **options: Any) -> RowReader:
        """Iterate over rows ``[n, hidden]``, mixed across documents (all of them, if no keys are given); see
        ``actcache.reader.rows.RowReader`` for the options."""
        return RowReader(self, keys, **options)

    def pooled(self, keys: Keys | None = None, how: Any = "mean", *, out: Any = None) -> NDArray[np.float32]:
        """Return one row a document, ``[documents, hidden]`` float32, in the order of the keys: what a probe or search
        wants. Documents are read as they lie, some MiB at a time, and nothing else is kept of them.

        Args:
            keys: of the documents; None for all, in the order of ``key_array``.
            how: ``"last"`` token, ``"mean"`` or ``"max"`` (by dimension) of all tokens; or a position for all
                documents, or one each, negative ones counted from the end.
            out: float32 ``[documents, hidden]`` to write into, a mapped file say; None makes it.

        Raises:
            MissingEntryError, CorruptEntryError: they name the entries.
            UsageError, ShapeError: ``how`` is none of these; a document has no such position; ``out`` does not fit.
        """
        return pooled(self, self.key_array() if keys is None else key_array(keys), how, out)

    def _request(self, keys: NDArray[np.uint8]) -> Request:
        self._check_open()  # before the writer is looked at: a fork has another
        self._used.note()
        return Request(self._view, self._writer, self._seed, keys, self._lookups)

    def _read_all(self, request: Request, *, verify: bool) -> tuple[PackedEntries, list[int]]:
        """Read all arrays of some entries; return them, and the positions of entries that are corrupt."""
        has = {name: request.has(name) for name in self._columns if name != VALUES}
        has = {name: there for name, there in has.items() if there.any()}
        columns = {name: column for name, column in self._columns.items() if name == VALUES or name in has}
        total = int(request.lengths.sum())
        out = {name: np.empty((total, *trailing), dtype) for name, (dtype, trailing) in columns.items()}
        corrupt = self._read(request, out, None, verify=verify)
        return PackedEntries(request.lengths, out, has), corrupt

    def _refuse_corrupt(self, keys: NDArray[np.uint8], corrupt: list[int]) -> None:
        if corrupt:
            bad = key_list(keys[corrupt])
            raise CorruptEntryError(
                f"{len(bad)} of {len(keys)} entries fail their checksum, the first is {bad[0].hex()}: "
                "space.delete(error.keys) makes them misses, fill computes them again",
                bad,
            )

    # --- looking up --------------------------------------------------------------------------------------------------

    def lengths(self, keys: Keys) -> NDArray[np.int64]:
        """Return the tokens of each entry, ``[n]`` int64, 0 where it is absent."""
        return self._request(key_array(keys)).lengths

    def has(self, column: str, keys: Keys) -> NDArray[np.bool_]:
        """Return which entries have a ragged array (``token_ids``, ``spans``, ``word_ids``, ``type_ids``), or a column
        of the caller's own, ``[n]``."""
        if self.schema is not None and column in self.schema.names:
            column = OWN
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

    def in_order(self, keys: Keys) -> NDArray[np.uint8]:
        """Return keys as ``[n, 32]`` in the order in which their published entries lie, absent ones first."""
        wanted = key_array(keys)
        return wanted[self.order_of(wanted)]

    def order_of(self, keys: Keys) -> NDArray[np.int64]:
        """Return the positions of keys in the order in which their published entries lie, absent ones first."""
        located = self._view().locate(key_array(keys))
        return np.lexsort((located.row, located.segment))

    @retry_on_stale_snapshot
    def stored_checksums(self, keys: Keys) -> NDArray[np.uint64]:
        """Return tokens, checksum and checksum of the optional arrays of each published entry, ``[n, 3]``; 0 where
        it is absent or has none. Reads no activations."""
        view = self._view()
        located = view.locate(key_array(keys))
        columns = (located.tokens.astype(np.uint64), located.checksums, view.extra_checksums(located))
        return np.stack(columns, axis=1) * located.found[:, None]

    @retry_on_stale_snapshot
    def whereabouts(self, keys: Keys) -> tuple[list[str], NDArray[np.int64]]:
        """Return names of segments, and which of them holds each published entry, ``[n]``; -1 where it is absent. See
        ``Snapshot.whereabouts``."""
        view = self._view()
        return view.whereabouts(view.locate(key_array(keys)))

    @retry_on_stale_snapshot
    def statistics(self) -> Moments:
        """Return what all rows are on the whole: how many, mean, variance and maximum by dimension, mean norm.

        They are made while rows are written; rows of which none are kept are read, once. What was put is flushed first.
        ``CorruptEntryError`` names entries that cannot be counted.
        """
        if self._writer is not None and len(self._writer):
            self.flush()
        view = self._view()
        if self._known is None or self._known[0]() is not view:
            self._known = weakref.ref(view), self._look_at_rows(view)
        return self._known[1]

    def kept_statistics(self) -> Moments:
        """Return the statistics of those published rows whose are kept; ``count`` says how many. Reads no rows."""
        view = self._view()
        return self._statistics.kept(view.locate(view.keys()).checksums)

    def _look_at_rows(self, view: Snapshot) -> Moments:
        keys = view.keys()
        located = view.locate(keys)
        order = np.lexsort((located.row, located.segment))
        return self._statistics.of(located.checksums, located.tokens, order, lambda some: self._scan(view, keys[some]))

    def _scan(self, view: Snapshot, keys: NDArray[np.uint8]) -> NDArray[np.generic]:
        """Return the stored rows of published entries, verified."""
        packed, corrupt = self._read_all(Request(lambda: view, None, self._seed, keys), verify=True)
        self._refuse_corrupt(keys, corrupt)
        return packed.columns[VALUES]

    def usage(self) -> backend.Usage:
        """Return how many entries, tokens, bytes and segments are published."""
        return self._view().usage()

    def damaged(self) -> dict[str, str]:
        """Return segments that could not be read, name -> what is wrong; their entries are absent."""
        return self._view().damaged()

    def refresh(self) -> None:
        """See what other processes have flushed or deleted since."""
        self._check_open()
        self._take_snapshot()

    def _view(self) -> Snapshot:
        self._check_open()
        if (snapshot := self._snapshot) is None:  # another thread closed it just now
            raise ClosedError(_CLOSED)
        return snapshot

    # --- looking after it --------------------------------------------------------------------------------------------

    def verify(self, progress: Progress | None = None, *, sample: int | None = None) -> IntegrityReport:
        """Read every stored entry and compare it with its checksum, on all processors; changes nothing.

        Segments are looked at without the help of an index, too. ``sample`` entries are drawn at random; None for all.

        Raises:
            UsageError: ``sample`` is no whole number of 0 or more.
            FormatError: nothing of the space can be read safely (lmdb).
        """
        if sample is not None:
            sample = whole("sample", sample, 0)
        damaged = self._driver.examine()  # first: what is damaged there may be unsafe to read
        self.refresh()
        keys = self._view().keys()
        if sample is not None and sample < len(keys):
            keys = keys[np.random.default_rng().choice(len(keys), sample, replace=False)]
        corrupt, nbytes = self.corrupt_among(keys, progress)
        return IntegrityReport(len(keys), nbytes, corrupt, damaged)

    def corrupt_among(self, keys: Keys, progress: Progress | None = None) -> tuple[list[bytes], int]:
        """Read published entries on all processors; return which fail their checksums, and the bytes of rows read."""
        keys = self.in_order(keys)
        nbytes = self._view().locate(keys).tokens * self.recipe.row_bytes
        parts = [keys[part] for part in runs(nbytes, _PART_BYTES)]
        corrupt: list[bytes] = []
        checked = 0
        with ThreadPoolExecutor(available_cpus(), thread_name_prefix="actcache-verify") as pool:
            futures = [pool.submit(self._corrupt, part) for part in parts]
            try:
                for part, future in zip(parts, futures, strict=True):
                    corrupt += key_list(part[future.result()])
                    checked += len(part)
                    if progress is not None:
                        progress(checked, len(keys))
            finally:
                for future in futures:
                    future.cancel()
        return corrupt, int(nbytes.sum())

    @retry_on_stale_snapshot
    def _corrupt(self, keys: NDArray[np.uint8]) -> list[int]:
        """Return the positions of published entries that fail their checksums; absent ones do not."""
        view = self._view()  # one for all: another might know of other arrays
        return self._read_all(Request(lambda: view, None, self._seed, keys), verify=True)[1]

    @retry_on_stale_snapshot
    def salvaged_ids(self, keys: Keys) -> list[NDArray[np.int32] | None]:
        """Return the token ids of published entries as they lie, intact or not; None where there are none to be read.

        An entry's checksum is over ids and rows together: of a corrupt entry, nothing here says that the ids are right.
        """
        request = Request(self._view, None, self._seed, key_array(keys))
        has, offsets = request.has(TOKEN_IDS), offsets_of(request.lengths)
        ids = np.empty(int(offsets[-1]), np.int32)
        lost = set(request.read({TOKEN_IDS: ids}, None, verify=False))
        cuts = enumerate(itertools.pairwise(offsets.tolist()))
        return [ids[begin:end] if has[i] and i not in lost else None for i, (begin, end) in cuts]

    def repair(self, found: IntegrityReport | None = None) -> Repair:
        """Quarantine what is corrupt: such entries become misses, which a fill computes again; the bytes are kept.

        ``found`` is what ``verify`` said; None verifies first. What has been mended since is left alone.
        ``StoreError``: read-only, disk full, ...; nothing is lost.
        """
        self._writing()
        found = self.verify() if found is None else found
        with self._write_lock:
            corrupt = key_array(found.corrupt)
            if len(corrupt):
                self._driver.examine()  # no index has a say in what is deleted
                self.refresh()
                corrupt = corrupt[self._corrupt(corrupt)]
            if len(corrupt):
                self._driver.quarantine(corrupt)
            repair = Repair(key_list(corrupt), self._driver.set_aside() if found.damaged else [])
            self.refresh()
        return repair

    def merge_tiers(self, allowed: bool) -> None:
        """Say whether this object's writer may merge its own small segments on the way, as by default. For ten minutes,
        for those who read them, what it merged lies there twice; what stays is for ``compact``."""
        self._driver.merges_tiers = allowed

    def compact(
        self,
        *,
        target_bytes: int = COMPACT_BYTES,
        waste: float = 0.1,
        grace: float = backend.GRACE_SECONDS,
        progress: backend.BytesDone = lambda done, total: None,
    ) -> backend.Compaction:
        """Join small segments, and give back the space of deleted and overwritten entries.

        Others may read, write and compact at the same time. Memory: some tens of MiB, and 200 bytes an entry.

        Args:
            target_bytes: of activations, about what a merged segment gets at most.
            waste: the share of deleted or overwritten rows from which on a segment is rewritten.
            grace: seconds for which what was replaced stays, for readers that still use it.
            progress: called with the bytes that are moved and how many there are to move.

        Raises:
            StoreError: read-only, disk full, ...; nothing is lost.
            UsageError: ``target_bytes`` is no whole number, or ``grace`` is negative.
        """
        if not grace >= 0:  # a replacement that is gone would count as old enough
            raise UsageError(f"grace is a number of seconds, 0 or more, not {grace}")
        target_bytes = whole("target_bytes", target_bytes, 1)
        with self._write_lock:
            self._writing().flush()
            done = self._driver.compact(target_bytes=target_bytes, waste=waste, grace=grace, progress=progress)
            self.refresh()
        return done

    def finish(self, *, progress: backend.BytesDone = lambda done, total: None) -> backend.Compaction:
        """Do what is to be done once a fill by several processes has ended: join the small segments that each has left,
        and make the index and the statistics, so that readers find them. Large segments stay as they are.

        It needs nobody to have ended: others may read and write meanwhile, and it may be done again.

        Raises:
            StoreError: read-only, disk full, ...; nothing is lost.
        """
        done = self.compact(target_bytes=SEGMENT_BYTES, progress=progress)
        self.statistics()
        contributions.merge(self._store, self.recipe.fingerprint)
        return done

    def contributions(self) -> list[Contribution]:
        """Return what processes that filled this space together have noted of what each has stored, in the order in
        which they began; also of processes that were killed. Fills by one process note nothing."""
        self._check_open()
        return contributions.read(self._store, self.recipe.fingerprint)

    # --- blobs -------------------------------------------------------------------------------------------------------

    def blob(self, name: str) -> bytes | None:
        """Return a small named file of the space (its canaries, say), None where there is none."""
        self._check_open()
        return self._store.read_blob(space_blob(self.recipe.fingerprint, name))

    def put_blob(self, name: str, data: bytes, *, replace: bool = False) -> bool:
        """Write a small named file of the space, durably; return False where it stands and ``replace`` is False."""
        self._check_open()
        self.make()
        return self._store.write_blob(space_blob(self.recipe.fingerprint, name), data, replace=replace)

    def leave_no_trace(self) -> None:
        """Have nothing that is done through this object from here on count as a use of the space."""
        self._used.stop()

    # --- closing -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Flush and release everything. Does nothing the second time."""
        if self._closed:
            return
        try:
            if self._writer is not None and not self._forked:  # a fork's child has nothing of its own to flush
                self._writer.close()
        finally:
            self._closed = True
            self._on_close(self)
            self._snapshot = None
            if not self._forked:
                self._statistics.keep()
            if not self._forked:
                self._driver.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(_CLOSED)
        if self._forked:
            with self._write_lock:
                if self._forked:
                    self._open()

    def __enter__(self) -> Space:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reopen, (self.recipe,)  # what travels is the store's URL and the recipe, never a handle

    def __repr__(self) -> str:
        return f"<Space {self.recipe.fingerprint} of {self.recipe.model} {self.recipe.site_name}>"

    def _repr_html_(self) -> str:
        recipe, rows = self.recipe, list[tuple[str, object]]()
        if not self._closed:
            usage = self.usage()
            counts = ("entries", "tokens", "nbytes", "segments")
            rows = [(f"published {name}", getattr(usage, name)) for name in counts]
        return table(f"Space {recipe.fingerprint}" + " (closed)" * self._closed, [*recipe.facts(), *rows])


def _entries_of(rows: NDArray[np.int64], starts: NDArray[np.int64]) -> list[int]:
    """Return which entries some rows are of, in their order; ``starts``, ``[n + 1]``, are where each entry begins."""
    entries: list[int] = np.unique(np.searchsorted(starts, rows, "right") - 1).tolist() if len(rows) else []
    return entries


def _check_total(lengths: NDArray[np.int64], total: int) -> None:
    if (rows := int(lengths.sum())) != total:
        raise ShapeError(f"these entries have {rows} rows, and {total} were expected: they were replaced, or deleted")


def _after_fork() -> None:
    for space in list(_SPACES):
        space.after_fork()


os.register_at_fork(after_in_child=_after_fork)

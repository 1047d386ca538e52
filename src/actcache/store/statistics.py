"""Statistics of a space's rows, kept beside it in parts.

A part is of some entries, which it names by their checksums. It counts as long as all of these are served, wherever
they lie by now: compaction changes nothing, and where one of them was deleted or replaced the others are looked at
again. So parts are a cache: what is lost or damaged costs a scan, and never gives other numbers.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.backend import VALUES, Block, StoreDriver
from actcache.errors import ActcacheError, FormatError
from actcache.format import safetensors
from actcache.format.moments import Moments
from actcache.format.ragged import offsets_of, runs
from actcache.format.recipe import Recipe
from actcache.io.workers import ProcessLock
from actcache.store.description import space_blob

logger = logging.getLogger(__name__)

PART_BYTES = 256 << 20  # of rows that are looked at again together where one of them is deleted
_SCAN_BYTES = 16 << 20  # of rows that are read at once
_WORTH_BYTES = 16 << 20  # of rows whose statistics are kept: fewer are looked at as fast as a file is written
_MOST_FILES = 8  # that are left to lie beside each other
_MOST_HELD = 64  # parts that are held in memory until they are written
_VERSION = "1"
_FOLDER = "statistics"
_ARRAYS = {"mean": "<f8", "squares": "<f8", "maximum": "<f8"}

#: Returns the stored rows of some entries, by their positions, and their checksums once they are known to be right.
Scan = Callable[[NDArray[np.int64]], NDArray[np.generic]]


@dataclass(frozen=True)
class Part:
    """The statistics of some entries."""

    checksums: NDArray[np.uint64]  # [n] of the entries
    moments: Moments


class KeptStatistics:
    """The parts of one space. Thread-safe."""

    def __init__(self, driver: StoreDriver, recipe: Recipe, *, writable: bool) -> None:
        self._driver, self._recipe, self._writable = driver, recipe, writable
        self._held: list[Part] = []  # that are in no file yet
        self._lock = ProcessLock()

    def note(self, block: Block) -> None:
        """Look at entries that were just published, while their rows are in memory."""
        rows = block.columns[VALUES]
        if isinstance(rows, np.ndarray):
            try:
                part = Part(block.checksums.copy(), self._moments(rows))
            except FormatError:  # rows that no codec of ours made: whoever reads them is told
                return
            with self._lock:
                self._held.append(part)
                full = len(self._held) >= _MOST_HELD
            if full:
                self.keep()

    def keep(self) -> None:
        """Write what is held, where it is worth it. A failure is logged: it costs a scan."""
        with self._lock:
            held, self._held = self._held, []
        rows = sum(part.moments.count for part in held)
        if self._writable and rows * self._recipe.row_bytes >= _WORTH_BYTES:
            self._write(held)

    def of(
        self, checksums: NDArray[np.uint64], tokens: NDArray[np.int64], order: NDArray[np.int64], scan: Scan
    ) -> Moments:
        """Return the statistics of the entries that are served.

        Args:
            checksums, tokens: ``[n]`` of each.
            order: ``[n]`` their positions in the order in which they lie.
            scan: reads entries of which no part is.
        """
        with self._lock:
            held = list(self._held)
        files = self._files()
        valid, left = _claim([part for _, parts in files for part in parts] + held, checksums)
        fresh = []
        missing = order[left[order]]
        for run in runs(tokens[missing] * self._recipe.row_bytes, PART_BYTES):
            fresh.append(self._scanned(missing[run], checksums, tokens, scan))
        if self._writable and (fresh or len(files) >= _MOST_FILES):
            if len(files) >= _MOST_FILES:
                if valid or fresh:
                    self._write([*valid, *fresh])
                for name, _ in files:
                    self._remove(name)
                with self._lock:
                    self._held = [part for part in self._held if all(part is not old for old in held)]
            elif sum(part.moments.count for part in fresh) * self._recipe.row_bytes >= _WORTH_BYTES:
                self._write(fresh)
            else:
                with self._lock:
                    self._held += fresh
        return Moments.joined((part.moments for part in (*valid, *fresh)), self._recipe.hidden_size)

    def kept(self, checksums: NDArray[np.uint64]) -> Moments:
        """Return the statistics of those of the served entries, ``[n]``, that need no look at a row."""
        with self._lock:
            held = list(self._held)
        valid, _ = _claim([*(part for _, parts in self._files() for part in parts), *held], checksums)
        return Moments.joined((part.moments for part in valid), self._recipe.hidden_size)

    def _scanned(
        self, members: NDArray[np.int64], checksums: NDArray[np.uint64], tokens: NDArray[np.int64], scan: Scan
    ) -> Part:
        seen = (
            self._moments(scan(members[run])) for run in runs(tokens[members] * self._recipe.row_bytes, _SCAN_BYTES)
        )
        return Part(checksums[members], Moments.joined(seen, self._recipe.hidden_size))

    def _moments(self, rows: NDArray[np.generic]) -> Moments:
        return Moments.of(rows, self._recipe.dtype, self._recipe.hidden_size)

    # --- files --------------------------------------------------------------------------------------------------------

    def _files(self) -> list[tuple[str, list[Part]]]:
        """Return the files that can be read, with their parts; damaged ones are none."""
        found = []
        for name in self._driver.blobs(space_blob(self._recipe.fingerprint, _FOLDER)):
            try:
                if (data := self._driver.read_blob(name)) is not None:
                    found.append((name, list(_parts(data, name, self._recipe.hidden_size))))
            except FormatError as error:
                logger.warning("statistics are passed over, and their rows read again: %s", error)
                found.append((name, []))
        return found

    def _write(self, parts: Sequence[Part]) -> None:
        name = space_blob(self._recipe.fingerprint, f"{_FOLDER}/{secrets.token_hex(8)}.safetensors")
        try:
            self._driver.write_blob(name, _dumps(parts), replace=True)
        except ActcacheError as error:
            logger.warning("the statistics of %d parts are not kept: %s", len(parts), error)

    def _remove(self, name: str) -> None:
        try:
            self._driver.delete_blob(name)
        except ActcacheError as error:
            logger.warning("old statistics stay: %s", error)


def _claim(parts: Sequence[Part], checksums: NDArray[np.uint64]) -> tuple[list[Part], NDArray[np.bool_]]:
    """Return the parts all of whose entries are served, each entry in one of them at most, and which are in none."""
    order = np.argsort(checksums)
    known = checksums[order]
    left = np.ones(len(checksums), bool)
    valid = []
    for part in parts:
        at = np.searchsorted(known, part.checksums)
        inside = at < len(known)
        if not inside.all() or not (known[at] == part.checksums).all():
            continue
        members = order[at]
        if left[members].all() and len(np.unique(at)) == len(at):
            left[members] = False
            valid.append(part)
    return valid, left


def _dumps(parts: Sequence[Part]) -> bytes:
    arrays: dict[str, NDArray[Any]] = {
        "checksums": np.concatenate([part.checksums for part in parts]),
        "bounds": offsets_of(np.array([len(part.checksums) for part in parts], np.int64)),
        "count": np.array([part.moments.count for part in parts], np.int64),
        "norms": np.array([part.moments.norms for part in parts], np.float64),
        **{name: np.stack([getattr(part.moments, name) for part in parts]) for name in _ARRAYS},
    }
    return safetensors.dumps(arrays, {"actcache_statistics": _VERSION, "checksum": _checksum(arrays)})


def _parts(data: bytes, where: str, hidden: int) -> Iterator[Part]:
    """Yield the parts of a file; ``FormatError`` where it is damaged or of another release."""
    metadata, arrays = safetensors.loads(data, where)
    if metadata.get("actcache_statistics") != _VERSION or metadata.get("checksum") != _checksum(arrays):
        raise FormatError(f"{where} is damaged, or of another release")
    expected = {"checksums": "<u8", "bounds": "<i8", "count": "<i8", "norms": "<f8", **_ARRAYS}
    if {name: array.dtype.str for name, array in arrays.items()} != expected:
        raise FormatError(f"{where} holds other arrays")
    bounds: NDArray[Any] = arrays["bounds"]
    count = len(arrays["count"])
    shapes = dict.fromkeys(_ARRAYS, (count, hidden)) | {"norms": (count,), "bounds": (count + 1,)}
    if any(arrays[name].shape != shape for name, shape in shapes.items()) or arrays["checksums"].ndim != 1:
        raise FormatError(f"{where} holds arrays of other shapes")
    if bounds[0] != 0 or bounds[-1] != len(arrays["checksums"]) or (np.diff(bounds) < 0).any():
        raise FormatError(f"{where} has bounds that are none")
    for i in range(count):
        moments = Moments(
            int(arrays["count"][i]),
            norms=float(arrays["norms"][i]),
            **{name: np.array(arrays[name][i], np.float64) for name in _ARRAYS},
        )
        yield Part(np.array(arrays["checksums"][bounds[i] : bounds[i + 1]], np.uint64), moments)


def _checksum(arrays: dict[str, NDArray[Any]]) -> str:
    digest = xxhash.xxh3_64()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()

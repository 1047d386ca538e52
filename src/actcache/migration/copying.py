"""Copying one space into another: read, publish and read back, each a segment behind the other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from actcache.inspection import Progress
from actcache.key import key_array, key_list
from actcache.migration.parts import Part, Parts, Planned
from actcache.migration.results import SpaceMigration
from actcache.space import Space


class Copy:
    """Copies one space into another. Not thread-safe."""

    def __init__(self, source: Space, target: Space, segment_bytes: int, progress: Progress | None) -> None:
        self._source, self._target = source, target
        self._parts = Parts(source, target.recipe, segment_bytes)
        self._progress = progress
        self._name = source.recipe.fingerprint
        self._corrupt: set[bytes] = set()
        self._copied = self._nbytes = 0

    def run(self) -> SpaceMigration:
        keys = self._source.key_array()  # sorted
        expected = self._source.stored_checksums(keys)
        there = self._target.contains(keys)
        if self._parts.same:
            bad = self._copy(keys[~there])
        else:
            # What the target should say follows from the source's rows alone, so all of them are read.
            demanded = np.zeros_like(expected)
            places = {key: i for i, key in enumerate(key_list(keys))}

            def demand(part: Part) -> None:
                demanded[[places[key] for key in key_list(part.keys)]] = part.demanded

            bad = self._copy(keys, demand)
            expected = demanded
        bad += self._read_back(keys[there])
        if bad:  # of an earlier life of the target: the source has them right
            self._copy(key_array(bad), overwrite=True)
            bad = self._read_back(key_array(bad))
        held = self._target.stored_checksums(keys)
        differs = (held != expected).any(axis=1)
        differing = {*key_list(keys[differs]), *bad} - self._corrupt
        return SpaceMigration(
            self._name,
            self._target.recipe.fingerprint,
            self._target.recipe.stored_as,
            list(self._target.recipe.via),
            len(keys),
            self._copied,
            self._nbytes,
            _digest(keys, expected),
            _digest(keys, held),
            sorted(self._corrupt),
            sorted(differing),
            self._source.damaged(),
        )

    def _read_back(self, keys: NDArray[np.uint8]) -> list[bytes]:
        """Return the keys of entries of the target that fail their checksums when they are read."""
        tell = None if self._progress is None else self._tell
        return self._target.corrupt_among(keys[self._target.contains(keys)], tell)[0]

    def _tell(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(f"{self._name[:8]} check", done, total)

    # --- copying -----------------------------------------------------------------------------------------------------

    def _copy(
        self, keys: NDArray[np.uint8], seen: Callable[[Part], None] | None = None, *, overwrite: bool = False
    ) -> list[bytes]:
        """Read entries, publish those that the target has not, read these back; return the keys of what fails that."""
        waiting, done = iter(self._parts.plan(keys)), 0
        checks: list[Future[list[bytes]]] = []
        with (
            ThreadPoolExecutor(1, thread_name_prefix="actcache-migrate") as reading,
            ThreadPoolExecutor(1, thread_name_prefix="actcache-proof") as checking,
        ):
            coming = self._next(reading, waiting)
            try:
                while coming is not None:
                    part = coming.result()
                    coming = self._next(reading, waiting)
                    if seen is not None:
                        seen(part)
                    self._corrupt.update(part.corrupt)
                    self._nbytes += part.nbytes
                    done += len(part.keys) + len(part.corrupt)
                    if not overwrite:
                        part = part.only(~self._target.contains(part.keys))
                    if len(part.keys):
                        self._target.put_block(part.block())
                        checks.append(checking.submit(self._check, part.keys))
                    self._copied += len(part.keys)
                    if self._progress is not None:
                        self._progress(f"{self._name[:8]} copy", done, len(keys))
                    del part  # two are in memory, not three
                return [key for check in checks for key in check.result()]
            finally:
                for future in (coming, *checks):
                    if future is not None:
                        future.cancel()

    def _next(self, pool: ThreadPoolExecutor, waiting: Iterator[Planned]) -> Future[Part] | None:
        following = next(waiting, None)
        return None if following is None else pool.submit(self._parts.read, *following)

    def _check(self, keys: NDArray[np.uint8]) -> list[bytes]:
        return self._target.corrupt_among(keys)[0]


def _digest(keys: NDArray[np.uint8], checksums: NDArray[np.uint64]) -> str:
    """Return the digest of sorted keys and their ``[n, 3]`` tokens and checksums."""
    entries = np.concatenate([keys, checksums.astype("<u8").view(np.uint8).reshape(len(keys), 24)], axis=1)
    return hashlib.blake2b(np.ascontiguousarray(entries).data, digest_size=16, person=b"actcache/migrate").hexdigest()

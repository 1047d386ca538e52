"""One row a document: its last token's, a given token's, the mean or the maximum of all."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import MissingEntryError, ShapeError, UsageError
from actcache.format import codec
from actcache.format.arguments import check_choice, is_whole, whole_numbers
from actcache.format.keys import key_list
from actcache.format.ragged import offsets_of, runs
from actcache.io.workers import available_cpus
from actcache.reader.checks import check_present

_PORTION_BYTES = 4 << 20  # of rows that a thread reads at once

WAYS = ("last", "mean", "max")

#: From packed rows ``[rows, hidden]``, their offsets ``[n + 1]`` and the numbers of the documents ``[n]`` to one each.
Pool = Callable[[NDArray[Any], NDArray[np.int64], NDArray[np.int64]], NDArray[Any]]


def pooled(source: Any, keys: NDArray[np.uint8], how: Any, out: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Return ``[n, hidden]`` of the documents of ``[n, 32]`` keys; see ``Space.pooled``."""
    lengths = source.lengths(keys)
    check_present(keys, lengths > 0)
    pool = _pool(how, lengths)
    hidden, decode = source.recipe.hidden_size, codec.get(source.recipe.dtype).decode
    dtype = codec.get(source.recipe.dtype).stored
    if out is None:
        out = np.empty((len(keys), hidden), np.float32)
    elif getattr(out, "shape", None) != (len(keys), hidden) or getattr(out, "dtype", None) != np.float32:
        raise ShapeError(f"out must be a float32 array [{len(keys)}, {hidden}]")
    order = source.order_of(keys)  # as they lie: a corpus is read from one end to the other

    def read(members: NDArray[np.int64]) -> None:
        some, offsets = keys[members], offsets_of(lengths[members])
        rows = np.empty((int(offsets[-1]), hidden), dtype)
        try:
            found = source.read_into(some, rows).lengths
        except ShapeError:
            found = source.lengths(some)
        if not found.all():
            gone = key_list(some[found == 0])
            raise MissingEntryError(f"{len(gone)} documents were deleted meanwhile, the first is {gone[0].hex()}", gone)
        if (found != lengths[members]).any():
            raise ShapeError("documents were replaced by ones of another length meanwhile: ask again")
        out[members] = pool(decode(rows), offsets, members)

    portions = [order[run] for run in runs(lengths[order] * source.recipe.row_bytes, _PORTION_BYTES)]
    with ThreadPoolExecutor(available_cpus(), thread_name_prefix="actcache-pool") as threads:
        futures = [threads.submit(read, members) for members in portions if len(members)]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
    return out


def _pool(how: Any, lengths: NDArray[np.int64]) -> Pool:
    """Return how rows of documents of these lengths become one each; ``UsageError`` where nobody knows."""
    if isinstance(how, str):
        check_choice("how", how, WAYS)
        return {"mean": _mean, "max": _max, "last": _at(lengths - 1)}[how]
    positions = np.full(len(lengths), how, np.int64) if is_whole(how) else whole_numbers("positions", how)
    if positions.shape != lengths.shape:
        raise ShapeError(f"{len(lengths)} documents and {len(positions)} positions: give one each, or one for all")
    places = np.where(positions < 0, positions + lengths, positions)
    outside = (places < 0) | (places >= lengths)
    if outside.any():
        which = int(np.argmax(outside))
        raise UsageError(f"document {which} has {int(lengths[which])} tokens, and none at position {positions[which]}")
    return _at(places)


def _at(places: NDArray[np.int64]) -> Pool:
    return lambda rows, offsets, members: rows[offsets[:-1] + places[members]]


def _mean(rows: NDArray[Any], offsets: NDArray[np.int64], members: NDArray[np.int64]) -> NDArray[Any]:
    sums = np.add.reduceat(rows, offsets[:-1], axis=0, dtype=np.float32)
    return sums / np.diff(offsets)[:, None].astype(np.float32)


def _max(rows: NDArray[Any], offsets: NDArray[np.int64], members: NDArray[np.int64]) -> NDArray[Any]:
    return np.maximum.reduceat(rows, offsets[:-1], axis=0)

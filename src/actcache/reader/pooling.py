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
from actcache.io import loops
from actcache.io.loops import Column, Pooled
from actcache.io.workers import available_cpus
from actcache.reader.checks import check_present

_PORTION_BYTES = 16 << 20  # of rows that a thread reads at once

WAYS = ("last", "mean", "max")


def pooled(source: Any, keys: NDArray[np.uint8], how: Any, out: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Return ``[n, hidden]`` of the documents of ``[n, 32]`` keys; see ``Space.pooled``."""
    lengths = source.lengths(keys)
    check_present(keys, lengths > 0)
    how, at = _way(how, lengths)
    hidden, form = source.recipe.hidden_size, codec.get(source.recipe.dtype).form
    if out is None:
        out = np.empty((len(keys), hidden), np.float32)
    elif getattr(out, "shape", None) != (len(keys), hidden) or getattr(out, "dtype", None) != np.float32:
        raise ShapeError(f"out must be a float32 array [{len(keys)}, {hidden}]")
    decoded = form not in codec.FLOATS
    pool, row_bytes = (_pool_codes, hidden * 4) if decoded else (_pool_numbers, source.recipe.row_bytes)
    order = source.order_of(keys)  # as they lie: a corpus is read from one end to the other

    def read(members: NDArray[np.int64]) -> None:
        some, wanted = keys[members], lengths[members]
        try:
            rows, found = pool(source, some, wanted, how, None if at is None else at[members])
        except ShapeError:
            found = source.lengths(some)
            if (found == wanted).all():
                raise
        if not found.all():
            gone = key_list(some[found == 0])
            raise MissingEntryError(f"{len(gone)} documents were deleted meanwhile, the first is {gone[0].hex()}", gone)
        if (found != wanted).any():
            raise ShapeError("documents were replaced by ones of another length meanwhile: ask again")
        out[members] = rows

    portions = [order[run] for run in runs(lengths[order] * row_bytes, _PORTION_BYTES)]
    with ThreadPoolExecutor(available_cpus(), thread_name_prefix="actcache-pool") as threads:
        futures = [threads.submit(read, members) for members in portions if len(members)]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
    return out


def _way(how: Any, lengths: NDArray[np.int64]) -> tuple[str, NDArray[np.int64] | None]:
    """Return how rows of documents of these lengths become one each (see ``io.loops.Pooled``), and their positions;
    ``UsageError`` where nobody knows."""
    if isinstance(how, str):
        check_choice("how", how, WAYS)
        return (how, None) if how != "last" else ("at", lengths - 1)
    positions = np.full(len(lengths), how, np.int64) if is_whole(how) else whole_numbers("positions", how)
    if positions.shape != lengths.shape:
        raise ShapeError(f"{len(lengths)} documents and {len(positions)} positions: give one each, or one for all")
    places = np.where(positions < 0, positions + lengths, positions)
    outside = (places < 0) | (places >= lengths)
    if outside.any():
        which = int(np.argmax(outside))
        raise UsageError(f"document {which} has {int(lengths[which])} tokens, and none at position {positions[which]}")
    return "at", places


#: From a space, some keys, their lengths, the way and the positions to one row each, and the lengths that were found.
Pool = Callable[
    [Any, NDArray[np.uint8], NDArray[np.int64], str, NDArray[np.int64] | None],
    tuple[NDArray[Any], NDArray[np.int64]],
]


def _pool_numbers(
    source: Any, keys: NDArray[np.uint8], lengths: NDArray[np.int64], how: str, at: NDArray[np.int64] | None
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Pool rows where they lie."""
    kind = codec.get(source.recipe.dtype)
    out = np.empty((len(keys), source.recipe.hidden_size), kind.stored if how == "at" else np.float32)
    found = source.pool_into(keys, out, how, int(lengths.sum()), at=at).lengths
    return kind.decode(out) if how == "at" else out, found


def _pool_codes(
    source: Any, keys: NDArray[np.uint8], lengths: NDArray[np.int64], how: str, at: NDArray[np.int64] | None
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Pool rows that have to be decoded first."""
    rows = np.empty((int(lengths.sum()), source.recipe.hidden_size), np.float32)
    found = source.read_into(keys, rows, dtype="float32").lengths
    out = np.empty((len(keys), rows.shape[1]), np.float32)
    pooled = Column(rows.shape[1] * 4, out, rows, offsets_of(lengths)[:-1] * rows.shape[1] * 4)
    loops.gather([pooled._replace(placing=Pooled(how, "float32", at))], lengths, offsets_of(lengths))
    return out, found

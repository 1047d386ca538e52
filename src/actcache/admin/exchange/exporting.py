"""Writing a space's entries to one file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.admin.exchange import parquet
from actcache.admin.exchange.files import OPTIONAL, PART_BYTES, RECIPE_NAME, SINKS, VERSION, VERSION_NAME, sums_of
from actcache.admin.inspection import Progress
from actcache.entries.entry import columns_of
from actcache.errors import DataError, ShapeError, UsageError
from actcache.format import codec
from actcache.format.keys import Keys, key_array
from actcache.format.ragged import EXTRAS, TOKEN_IDS, VALUES, offsets_of
from actcache.format.safetensors import Described
from actcache.io.newfile import check_new, new_file
from actcache.reader.checks import check_present
from actcache.store.space import Space

_FORMATS = (*SINKS, *parquet.SUFFIXES)


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    entries: int
    nbytes: int  # of the file
    token_ids: bool  # whether they are there
    extras: list[str] = field(default_factory=list)  # of spans, word_ids, type_ids, what is there
    left_out: dict[str, int] = field(default_factory=dict)  # array -> entries that have it, where others do not


def export_space(
    space: Space,
    path: Path,
    keys: Keys | None = None,
    *,
    ids: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write entries to a new file, whole or not at all; rows are streamed, and verified as they are read.

    A ``.safetensors`` or ``.npz`` holds everything of the entries; each of the optional arrays where all entries have
    it. A ``.parquet`` holds keys, lengths and token ids alone (``actcache.admin.exchange.parquet``).

    Args:
        path: ends in ``.safetensors``, ``.npz`` or ``.parquet``.
        keys: of the entries, in this order, each written once (to Parquet as often as it is given); None for all, as
            they lie.
        ids: with ``keys`` and Parquet, the caller's own id of each.

    Raises:
        UsageError: another name, or the file stands already.
        MissingExtraError: Parquet without pyarrow.
        MissingEntryError: a key is absent.
        CorruptEntryError: an entry fails its checksum; nothing was written.
        OutOfSpaceError, ReadOnlyError, StorageIOError: the file cannot be written.
    """
    if path.suffix not in _FORMATS:
        raise UsageError(f"{path} ends in none of {', '.join(_FORMATS)}: the name decides what is written")
    check_new(path)
    if ids is not None and (keys is None or len(ids) != len(keys)):
        raise ShapeError(f"{len(ids)} ids: give one with each key")
    wanted = space.in_order(space.key_array()) if keys is None else key_array(keys)
    check_present(wanted, space.contains(wanted))
    with new_file(path) as temporary:
        if path.suffix in parquet.SUFFIXES:
            tokens = parquet.write(space, temporary, wanted, ids, progress)
            done = Exported(len(wanted), temporary.stat().st_size, tokens)
        else:
            done = _write(space, temporary, path.suffix, _once(wanted), progress)
    return done


def _write(space: Space, path: Path, suffix: str, keys: NDArray[np.uint8], progress: Progress | None) -> Exported:
    lengths = space.lengths(keys)
    having = {name: int(space.has(name, keys).sum()) if len(keys) else 0 for name in OPTIONAL}
    columns = [VALUES, *(name for name, count in having.items() if count == len(keys) > 0)]
    extras = [name for name in columns if name in EXTRAS]
    starts = offsets_of(lengths)
    of = columns_of(space.recipe)
    described: list[Described] = [
        ("offsets", np.dtype(np.int64), (len(keys) + 1,)),
        ("checksums", np.dtype(np.uint64), (len(keys),)),
        *([("extra_checksums", np.dtype(np.uint64), (len(keys),))] if extras else []),
        ("keys", np.dtype(np.uint8), (len(keys), 32)),
        *((name, np.dtype(of[name][0]), (int(starts[-1]), *of[name][1])) for name in columns),
    ]
    metadata = {VERSION_NAME: VERSION, RECIPE_NAME: json.dumps(space.recipe.to_json())}
    with SINKS[suffix](path, described, metadata) as sink:
        sink.write("offsets", starts)
        sink.write("keys", keys)
        for first, last in cuts(space, starts):
            part = keys[first:last]
            rows = _rows(space, part, columns, int(starts[last] - starts[first]))
            sums = sums_of(space.recipe, part, starts[first:last] - starts[first], lengths[first:last], rows)
            sink.write("checksums", sums.checksums)
            if sums.extra_checksums is not None:
                sink.write("extra_checksums", sums.extra_checksums)
            for name, array in rows.items():
                sink.write(name, array)
            if progress is not None:
                progress("export", last, len(keys))
    left_out = {name: count for name, count in having.items() if count and name not in columns}
    return Exported(len(keys), path.stat().st_size, TOKEN_IDS in columns, extras, left_out)


def cuts(space: Space, starts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield runs of entries of about ``PART_BYTES`` of rows, as first and last + 1."""
    step = max(1, PART_BYTES // (codec.get(space.recipe.dtype).stored.itemsize * space.recipe.hidden_size))
    edges = np.r_[np.searchsorted(starts, np.arange(0, int(starts[-1]), step)), len(starts) - 1]
    return itertools.pairwise(np.unique(edges).tolist())


def _rows(space: Space, keys: NDArray[np.uint8], columns: list[str], total: int) -> dict[str, NDArray[Any]]:
    """Return the entries' ragged arrays, packed, in stored form."""
    stored = codec.get(space.recipe.dtype)
    if set(columns) <= {VALUES, TOKEN_IDS}:
        rows: dict[str, NDArray[Any]] = {VALUES: np.empty((total, space.recipe.hidden_size), stored.stored)}
        if TOKEN_IDS in columns:
            rows[TOKEN_IDS] = np.empty(total, np.int32)
        found = space.read_into(keys, rows[VALUES], token_ids=rows.get(TOKEN_IDS))
        check_present(keys, found.found)
        if int(found.lengths.sum()) != total:
            raise DataError("entries changed while they were read: run it again")
        return rows
    entries = [entry for entry in space.get(keys) if entry is not None]
    check_present(keys, space.contains(keys))
    arrays: dict[str, list[Any]] = {VALUES: [stored.stored_rows(entry.activations) for entry in entries]}
    if TOKEN_IDS in columns:
        arrays[TOKEN_IDS] = [entry.token_ids for entry in entries]
    for name in columns:
        if name in EXTRAS:
            arrays[name] = [entry.extras[name] for entry in entries]
    return {name: np.concatenate(parts) for name, parts in arrays.items()}


def _once(keys: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return each key once, where it first stands: in a corpus a document may stand twice."""
    _, first = np.unique(keys, axis=0, return_index=True)
    return keys[np.sort(first)]

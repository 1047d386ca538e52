"""Writing a space's entries to one file: whole as safetensors or npz, or keys and token ids as Parquet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.admin.exchange.files import OPTIONAL, PARQUET, PART_BYTES, RECIPE_NAME, SCHEMA_NAME, SINKS, VERSION_NAME
from actcache.admin.inspection import Progress
from actcache.errors import DataError, ShapeError, UsageError, requires_extra
from actcache.format import checksum
from actcache.format.keys import Keys, key_array, key_list
from actcache.format.ragged import OWN, TOKEN_IDS, VALUES, offsets_of, runs
from actcache.format.safetensors import Described
from actcache.io.newfile import check_new, new_file
from actcache.reader.checks import check_present
from actcache.store.space import Space

_FORMATS = (*SINKS, PARQUET)
_GROUP_TOKENS = 4 << 20  # of a row group of Parquet


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    entries: int
    nbytes: int
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
    it. A ``.parquet``, to be joined with what other programs know of the documents, has the columns ``key`` (64
    hexadecimal digits, as cachectl prints them), ``id`` (the caller's own, where there are any), ``length`` (tokens,
    int32) and ``token_ids`` (list of int32, null where an entry has none), and the recipe among the schema's metadata,
    as JSON, under ``actcache_recipe``.

    Args:
        keys: of the entries, in this order, each written once (to Parquet as often as it is given); None for all, as
            they lie.
        ids: with ``keys`` and Parquet, the caller's own id of each.

    Raises:
        UsageError: another name, or the file stands already.
        MissingExtraError: Parquet without pyarrow.
        MissingEntryError: a key is absent.
        CorruptEntryError: an entry fails its checksum; nothing was written.
    """
    if path.suffix not in _FORMATS:
        raise UsageError(f"{path} ends in none of {', '.join(_FORMATS)}: the name decides what is written")
    check_new(path)
    if ids is not None and (keys is None or len(ids) != len(keys)):
        raise ShapeError(f"{len(ids)} ids: give one with each key")
    wanted = space.in_order(space.key_array()) if keys is None else key_array(keys)
    check_present(wanted, space.contains(wanted))
    with new_file(path) as temporary:
        if path.suffix == PARQUET:
            return _write_parquet(space, temporary, wanted, ids, progress)
        return _write_arrays(space, temporary, path.suffix, _once(wanted), progress)


def _write_arrays(
    space: Space, path: Path, suffix: str, keys: NDArray[np.uint8], progress: Progress | None
) -> Exported:
    lengths = space.lengths(keys)
    having = {name: int(space.has(name, keys).sum()) if len(keys) else 0 for name in OPTIONAL}
    columns = [VALUES, *(name for name, count in having.items() if count == len(keys) > 0)]
    extras = [name for name in columns if name not in (VALUES, TOKEN_IDS)]
    starts = offsets_of(lengths)
    recipe, of = space.recipe, space.ragged
    described: list[Described] = [
        ("offsets", np.dtype(np.int64), (len(keys) + 1,)),
        ("checksums", np.dtype(np.uint64), (len(keys),)),
        *([("extra_checksums", np.dtype(np.uint64), (len(keys),))] if extras else []),
        ("keys", np.dtype(np.uint8), (len(keys), 32)),
        *((name, np.dtype(of[name][0]), (int(starts[-1]), *of[name][1])) for name in columns),
    ]
    metadata = {VERSION_NAME: str(recipe.format_version), RECIPE_NAME: json.dumps(recipe.to_json())}
    if OWN in columns and space.schema is not None:
        metadata[SCHEMA_NAME] = space.schema.dumps().decode()
    seed = checksum.space_seed(recipe.fingerprint, recipe.dtype, recipe.hidden_size)
    with SINKS[suffix](path, described, metadata) as sink:
        sink.write("offsets", starts)
        sink.write("keys", keys)
        for run in runs(lengths * recipe.row_bytes, PART_BYTES):
            part, begins = keys[run], starts[run] - starts[run.start]
            rows = _rows(space, part, columns, int(lengths[run].sum()))
            sums, extra_sums = checksum.entry_checksums(seed, part, begins, lengths[run], rows)
            sink.write("checksums", sums)
            if extra_sums is not None:
                sink.write("extra_checksums", extra_sums)
            for name, array in rows.items():
                sink.write(name, array)
            if progress is not None:
                progress("export", run.stop, len(keys))
    left_out = {name: count for name, count in having.items() if count and name not in columns}
    return Exported(len(keys), path.stat().st_size, TOKEN_IDS in columns, extras, left_out)


def _rows(space: Space, keys: NDArray[np.uint8], columns: list[str], total: int) -> dict[str, NDArray[Any]]:
    """Return the entries' ragged arrays, packed, in stored form."""
    packed = space.read_packed(keys)
    check_present(keys, packed.found)
    there = all(name == VALUES or (name in packed.has and packed.has[name].all()) for name in columns)
    if int(packed.lengths.sum()) != total or not there:
        raise DataError("entries changed while they were read: run it again")
    return {name: packed.columns[name] for name in columns}


def _once(keys: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return each key once, where it first stands: in a corpus a document may stand twice."""
    _, first = np.unique(keys, axis=0, return_index=True)
    return keys[np.sort(first)]


def _write_parquet(
    space: Space, path: Path, keys: NDArray[np.uint8], ids: Sequence[str] | None, progress: Progress | None
) -> Exported:
    """Write a row group at a time. Rows are read as well, for a checksum is over token ids and rows together."""
    with requires_extra("corpora", "Parquet needs pyarrow"):
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    schema = _schema(arrow, space, ids is not None)
    lengths = space.lengths(keys)
    complete = bool(len(keys))  # whether all have token ids
    # An open file: arrow's own paths are UTF-8, and a file's name may be anything.
    with path.open("xb") as file, parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        held: list[Any] = []
        tokens = 0
        for run in runs(lengths * (space.recipe.hidden_size * 4), PART_BYTES):
            batch = _batch(arrow, schema, space, keys[run], None if ids is None else ids[run])
            complete = complete and not batch.column("token_ids").null_count
            held.append(batch)
            tokens += int(lengths[run].sum())
            if tokens >= _GROUP_TOKENS or run.stop == len(keys):
                writer.write_table(arrow.Table.from_batches(held), row_group_size=1 << 30)
                held, tokens = [], 0
            if progress is not None:
                progress("export", run.stop, len(keys))
    return Exported(len(keys), path.stat().st_size, complete)


def _schema(arrow: Any, space: Space, with_ids: bool) -> Any:
    key = [
        arrow.field("key", arrow.string(), nullable=False),
        *([arrow.field("id", arrow.string())] if with_ids else []),
    ]
    length, ids = arrow.field("length", arrow.int32(), nullable=False), arrow.list_(arrow.int32())
    fields = [*key, length, arrow.field("token_ids", ids)]
    return arrow.schema(fields, {"actcache_recipe": json.dumps(space.recipe.to_json())})


def _batch(arrow: Any, schema: Any, space: Space, keys: NDArray[np.uint8], ids: Sequence[str] | None) -> Any:
    packed = space.read_packed(keys)
    check_present(keys, packed.found)
    has = packed.has.get(TOKEN_IDS, np.zeros(len(keys), bool))
    tokens = packed.columns[TOKEN_IDS][np.repeat(has, packed.lengths)] if has.any() else np.empty(0, np.int32)
    offsets = arrow.array(offsets_of(np.where(has, packed.lengths, 0)).astype(np.int32))
    return arrow.record_batch(
        [
            arrow.array([key.hex() for key in key_list(keys)], arrow.string()),
            *([arrow.array(ids, arrow.string())] if ids is not None else []),
            arrow.array(packed.lengths, arrow.int32()),
            arrow.ListArray.from_arrays(offsets, arrow.array(tokens), mask=arrow.array(~has)),
        ],
        schema=schema,
    )

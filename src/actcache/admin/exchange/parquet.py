"""Keys and token ids as a Parquet file, to be joined with what other programs know of the documents.

Its columns are ``key`` (64 hexadecimal digits, as cachectl prints them), ``id`` (the caller's own, where there are
any), ``length`` (tokens, int32) and ``token_ids`` (list of int32, null where an entry has none). The recipe is among
the schema's metadata, as JSON, under ``actcache_recipe``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.admin.exchange.files import PART_BYTES
from actcache.admin.inspection import Progress
from actcache.errors import MissingExtraError
from actcache.format.keys import key_list
from actcache.format.ragged import offsets_of
from actcache.reader.checks import check_present
from actcache.store.space import Space

SUFFIXES = (".parquet",)

_GROUP_TOKENS = 4 << 20  # of a row group


def write(
    space: Space, path: Path, keys: NDArray[np.uint8], ids: Sequence[str] | None, progress: Progress | None
) -> bool:
    """Write entries' keys, lengths and token ids to a new file, a row group at a time; return whether all have ids.

    Their rows are read as well, for an entry's checksum is over token ids and rows together.

    Raises:
        MissingExtraError: pyarrow is not installed.
        MissingEntryError, CorruptEntryError: see ``Space.get``.
    """
    arrow, parquet = _library()
    schema = _schema(arrow, space, ids is not None)
    starts = offsets_of(space.lengths(keys))
    step = max(1, PART_BYTES // (space.recipe.hidden_size * 4))
    edges = np.unique(np.r_[np.searchsorted(starts, np.arange(0, int(starts[-1]), step)), len(keys)]).tolist()
    complete = bool(len(keys))
    # An open file: arrow's own paths are UTF-8, and a file's name may be anything.
    with path.open("xb") as file, parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        held: list[Any] = []
        tokens = 0
        for first, last in itertools.pairwise(edges):
            batch = _batch(arrow, schema, space, keys[first:last], None if ids is None else ids[first:last])
            complete = complete and not batch.column("token_ids").null_count
            held.append(batch)
            tokens += int(starts[last] - starts[first])
            if tokens >= _GROUP_TOKENS or last == len(keys):
                writer.write_table(arrow.Table.from_batches(held), row_group_size=1 << 30)
                held, tokens = [], 0
            if progress is not None:
                progress("export", last, len(keys))
    return complete


def _schema(arrow: Any, space: Space, with_ids: bool) -> Any:
    fields = [
        arrow.field("key", arrow.string(), nullable=False),
        *([arrow.field("id", arrow.string())] if with_ids else []),
        arrow.field("length", arrow.int32(), nullable=False),
        arrow.field("token_ids", arrow.list_(arrow.int32())),
    ]
    return arrow.schema(fields, {"actcache_recipe": json.dumps(space.recipe.to_json())})


def _batch(arrow: Any, schema: Any, space: Space, keys: NDArray[np.uint8], ids: Sequence[str] | None) -> Any:
    found = space.get(keys)
    check_present(keys, np.array([entry is not None for entry in found], bool))
    entries = [entry for entry in found if entry is not None]
    none = np.empty(0, np.int32)
    lists = [none if entry.token_ids is None else entry.token_ids for entry in entries]
    offsets = offsets_of(np.array([len(one) for one in lists], np.int64)).astype(np.int32)
    missing = arrow.array([entry.token_ids is None for entry in entries], arrow.bool_())
    return arrow.record_batch(
        [
            arrow.array([key.hex() for key in key_list(keys)], arrow.string()),
            *([arrow.array(ids, arrow.string())] if ids is not None else []),
            arrow.array([len(entry.activations) for entry in entries], arrow.int32()),
            arrow.ListArray.from_arrays(
                arrow.array(offsets), arrow.array(np.concatenate([none, *lists])), mask=missing
            ),
        ],
        schema=schema,
    )


def _library() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(f"Parquet needs pyarrow: pip install 'actcache[corpora]' ({error})") from None
    return pyarrow, pyarrow.parquet

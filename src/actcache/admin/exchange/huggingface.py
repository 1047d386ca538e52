"""A space as a data set of Hugging Face's library, and back; and as the cached activations of SAELens."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.entries.entry import PackedEntries
from actcache.errors import FormatError, UsageError, requires_extra
from actcache.format import codec
from actcache.format.arguments import whole
from actcache.format.keys import Keys, key_array, key_list
from actcache.format.ragged import TOKEN_IDS, VALUES, offsets_of, runs
from actcache.io.newfile import check_new
from actcache.reader.checks import check_present
from actcache.store.space import Space

if TYPE_CHECKING:
    import datasets

_PART_BYTES = 16 << 20  # of rows that are read at once
_BATCH = 256  # rows of a data set that are put at once


def to_dataset(space: Space, keys: Keys | None = None, *, shards: int = 16) -> datasets.IterableDataset:
    """Return entries as a ``datasets.IterableDataset``, streamed and verified as they are read.

    A row has ``key`` (binary), ``activations`` (``[tokens, hidden]``, floating point; bfloat16 as float32) and, where
    all entries have them, ``token_ids`` (``[tokens]`` int32). It pickles into a loader's workers, which share out the
    ``shards``.

    Args:
        keys: of the entries, in this order; None for all, as they lie.

    Raises:
        MissingExtraError: the library is not installed.
        MissingEntryError: a key is absent.
        UsageError: there are no entries.
    """
    with requires_extra("datasets", "a data set of Hugging Face needs datasets"):
        import datasets

    wanted = space.in_order(space.key_array()) if keys is None else key_array(keys)
    check_present(wanted, space.contains(wanted))
    if not len(wanted):
        raise UsageError("there are no entries to make a data set of")
    recipe = space.recipe
    kind = codec.get(recipe.dtype).delivered.name
    features: dict[str, Any] = {
        "key": datasets.Value("binary"),
        "activations": datasets.Array2D((None, recipe.hidden_size), kind),
    }
    if space.has(TOKEN_IDS, wanted).all():
        features[TOKEN_IDS] = datasets.Sequence(datasets.Value("int32"))
    parts = [part for part in np.array_split(wanted, min(whole("shards", shards, 1), len(wanted))) if len(part)]
    return datasets.IterableDataset.from_generator(
        _rows_of, datasets.Features(features), {"space": space, "parts": parts, "ids": TOKEN_IDS in features}
    )


def _rows_of(space: Space, parts: Sequence[NDArray[np.uint8]], ids: bool) -> Iterator[dict[str, Any]]:
    decode = codec.get(space.recipe.dtype).decode
    for keys, packed in itertools.chain.from_iterable(_packed(space, part) for part in parts):
        rows, starts = decode(packed.columns[VALUES]), offsets_of(packed.lengths)
        for i, key in enumerate(key_list(keys)):
            cut = slice(starts[i], starts[i + 1])
            row = {"key": key, "activations": rows[cut]}
            yield row | {TOKEN_IDS: packed.columns[TOKEN_IDS][cut]} if ids else row


def _packed(space: Space, keys: NDArray[np.uint8]) -> Iterator[tuple[NDArray[np.uint8], PackedEntries]]:
    """Yield entries some MiB at a time."""
    for run in runs(space.lengths(keys) * space.recipe.row_bytes, _PART_BYTES):
        packed = space.read_packed(keys[run])
        check_present(keys[run], packed.found)
        yield keys[run], packed


def put_dataset(space: Space, dataset: Iterable[Any]) -> int:
    """Put the rows of a data set that ``to_dataset`` made, or that has its columns; return how many were stored.

    Keys that are there are skipped. Rows are put as ``Space.put`` puts them, and are durable when this returns.

    Raises:
        FormatError: a row lacks ``key`` or ``activations``, or they are none; it names the row. What came before it is
            stored.
        ShapeError, NonFiniteError, StoreError: as ``Space.put``.
    """
    stored, rows = 0, iter(dataset)
    for first in itertools.count(0, _BATCH):
        some = list(itertools.islice(rows, _BATCH))
        if not some:
            break
        keys, arrays, ids = [], [], []
        for number, row in enumerate(some, first):
            try:
                keys.append(bytes(row["key"]))
                arrays.append(_array(row["activations"], codec.get(space.recipe.dtype).delivered))
                ids.append(row.get(TOKEN_IDS))
                key_array(keys[-1:])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                space.flush()
                raise FormatError(f"row {number} is none that to_dataset makes: {error!r}") from None
        given = None if any(one is None for one in ids) else [np.asarray(one, np.int32) for one in ids]
        stored += space.put(keys, arrays, given)
    space.flush()
    return stored


def _array(value: Any, dtype: np.dtype[Any]) -> Any:
    return value if hasattr(value, "dtype") else np.asarray(value, dtype)  # Python's numbers have no dtype of their own


@dataclass(frozen=True)
class CachedActivations:
    """What was written for SAELens."""

    contexts: int  # rows of the data set, each of ``context_size`` tokens
    tokens: int
    left_out: int  # tokens after the last full context


def export_sae_lens(
    space: Space, folder: str | Path, keys: Keys | None = None, *, context_size: int, hook_name: str
) -> CachedActivations:
    """Write entries as SAELens caches activations: a data set on disk with a column ``hook_name`` of
    ``[context_size, hidden]`` float32 and one of ``token_ids``, which ``cached_activations_path`` names.

    Documents stand one after another and are cut every ``context_size`` tokens, as SAELens packs its own contexts. What
    no longer fills a context at the end is left out, and counted.

    Args:
        folder: new.
        keys: of the documents, in this order; None for all, as they lie.
        hook_name: the column's name, which SAELens looks for.

    Raises:
        MissingExtraError: datasets is not installed.
        UsageError: the folder stands already, or there are fewer tokens than a context has.
        MissingEntryError, CorruptEntryError: an entry is absent, or fails its checksum; nothing stays.
    """
    with requires_extra("datasets", "cached activations of SAELens need datasets"):
        import datasets
        from datasets.arrow_writer import ArrowWriter
    path, size = Path(folder), whole("context_size", context_size, 1)
    check_new(path)
    wanted = space.in_order(space.key_array()) if keys is None else key_array(keys)
    check_present(wanted, space.contains(wanted))
    total = int(space.lengths(wanted).sum())
    if total < size:
        raise UsageError(f"these documents have {total} tokens, fewer than one context of {size}")
    hidden, ids = space.recipe.hidden_size, bool(space.has(TOKEN_IDS, wanted).all())
    features: dict[str, Any] = {hook_name: datasets.Array2D((size, hidden), "float32")}
    if ids:
        features["token_ids"] = datasets.Sequence(datasets.Value("int32"), length=size)

    def contexts() -> Iterator[dict[str, Any]]:
        decode = codec.get(space.recipe.dtype).decode
        rows, tokens = np.empty((0, hidden), np.float32), np.empty(0, np.int32)
        for _, packed in _packed(space, wanted):
            rows = np.concatenate([rows, decode(packed.columns[VALUES]).astype(np.float32)])
            tokens = np.concatenate([tokens, packed.columns[TOKEN_IDS]]) if ids else tokens
            full = len(rows) // size * size
            for begin in range(0, full, size):
                context = {hook_name: rows[begin : begin + size]}
                yield context | {"token_ids": tokens[begin : begin + size]} if ids else context
            rows, tokens = rows[full:], tokens[full:]

    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))  # on the folder's own file system
    try:
        with ArrowWriter(path=str(scratch / "rows.arrow"), features=datasets.Features(features)) as writer:
            for context in contexts():
                writer.write(context)
            writer.finalize()
        made = datasets.Dataset.from_file(str(scratch / "rows.arrow"))
        made.save_to_disk(scratch / "whole")
        count = len(made)
        (scratch / "whole").rename(path)
    finally:
        with suppress(OSError):
            shutil.rmtree(scratch)
    return CachedActivations(count, count * size, total - count * size)

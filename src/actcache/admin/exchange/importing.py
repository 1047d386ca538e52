"""Storing the entries of a file that an export wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.admin.exchange import files
from actcache.admin.exchange.files import (
    OPTIONAL,
    PARQUET,
    PART_BYTES,
    RECIPE_NAME,
    SCHEMA_NAME,
    VERSION_NAME,
    VERSIONS,
)
from actcache.admin.inspection import Progress
from actcache.entries.entry import columns_of
from actcache.errors import FormatError, FormatVersionError, UsageError
from actcache.format import checksum, safetensors
from actcache.format.columns import Schema
from actcache.format.keys import key_list
from actcache.format.ragged import OWN, TOKEN_IDS, VALUES, check_offsets, offsets_of, row_indices, runs
from actcache.format.recipe import Recipe
from actcache.store.space import Space
from actcache.store.store import Store

_MAX_RECIPE = 1 << 20  # bytes


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    fingerprint: str
    entries: int  # of the file
    stored: int  # the others were there
    corrupt: list[bytes]  # keys of entries of the file that fail their checksums: not stored


@dataclass(frozen=True)
class _File:
    """A file whose arrays fit together; whether its entries are right, their checksums say."""

    recipe: Recipe
    keys: NDArray[np.uint8]  # [n, 32]
    offsets: NDArray[np.int64]  # [n + 1]
    checksums: NDArray[np.uint64]  # [n]
    extra_checksums: NDArray[np.uint64] | None  # [n]
    columns: dict[str, NDArray[Any]]  # the ragged arrays, mapped
    schema: Schema | None  # of the caller's own columns


def import_file(store: Store, path: Path, *, progress: Progress | None = None) -> Imported:
    """Store the entries of a ``.safetensors`` or ``.npz`` that ``export_space`` wrote; what is there is skipped.

    Each entry is compared with its checksums, which bind it to its key and recipe. The file is mapped, not loaded, and
    nothing in it is executed. Run it again where it was interrupted.

    Raises:
        UsageError: the file is not there, or is a Parquet file, which holds no activations.
        FormatError: it is no such file.
        StoreError: read-only, disk full, ...
    """
    file = _checked(path, *_arrays_of(path))
    recipe, lengths, begins = file.recipe, np.diff(file.offsets), file.offsets[:-1]
    seed = checksum.space_seed(recipe.fingerprint, recipe.dtype, recipe.hidden_size)
    corrupt, count = list[bytes](), 0
    with ExitStack() as stack:
        # Where nothing of the file is right, its recipe may not be either, and no space is made of it.
        space = None if len(file.keys) else stack.enter_context(store.space(recipe))
        for run in runs(lengths * recipe.row_bytes, PART_BYTES):
            sums, extra_sums = checksum.entry_checksums(seed, file.keys[run], begins[run], lengths[run], file.columns)
            right = sums == file.checksums[run]
            if extra_sums is not None and file.extra_checksums is not None:
                right &= extra_sums == file.extra_checksums[run]
            corrupt += key_list(file.keys[run][~right])
            which = run.start + np.flatnonzero(right)
            if space is None and len(which):
                space = stack.enter_context(store.space(recipe))
            if space is not None and len(which):
                _declare(space, file.schema, path)
                rows = row_indices(begins[which], lengths[which], None)
                some = {name: column[rows] for name, column in file.columns.items()}
                count += space.put_stored(file.keys[which], some, offsets_of(lengths[which]))
            if progress is not None:
                progress("import", run.stop, len(file.keys))
        if space is not None:
            space.flush()
    return Imported(recipe.fingerprint, len(file.keys), count, corrupt)


def _declare(space: Space, schema: Schema | None, path: Path) -> None:
    """Have the space's own columns be those of the file."""
    if schema is not None and (found := space.declare(schema)) != schema:
        theirs, ours = ", ".join(schema.names), ", ".join(found.names)
        raise UsageError(
            f"{path} has other columns of its own ({theirs}) than the space ({ours}): import it into another store"
        )


def _arrays_of(path: Path) -> tuple[Mapping[str, str], Mapping[str, NDArray[Any]]]:
    """Return a file's metadata and arrays, mapped."""
    if path.suffix == PARQUET:
        raise UsageError(f"{path} holds keys and token ids, no activations: import a .safetensors or .npz")
    try:
        if path.suffix != ".npz":
            return safetensors.mapped(path)
        with safetensors.open_regular(path) as file:
            arrays = files.mapped(file, str(path))
    except FileNotFoundError:
        raise UsageError(f"cannot read {path}: there is no such file") from None
    metadata = {}
    for name in (VERSION_NAME, RECIPE_NAME, SCHEMA_NAME):
        text = arrays.pop(name, None)
        if text is None and name == SCHEMA_NAME:
            continue
        if text is None or text.dtype != np.uint8 or text.ndim != 1 or len(text) > _MAX_RECIPE:
            raise FormatError(f"{path} was not written by cachectl export: it has no {name}")
        metadata[name] = text.tobytes().decode(errors="replace")
    return metadata, arrays


def _checked(path: Path, metadata: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> _File:
    version = metadata.get(VERSION_NAME, "")
    if version.isdigit() and len(version) < 9 and int(version) > int(VERSIONS[-1]):
        raise FormatVersionError(f"{path} has version {version}, newer than this release: upgrade actcache")
    try:
        if metadata[VERSION_NAME] not in VERSIONS:
            raise ValueError(f"it is of version {metadata[VERSION_NAME]!r}")
        recipe = Recipe.from_json(json.loads(metadata[RECIPE_NAME]))
        of = columns_of(recipe)
        columns = [VALUES, *(name for name in OPTIONAL if name in arrays)]
        extras = any(name not in (VALUES, TOKEN_IDS) for name in columns)
        schema = None
        if OWN in columns:
            schema = Schema.loads(metadata[SCHEMA_NAME].encode(), str(path))
            of = {**of, OWN: ("|u1", (schema.width,))}
        count, rows = len(arrays["keys"]), len(arrays[VALUES])
        expected: dict[str, tuple[str, tuple[int, ...]]] = {
            "keys": ("|u1", (count, 32)),
            "offsets": ("<i8", (count + 1,)),
            "checksums": ("<u8", (count,)),
            **({"extra_checksums": ("<u8", (count,))} if extras else {}),
            **{name: (of[name][0], (rows, *of[name][1])) for name in columns},
        }
        for name, (dtype, shape) in expected.items():
            if arrays[name].dtype.str != dtype or arrays[name].shape != shape:
                found = f"{arrays[name].dtype} {list(arrays[name].shape)}"
                raise ValueError(f"its {name} are {found}, not {np.dtype(dtype)} {list(shape)}")
        keys = np.array(arrays["keys"])
        if len(np.unique(keys, axis=0)) != len(keys):
            raise ValueError("a key stands twice in it")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"{path} was not written by cachectl export: {error}") from None
    offsets = np.array(arrays["offsets"])
    check_offsets(offsets, len(keys), rows, str(path))
    extra_sums = np.array(arrays["extra_checksums"]) if extras else None
    ragged = {name: arrays[name] for name in columns}
    return _File(recipe, keys, offsets, np.array(arrays["checksums"]), extra_sums, ragged, schema)

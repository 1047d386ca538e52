"""A space's entries as one file that other programs read, and back.

The arrays are those of a segment (docs/format.md): ``values`` [T, hidden], ``offsets`` [n + 1], ``keys`` [n, 32],
``checksums`` [n], and ``token_ids`` [T] where all entries have them; the recipe is among the metadata of a safetensors
file, and the bytes of the array ``recipe`` of an npz. Spans, word and type ids stay behind: a migration takes them.
"""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from actcache import checksum, codec, tensorheader
from actcache.errors import FormatError, UsageError
from actcache.inspection import Progress
from actcache.key import Keys, key_array, key_list
from actcache.ragged import TOKEN_IDS, check_offsets, offsets_of
from actcache.reading.checks import check_present
from actcache.recipe import Recipe
from actcache.space import Space
from actcache.storage import tensorfile
from actcache.storage.newfile import check_new, new_file
from actcache.store import Store

_VERSION = "1"
_PART_BYTES = 16 << 20
_FORMATS = (".safetensors", ".npz")


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    entries: int
    nbytes: int  # of the file
    token_ids: bool  # whether they are there


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    fingerprint: str
    entries: int  # of the file
    stored: int  # the others were there
    corrupt: list[bytes]  # keys of entries of the file that fail their checksums: not stored


def export_space(space: Space, path: Path, keys: Keys | None = None, *, progress: Progress | None = None) -> Exported:
    """Write entries to a new file, whole or not at all; rows are streamed, and verified as they are read.

    Args:
        path: ends in ``.safetensors`` or ``.npz``.
        keys: of the entries, in this order; None for all, as they lie.

    Raises:
        UsageError: another name, or the file stands already.
        MissingEntryError: a key is absent.
        CorruptEntryError: an entry fails its checksum; nothing was written.
        OutOfSpaceError, ReadOnlyError, StorageIOError: the file cannot be written.
    """
    if path.suffix not in _FORMATS:
        raise UsageError(f"{path} ends in neither {' nor '.join(_FORMATS)}: the name decides what is written")
    check_new(path)
    wanted = space.in_order(space.key_array()) if keys is None else key_array(keys)
    lengths = space.lengths(wanted)
    check_present(wanted, lengths > 0)
    stored = codec.get(space.recipe.dtype).stored
    has_ids = bool(len(wanted)) and bool(space.has(TOKEN_IDS, wanted).all())
    small: dict[str, NDArray[Any]] = {
        "offsets": offsets_of(lengths),
        "checksums": space.stored_checksums(wanted)[:, 1],
        "keys": wanted,
    }
    shape = (int(lengths.sum()), space.recipe.hidden_size)
    ids = np.empty(shape[0], np.int32) if has_ids else None

    def values() -> Iterator[memoryview]:
        starts = small["offsets"]
        step = max(1, _PART_BYTES // (stored.itemsize * space.recipe.hidden_size))
        cuts = np.unique(np.r_[np.searchsorted(starts, np.arange(0, shape[0], step)), len(wanted)]).tolist()
        for first, last in itertools.pairwise(cuts):
            rows = np.empty((int(starts[last] - starts[first]), shape[1]), stored)
            part = None if ids is None else ids[starts[first] : starts[last]]
            space.read_into(wanted[first:last], rows, token_ids=part)
            if progress is not None:
                progress("export", last, len(wanted))
            yield rows.reshape(-1).view(np.uint8).data

    write = _write_safetensors if path.suffix == ".safetensors" else _write_npz
    with new_file(path) as temporary:
        write(temporary, space.recipe, small, (stored, shape), values, ids)
        nbytes = temporary.stat().st_size
    return Exported(len(wanted), nbytes, has_ids)


Values = Callable[[], Iterator[memoryview]]
Shaped = tuple[np.dtype[np.generic], tuple[int, int]]


def _write_safetensors(
    path: Path, recipe: Recipe, small: Mapping[str, NDArray[Any]], rows: Shaped, values: Values, ids: Any
) -> None:
    described = [(name, array.dtype, array.shape) for name, array in small.items()]
    described.append(("values", *rows))
    if ids is not None:
        described.append((TOKEN_IDS, ids.dtype, ids.shape))
    metadata = {"actcache_export": _VERSION, "recipe": json.dumps(recipe.to_json())}
    with open(path, "xb") as file:
        file.write(tensorheader.dumps(described, metadata, align=8))
        for array in small.values():
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        for piece in values():
            file.write(piece)
        if ids is not None:
            file.write(ids.view(np.uint8).data)


def _write_npz(
    path: Path, recipe: Recipe, small: Mapping[str, NDArray[Any]], rows: Shaped, values: Values, ids: Any
) -> None:
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:

        def member(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], parts: Iterator[Any]) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                _write_npy_header(file, dtype, shape)  # type: ignore[arg-type]
                for part in parts:
                    file.write(part)

        text = np.frombuffer(json.dumps(recipe.to_json()).encode(), np.uint8)
        for name, array in {**small, "recipe": text}.items():
            member(name, array.dtype, array.shape, iter([np.ascontiguousarray(array).tobytes()]))
        member("values", *rows, values())
        if ids is not None:
            member(TOKEN_IDS, ids.dtype, ids.shape, iter([ids.tobytes()]))


def _write_npy_header(file: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


# --- the way back -----------------------------------------------------------------------------------------------------


def import_file(store: Store, path: Path, *, progress: Progress | None = None) -> Imported:
    """Store the entries of a safetensors file that ``export_space`` wrote; what is there is skipped.

    Each entry is compared with its checksum, which binds it to its key and recipe. The file is mapped, not loaded.

    Raises:
        UsageError: the file is not there.
        FormatError: it is no such file.
        StoreError: read-only, disk full, ...; run it again to go on.
    """
    try:
        metadata, arrays = tensorfile.mapped(path)
    except FileNotFoundError:
        raise UsageError(f"cannot read {path}: there is no such file") from None
    recipe, keys, offsets = _checked(path, metadata, arrays)
    values, ids = arrays["values"], arrays.get(TOKEN_IDS)
    lengths, begins = np.diff(offsets), offsets[:-1]
    seed = checksum.space_seed(recipe.fingerprint, recipe.dtype, recipe.hidden_size)
    stored = codec.get(recipe.dtype)
    step = max(1, _PART_BYTES // (values.dtype.itemsize * recipe.hidden_size))
    cuts = np.unique(np.r_[np.searchsorted(offsets, np.arange(0, len(values), step)), len(keys)]).tolist()
    corrupt: list[bytes] = []
    count = 0
    with store.space(recipe) as space:
        for first, last in itertools.pairwise(cuts):
            part = slice(first, last)
            seeds = checksum.entry_seeds(seed, keys[part], lengths[part], has_token_ids=ids is not None)
            columns = [values] if ids is None else [ids, values]
            sums = checksum.chain(seeds.tolist(), columns, begins[part], lengths[part])
            right = np.array(sums, np.uint64) == arrays["checksums"][part]
            corrupt += key_list(keys[part][~right])
            which = (first + np.flatnonzero(right)).tolist()
            rows = [stored.decode(np.array(values[offsets[i] : offsets[i + 1]])) for i in which]
            some = None if ids is None else [np.array(ids[offsets[i] : offsets[i + 1]]) for i in which]
            count += space.put(keys[which], rows, some)
            if progress is not None:
                progress("import", last, len(keys))
        space.flush()
    return Imported(recipe.fingerprint, len(keys), count, corrupt)


def _checked(
    path: Path, metadata: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]
) -> tuple[Recipe, NDArray[np.uint8], NDArray[np.int64]]:
    try:
        if metadata["actcache_export"] != _VERSION:
            raise ValueError(f"it is of version {metadata['actcache_export']!r}")
        recipe = Recipe.from_json(json.loads(metadata["recipe"]))
        expected = {
            "keys": ("|u1", 2),
            "offsets": ("<i8", 1),
            "checksums": ("<u8", 1),
            "values": (codec.get(recipe.dtype).stored.str, 2),
            **({TOKEN_IDS: ("<i4", 1)} if TOKEN_IDS in arrays else {}),
        }
        for name, (dtype, dimensions) in expected.items():
            if arrays[name].dtype.str != dtype or arrays[name].ndim != dimensions:
                raise ValueError(f"its {name} are {arrays[name].dtype} {list(arrays[name].shape)}")
        keys, values = arrays["keys"], arrays["values"]
        if keys.shape[1] != 32 or values.shape[1] != recipe.hidden_size or len(arrays["checksums"]) != len(keys):
            raise ValueError("its arrays do not fit together")
        if TOKEN_IDS in arrays and len(arrays[TOKEN_IDS]) != len(values):
            raise ValueError("its token ids do not fit its rows")
        if len(np.unique(keys, axis=0)) != len(keys):
            raise ValueError("a key stands twice in it")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"{path} was not written by cachectl export: {error}") from None
    check_offsets(arrays["offsets"], len(keys), len(values), str(path))
    return recipe, np.ascontiguousarray(keys), np.array(arrays["offsets"])

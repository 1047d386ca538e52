"""The zarr backend: one zarr v3 group a segment, in a folder; every array is one shard of uncompressed row blocks.

The blocks of a shard lie one after another from the first byte of its file, so an entry is one extent of it and the
core reads it without zarr. zarr-python writes the metadata. The shards are written here: zarr-python takes 6 to 12
times as long as a plain write with fsync and nearly twice the rows' memory (3.1.6, 256 MiB), leaves out blocks of zeros
unless it is told otherwise, and does not promise the order of the blocks (3.1.0 has another).

Segments are described without zarr-python, which would load whatever codec a stranger's metadata name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from actcache.backend import Block, Extent, Layout, SegmentFiles, SegmentFormat
from actcache.errors import FormatError
from actcache.format.ragged import pieces
from actcache.io.files import write_flowing

_BLOCK_BYTES = 1 << 20  # what zarr reads at least for a row
_MOST_BLOCKS = 1 << 16  # of a shard: bounds the index that is read and compared
_MOST_METADATA = 1 << 16  # bytes of a zarr.json
_CHECKSUM_BYTES = 4
_METADATA = "zarr.json"
_KEYS = {"name": "default", "configuration": {"separator": "."}}  # "/" would add two folders to sync an array
_DTYPES = {
    dtype.name: dtype.newbyteorder("<").str
    for dtype in map(np.dtype, ("f2", "f4", "i1", "u1", "u2", "u4", "i4", "i8", "u8"))
}
_KNOWN = {  # members of an array's zarr.json; others may change what its bytes mean
    *("zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs"),
    *("fill_value", "attributes", "dimension_names", "storage_transformers"),
}


class ZarrFormat(SegmentFormat):
    """Segments as folders of zarr v3, which docs/format.md describes."""

    name = "zarr"
    suffix = ".zarr"
    commit = _METADATA

    def write(self, path: Path, block: Block, metadata: Mapping[str, str]) -> None:
        # zarr-python writes in a thread of its own, and goes on when an interrupt has ended the wait for it: only into
        # this memory, or the folder would be there again after its removal.
        described: dict[str, Buffer] = {}
        group = zarr.create_group(MemoryStore(described), zarr_format=3, attributes=dict(metadata))
        for name, array in block.arrays().items():
            rows, trailing = array.shape[0], array.shape[1:]
            target = max(_BLOCK_BYTES, -(-array.nbytes // _MOST_BLOCKS))
            # Blocks of equal size: only whole ones can be stored, and this pads by less than a row each.
            block_rows = max(1, -(-rows // max(1, -(-array.nbytes // target))))
            blocks = max(1, -(-rows // block_rows))
            group.create_array(
                name,
                shape=array.shape,
                dtype=array.dtype,
                chunks=(block_rows, *trailing),
                shards=(blocks * block_rows, *trailing),
                compressors=None,
                filters=None,
                fill_value=0,
                chunk_key_encoding=_KEYS,  # type: ignore[arg-type]
            )
            row_bytes = array.dtype.itemsize * math.prod(trailing)
            (path / name).mkdir(parents=True)
            with open(path / _shard(name, len(array.shape)), "xb", buffering=0) as file:
                end = bytes((blocks * block_rows - rows) * row_bytes) + _index(blocks, block_rows * row_bytes)
                write_flowing(file.fileno(), chain(pieces(array), [memoryview(end)]))
        for key, document in described.items():
            (path / key).write_bytes(document.to_bytes())

    def layout(self, files: SegmentFiles) -> Layout:
        group = _metadata(files, "")
        if (group.get("zarr_format"), group.get("node_type")) != (3, "group"):
            raise FormatError(f"{files.where} is no zarr v3 group; this is no segment")
        attributes = group.get("attributes", {})
        if not (isinstance(attributes, dict) and all(isinstance(text, str) for text in attributes.values())):
            raise FormatError(f"{files.where} is damaged: its attributes are no texts")
        names = {name.partition("/")[0] for name in files.names()} - {_METADATA}
        return Layout({name: _extent(files, name) for name in sorted(names)}, attributes)


def _shard(name: str, dimensions: int) -> str:
    return f"{name}/{'.'.join(['c', *'0' * dimensions])}"


def _index(blocks: int, block_bytes: int) -> bytes:
    """Return the index of a shard whose blocks lie one after another: ``(offset, nbytes)`` of each, then its CRC."""
    index = np.full((blocks, 2), block_bytes, "<u8")
    index[:, 0] = np.arange(blocks, dtype=np.uint64) * np.uint64(block_bytes)
    return index.tobytes() + _crc32c(index.tobytes()).to_bytes(_CHECKSUM_BYTES, "little")


def _table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return table


_TABLE = _table()


def _crc32c(data: bytes) -> int:
    """Return the CRC-32C of a shard's index: 0.3 ms for 256 blocks, and zarr's own libraries for it have changed."""
    value = 0xFFFFFFFF
    for byte in data:
        value = _TABLE[(value ^ byte) & 0xFF] ^ value >> 8
    return value ^ 0xFFFFFFFF


# --- describing what a stranger may have written ---------------------------------------------------------------------


def _metadata(files: SegmentFiles, folder: str) -> dict[str, Any]:
    """Return what the zarr.json of a group or array says."""
    name = f"{folder}/{_METADATA}" if folder else _METADATA
    text = files.read(name, 0, _MOST_METADATA + 1)
    if len(text) > _MOST_METADATA:
        raise FormatError(f"{files.where}: {name} has more than {_MOST_METADATA} bytes; this is no segment")
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{files.where} is damaged: {name} is no JSON ({error})") from None
    if not isinstance(metadata, dict):
        raise FormatError(f"{files.where} is damaged: {name} is no object")
    return metadata


def _extent(files: SegmentFiles, name: str) -> Extent:
    metadata = _metadata(files, name)
    try:
        dtype, shape, block_rows, shard_rows = _parsed(metadata)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"{files.where}: {name!r} is no array of one shard of plain row blocks ({error!r:.200})"
        ) from None
    extent = Extent(_shard(name, len(shape)), 0, dtype, shape)
    blocks, block_bytes = shard_rows // block_rows, block_rows * extent.row_bytes
    index_bytes = 16 * blocks + _CHECKSUM_BYTES
    # The size first: then all that is allocated below is bounded by it, and by the most blocks.
    size = files.size(extent.path)
    if size != blocks * block_bytes + index_bytes:
        raise FormatError(f"{files.where}: the shard of {name!r} has {size} bytes; it is truncated or of another shape")
    if files.read(extent.path, size - index_bytes, index_bytes) != _index(blocks, block_bytes):
        raise FormatError(f"{files.where}: the index of {name!r} is damaged, or its blocks are not one after another")
    return extent


def _parsed(metadata: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """Return an array's dtype, shape, rows of a block and rows of the shard.

    Other metadata raise KeyError, TypeError, ValueError or AttributeError.
    """
    dtype = _DTYPES[metadata["data_type"]]
    shape = _sizes(metadata["shape"])
    (sharding,) = metadata["codecs"]
    grid, config = _named(metadata["chunk_grid"], "regular"), _named(sharding, "sharding_indexed")
    (shard_rows, *shard_trailing), (block_rows, *trailing) = _sizes(grid["chunk_shape"]), _sizes(config["chunk_shape"])
    plain = ({"endian": "little"},) if np.dtype(dtype).itemsize > 1 else ({"endian": "little"}, {"endian": "big"}, {})
    (codec,) = config["codecs"]
    index_codec, index_checksum = config["index_codecs"]
    good = (
        (metadata["zarr_format"], metadata["node_type"]) == (3, "array")
        and metadata.keys() <= _KNOWN
        and not metadata.get("storage_transformers")
        and _named(metadata["chunk_key_encoding"], "default").get("separator") == "."
        and _named(codec, "bytes") in plain
        and _named(index_codec, "bytes") == {"endian": "little"}
        and _named(index_checksum, "crc32c") == {}
        and config.get("index_location", "end") == "end"
        and config.keys() <= {"chunk_shape", "codecs", "index_codecs", "index_location"}
        and shard_trailing == trailing == list(shape[1:])
        and shape[0] <= shard_rows <= block_rows * _MOST_BLOCKS
        and shard_rows % block_rows == 0
    )
    if not good:
        raise ValueError("other codecs, or other chunks")
    return dtype, shape, block_rows, shard_rows


def _sizes(value: Any) -> tuple[int, ...]:
    if not (isinstance(value, list) and 0 < len(value) < 8 and all(type(n) is int and n > 0 for n in value)):
        raise ValueError("sizes that are no sizes")
    return tuple(value)


def _named(value: Any, name: str) -> dict[str, Any]:
    """Return the configuration of a codec, chunk grid or key encoding, which may be written as its bare name."""
    given, config = (value, {}) if isinstance(value, str) else (value["name"], value.get("configuration", {}))
    if given != name or not isinstance(config, dict):
        raise ValueError(f"no {name}")
    return config


backend = ZarrFormat()

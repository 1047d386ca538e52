"""The safetensors backend: one safetensors file a segment, which is what ``s3://`` and its like store.

The small arrays come first, behind the header, so that one request for the head of an object opens a segment. The rows
begin on a page; the arrays whose lengths are odd stand behind them, or nothing could be aligned: safetensors has no
holes. The core brings the object store; this format needs no library.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from actcache.backend import Block, Layout, SegmentFiles, SegmentFormat
from actcache.errors import FormatError
from actcache.format import safetensors
from actcache.format.ragged import pieces

_PAGE = 4096
_MOST_HEADER = 1 << 20
#: What is looked for first stands first; two numbers a row (spans) just before the rows, on a multiple of eight.
_ORDER = (
    *("offsets", "checksums", "extra_checksums", "origins_checksum", "keys", "origin", "origin_entries"),
    *("payload_offsets", "token_ids", "word_ids", "spans"),
)


class SafetensorsFormat(SegmentFormat):
    """Segments as safetensors files, which docs/format.md describes."""

    name = "safetensors"
    suffix = ".safetensors"

    def write(self, path: Path, block: Block, metadata: Mapping[str, str]) -> None:
        arrays = block.arrays()
        rows = next(iter(arrays))
        first = {name: arrays[name] for name in _ORDER if name in arrays}
        lead = sum(column.nbytes for column in first.values())
        arrays = first | {rows: arrays[rows]} | dict(arrays)
        described = [(name, column.dtype, tuple(column.shape)) for name, column in arrays.items()]
        with open(path, "xb") as file:
            file.write(safetensors.header(described, metadata, align=_PAGE, lead=lead))
            for column in arrays.values():
                for piece in pieces(column):
                    file.write(piece)

    def layout(self, files: SegmentFiles) -> Layout:
        head = files.read("", 0, safetensors.LENGTH_BYTES)
        size = files.size("")
        try:
            length = safetensors.header_length(head, size, _MOST_HEADER)
            text = files.read("", safetensors.LENGTH_BYTES, length)
            if len(text) != length:
                raise ValueError("it ends inside of its header")
            metadata, extents = safetensors.parse_header(text, size)
        except ValueError as error:
            raise FormatError(f"{files.where} is truncated or no safetensors file: {error}") from None
        return Layout(extents, metadata)


backend = SafetensorsFormat()

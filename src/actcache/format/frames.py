"""Frames: the rows of each entry compressed by zstd, one after another, as ``payload``.

The bytes of an entry's numbers are shuffled first, and each plane of them is a frame: all first bytes, then all second
ones, ... What the upper bytes of floats have in common, sign and exponent, then stands together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from actcache.errors import FormatError
from actcache.format.ragged import PAYLOAD, VALUES, Block, offsets_of, pieces, runs
from actcache.io import loops

_PIECE_BYTES = 8 << 20  # of rows that are compressed at a time


def compressed(block: Block) -> Block:
    """Return a block with frames in the place of its values, which are an array."""
    values = block.columns[VALUES]
    rows = np.frombuffer(b"".join(pieces(values)), np.uint8) if not isinstance(values, np.ndarray) else values
    row_bytes = values.dtype.itemsize * int(np.prod(values.shape[1:]))
    data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    begins, parts, sizes = block.offsets * row_bytes, [np.empty(0, np.uint8)], [np.empty(0, np.int64)]
    for run in runs(np.diff(begins), _PIECE_BYTES):
        edges = np.ascontiguousarray(begins[run.start : run.stop + 1])
        frames = loops.frames_of(data, edges, values.dtype.itemsize)
        parts.append(np.concatenate(frames))
        sizes.append(np.array([len(frame) for frame in frames], np.int64))
    columns = {PAYLOAD: np.concatenate(parts), **{n: c for n, c in block.columns.items() if n != VALUES}}
    return replace(block, columns=columns, payload_offsets=offsets_of(np.concatenate(sizes)))


def sizes_of(entries: Sequence[NDArray[np.generic]]) -> NDArray[np.int64]:
    """Return the bytes that the frames of each of these entries' stored rows, ``[tokens, width]``, take."""
    sizes = np.zeros(len(entries), np.int64)
    for i, rows in enumerate(entries):
        flat = np.ascontiguousarray(rows)
        (frames,) = loops.frames_of(flat, np.array([0, flat.nbytes]), flat.itemsize)
        sizes[i] = len(frames)
    return sizes


def check_offsets(offsets: NDArray[np.int64], entries: int, nbytes: int, where: str) -> None:
    """Refuse offsets that do not cut ``nbytes`` into ``entries`` frames: a ``FormatError``, naming ``where``."""
    ends = [*offsets[:1], *offsets[-1:]]
    if len(offsets) != entries + 1 or ends != [0, nbytes] or not (np.diff(offsets) > 0).all():
        raise FormatError(f"{where}: its payload offsets do not cut {nbytes} bytes into {entries} frames")

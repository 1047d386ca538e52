"""The loops of the read path in NumPy: for machines without the compiled ones, and what the tests hold those against.

The functions take what those of ``actcache.io.loops`` take.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.errors import requires_extra

_PRIMES = np.array(
    [0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5], np.uint64
)
_PAGE = 4096
_INTACT, _CORRUPT, _OUTSIDE, _SHORT, _FAILED, _NOWHERE = range(6)


# --- looking up -------------------------------------------------------------------------------------------------------


def find(
    table: Any, prefix: NDArray[np.uint64], rest: NDArray[np.uint8], alive: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """Return the position of each key's served copy in a table, ``[n]``, -1 where no position that is ``alive`` has
    it."""
    found = np.full(len(prefix), -1, np.int64)
    size = len(table.prefix)
    if not size:
        return found
    # Sorted queries walk the table once instead of jumping about in it.
    open_queries = np.argsort(prefix)
    position = np.searchsorted(table.prefix, prefix[open_queries])
    while len(open_queries):
        inside = position < size
        open_queries, position = open_queries[inside], position[inside]
        same = table.prefix[position] == prefix[open_queries]
        open_queries, position = open_queries[same], position[same]
        hit = (table.rest[position] == rest[open_queries]).all(axis=1)
        if alive is not None:
            hit &= alive[position]
        found[open_queries[hit]] = position[hit]
        # What is left shares its prefix with another key, or its latest copy is deleted.
        open_queries, position = open_queries[~hit], position[~hit] + 1
    return found


def locate(
    tables: Sequence[Any], limits: NDArray[np.int64], names: NDArray[np.int64], keys: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64], int]:
    prefix, rest = keys[:, :8].copy().view(">u8").reshape(-1).astype(np.uint64), keys[:, 8:]
    count, outside = len(keys), 0
    tokens, checksums = np.zeros(count, np.int64), np.zeros(count, np.uint64)
    segment, row, best = np.full((3, count), -1, np.int64)
    for table in tables:
        position = find(table, prefix, rest, table.alive)
        which = np.flatnonzero(position >= 0)
        position = position[which]
        of, origin = (
            np.zeros(len(position), np.int64) if array is None else array[position].astype(np.int64)
            for array in (table.segment, table.origin)
        )
        begin, length = table.row[position], table.tokens[position].astype(np.int64)
        inside = (of < len(table.numbers)) & (origin < len(table.ranks)) & (begin >= 0) & (length > 0)
        number = np.full(len(of), -1, np.int64)
        number[inside] = table.numbers[of[inside]]
        inside &= (number >= 0) & (number < len(limits))
        inside[inside] = begin[inside] <= limits[number[inside]] - length[inside]
        outside += int((~inside).sum())
        which, position, number, origin = which[inside], position[inside], number[inside], origin[inside]
        place = table.ranks[origin] * len(limits) + names[number]
        better = place > best[which]
        which, position, number = which[better], position[better], number[better]
        tokens[which], checksums[which] = table.tokens[position], table.checksum[position]
        segment[which], row[which], best[which] = number, table.row[position], place[better]
    return tokens, checksums, segment, row, outside


# --- rows -------------------------------------------------------------------------------------------------------------


def gather(
    columns: Sequence[Any],
    lengths: NDArray[np.int64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    digests: Any,
    direct: bool,
    state: NDArray[np.uint8],
) -> None:
    data = [None if column.memory is None else _bytes(column.memory) for column in columns]
    outs = [None if column.out is None or column.placing is not None else _bytes(column.out) for column in columns]
    for i, length in enumerate(lengths.tolist()):
        rows = []
        for column, memory, out in zip(columns, data, outs, strict=True):
            nbytes, begin = length * column.row_bytes, int(starts[i]) * column.row_bytes
            own = None if out is None else out[begin : begin + nbytes]
            if column.placing is not None and column.out is not None:
                own = np.empty(nbytes, np.uint8)
            if length > ends[i] - starts[i]:
                state[i] = _OUTSIDE
                continue
            if length and not state[i]:
                bring = _bring if column.sizes is None else _bring_frame
                state[i] = bring(column, memory, own, i, nbytes, direct)
            if length and not state[i] and column.placing is not None and own is not None:
                state[i] = _put(column, i, own.reshape(length, -1), int(starts[i]))
            if length and not state[i]:
                rows.append(own if memory is None or own is not None else memory[int(column.begins[i]) :][:nbytes])
            if out is not None:
                out[begin + nbytes : int(ends[i]) * column.row_bytes] = 0
        if digests is not None and length and not state[i]:
            state[i] = _compare(digests, rows, i, length)


def _put(column: Any, i: int, rows: NDArray[np.uint8], start: int) -> int:
    out, placing = column.out, column.placing
    if hasattr(placing, "targets"):
        targets = placing.targets[start : start + len(rows)]
        if targets.min() < 0 or targets.max() >= len(out):
            return _NOWHERE
        out[targets] = rows.view(out.dtype).reshape(-1, *out.shape[1:])
        return _INTACT
    if i >= len(out):
        return _NOWHERE
    if placing.how == "at":
        if not 0 <= placing.at[i] < len(rows):
            return _NOWHERE
        out[i] = rows[placing.at[i]].view(out.dtype).reshape(out.shape[1:])
        return _INTACT
    if placing.form == "bfloat16":
        numbers = (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        numbers = rows.view({"float32": "<f4", "float16": "<f2"}[placing.form])
    out[i] = numbers.mean(axis=0, dtype=np.float64) if placing.how == "mean" else numbers.max(axis=0)
    return _INTACT


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return array.reshape(-1).view(np.uint8)


def _bring(column: Any, memory: Any, out: Any, i: int, nbytes: int, direct: bool) -> int:
    if column.files is not None:
        return _OUTSIDE if out is None else _read(int(column.files[i]), int(column.places[i]), out, direct)
    begin = -1 if memory is None else int(column.begins[i])
    if begin < 0 or begin > len(memory) - nbytes:
        return _OUTSIDE
    if out is not None:
        out[:] = memory[begin : begin + nbytes]
    return _INTACT


def _bring_frame(column: Any, memory: Any, out: Any, i: int, nbytes: int, direct: bool) -> int:
    """Make rows of an entry's frames; what one says of its size is looked at before it is believed."""
    size, item = int(column.sizes[i]), column.item
    if out is None or nbytes % item:
        return _OUTSIDE
    if not 0 < size <= nbytes + nbytes // 128 + 512 * item:
        return _CORRUPT
    frames = np.empty(size, np.uint8)
    state = _bring(column._replace(sizes=None), memory, frames, i, size, direct)
    if state:
        return state
    module, left = zstandard(), frames.tobytes()
    for plane in out.reshape(-1, item).T:
        try:
            if module.frame_content_size(left) != len(plane):
                return _CORRUPT
            decoder = module.ZstdDecompressor().decompressobj()
            plane[:] = np.frombuffer(decoder.decompress(left), np.uint8)
        except (module.ZstdError, ValueError):
            return _CORRUPT
        left = decoder.unused_data
    return _CORRUPT if left else _INTACT


def _read(file: int, place: int, out: NDArray[np.uint8], direct: bool) -> int:
    if direct:  # whole pages, from memory that begins at one: a file object's own mapping does
        import mmap

        begin, end = place // _PAGE * _PAGE, -(-(place + len(out)) // _PAGE) * _PAGE
        with mmap.mmap(-1, end - begin) as pages:
            brought = os.preadv(file, [pages], begin) - (place - begin)
            if brought < len(out):
                return _SHORT
            out[:] = np.frombuffer(pages[place - begin : place - begin + len(out)], np.uint8)
        return _INTACT
    view = out.data
    while view:
        count = os.preadv(file, [view], place)
        if not count:
            return _SHORT
        view, place = view[count:], place + count
    return _INTACT


def first_seeds(seed: int, keys: NDArray[np.uint8], lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the first seed of each entry's chain, ``[n]``."""
    words = np.ascontiguousarray(keys).view("<u8").astype(np.uint64, copy=False)
    mixed: NDArray[np.uint64] = np.bitwise_xor.reduce(words * _PRIMES[:4], axis=1)
    mixed ^= lengths.astype(np.uint64) * _PRIMES[4]
    mixed ^= np.uint64(seed)
    return mixed


def _compare(digests: Any, rows: list[Any], i: int, length: int) -> int:
    if digests.keys is not None:
        digest = int(first_seeds(digests.seed, digests.keys[i : i + 1], np.array([length]))[0])
    else:
        digest = int(digests.seeds[i])
    state = _INTACT
    for part, sums, expected in (
        (rows[: digests.chained], digests.sums, digests.expected),
        (rows[digests.chained :], digests.more, digests.expected_more),
    ):
        for data in part:
            digest = xxhash.xxh3_64_intdigest(data.data, digest)
        if not part:  # what the next one begins with is known without it
            digest = digest if expected is None else int(expected[i])
            continue
        if sums is not None:
            sums[i] = digest
        if expected is not None:
            state = _CORRUPT if digest != int(expected[i]) else state
            digest = int(expected[i])
    return state


# --- mixing -----------------------------------------------------------------------------------------------------------

_64_BITS = 2**64 - 1


def permutation(count: int, seed: int) -> NDArray[np.int64]:
    order = [0] * count
    for i in range(count):
        seed = seed + 0x9E3779B97F4A7C15 & _64_BITS
        drawn = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
        drawn = (drawn ^ drawn >> 27) * 0x94D049BB133111EB & _64_BITS
        other = (drawn ^ drawn >> 31) * (i + 1) >> 64
        order[i], order[other] = order[other], i
    return np.array(order, np.int64)


# --- rows of codes with a scale a token -------------------------------------------------------------------------------

_SMALLEST_SCALE = {"int8": np.finfo(np.float32).tiny, "float8_e4m3": np.float32(1e-12)}
_LARGEST_E4M3 = np.float32(448)


def e4m3_numbers() -> NDArray[np.float32]:
    """Return the numbers of all 256 codes: sign, 4 bits of exponent, 3 of mantissa; no infinities, two NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(1.0 * mantissa, -9))
    size[code & 127 == 127] = np.nan
    numbers: NDArray[np.float32] = np.where(code & 128, -size, size).astype(np.float32)
    return numbers


# The shapes of int8 rows (docs/format.md), by the lowest byte of a row's scale: the first code beyond which a step is
# ``RATIOS`` scales, not one.
_SHAPES = np.arange(256)
IS_SHAPE = (_SHAPES == 0) | ((_SHAPES >= 16) & (_SHAPES % 16 < 15))
KNEES = np.where(_SHAPES == 0, 127, _SHAPES // 16 * 8).astype(np.int32)
RATIOS = np.where(_SHAPES == 0, 1, (2 + _SHAPES % 2) << (_SHAPES % 16 // 2)).astype(np.int32)
RANGES = KNEES + RATIOS * (127 - KNEES)  # what the largest code means, in scales

_BINS = 192  # sixteenths of an octave below a row's largest number
_CANDIDATES = np.flatnonzero(IS_SHAPE)
_SMALLEST_TO_SHAPE = np.float32(1e-30)
_ROWS_AT_A_TIME = 1024


def _bins(shares: NDArray[np.float32]) -> NDArray[np.int64]:
    below = (np.float32(1).view(np.uint32) >> 19).astype(np.int64) - ((shares.view(np.uint32) & 0x7FFFFFFF) >> 19)
    bins: NDArray[np.int64] = below.clip(0, _BINS - 1)
    return bins


def _shapes_for(rows: NDArray[np.float32], largest: NDArray[np.float32]) -> NDArray[np.intp]:
    """Return for each row of int8 the shape by which its squared error should be the least, ``[n]``."""
    count, hidden = rows.shape
    shares = rows * (np.float32(1) / np.maximum(largest, _SMALLEST_TO_SHAPE))
    bins = _bins(shares.astype(np.float32, copy=False))
    counts = np.bincount((bins + np.arange(count)[:, None] * _BINS).reshape(-1), minlength=count * _BINS)
    before = np.zeros((count, _BINS + 1), np.int64)
    before[:, 1:] = counts.reshape(count, _BINS).cumsum(axis=1)
    ranges, ratios = RANGES[_CANDIDATES].astype(np.float64), RATIOS[_CANDIDATES].astype(np.int64)
    beyond = before[:, _bins((KNEES[_CANDIDATES] / ranges).astype(np.float32))]
    steps = hidden - 1 + (beyond - 1) * (ratios * ratios - 1)  # squared; the largest number has a code
    best = _CANDIDATES[(1 / (ranges * ranges) * steps).argmin(axis=1)]
    scales = _scales_of_int8(largest, np.zeros_like(best))
    linear = (np.rint(rows / scales) * scales == rows).all(axis=1)
    return np.where(linear | (largest[:, 0] < _SMALLEST_TO_SHAPE), 0, best)


def _scales_of_int8(largest: NDArray[np.float32], shapes: NDArray[np.intp]) -> NDArray[np.float32]:
    """Return scales of 16 digits, rounded up, ``[n, 1]``."""
    scales = largest / RANGES[shapes, None].astype(np.float32)
    scales = ((scales.view(np.uint32) + np.uint32(0xFF)) & np.uint32(0xFFFFFF00)).view(np.float32)
    return np.maximum(scales, _SMALLEST_SCALE["int8"])


def int8_numbers(codes: NDArray[np.int8], shapes: NDArray[np.intp]) -> NDArray[np.float32]:
    """Return what codes ``[n, hidden]`` of rows of these shapes ``[n]`` mean, in scales."""
    knees, wide = KNEES[shapes, None], codes.astype(np.int32)
    within = np.clip(wide, -knees, knees)
    return (within + RATIOS[shapes, None] * (wide - within)).astype(np.float32)


def widen(stored: NDArray[np.uint8], code: str, out: NDArray[Any], form: str) -> int:
    hidden = out.shape[1]
    codes, tails = stored[:, :hidden], stored[:, hidden:].copy().view("<u4").astype(np.uint32)
    good = np.ones(len(stored), np.bool_)
    with np.errstate(over="ignore", invalid="ignore"):
        if code == "int8":
            shapes, scales = (tails[:, 0] & 0xFF).astype(np.intp), (tails & np.uint32(0xFFFFFF00)).view(np.float32)
            rows, good = int8_numbers(codes.view(np.int8), shapes) * scales, IS_SHAPE[shapes]
        else:
            scales = tails.view(np.float32)
            rows = e4m3_numbers()[codes] * scales
        if form == "bfloat16":
            bits = rows.view(np.uint32)
            out.view(np.uint16)[:] = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
            finite = np.isfinite(rows) & ((out.view(np.uint16) & 0x7F80) != 0x7F80)
        else:
            out[:] = rows
            finite = np.isfinite(out)
    return int((~finite.all(axis=1) | ~np.isfinite(scales[:, 0]) | ~good).sum())


def narrow(rows: NDArray[np.float32], out: NDArray[np.uint8], code: str) -> int:
    narrow_some = _narrow_int8 if code == "int8" else _narrow_e4m3
    with np.errstate(over="ignore", invalid="ignore"):
        return sum(
            narrow_some(rows[first : first + _ROWS_AT_A_TIME], out[first : first + _ROWS_AT_A_TIME])
            for first in range(0, len(rows), _ROWS_AT_A_TIME)
        )


def _narrow_int8(rows: NDArray[np.float32], out: NDArray[np.uint8]) -> int:
    hidden = rows.shape[1]
    good = np.logical_and.reduce(np.isfinite(rows), axis=1)
    some = rows[good]
    largest = np.abs(some).max(axis=1, keepdims=True, initial=0)
    shapes = _shapes_for(some, largest)
    scales = _scales_of_int8(largest, shapes)
    scaled = some / scales
    sizes, knees = np.abs(scaled), KNEES[shapes, None].astype(np.float32)
    beyond = knees + np.rint((sizes - knees) / RATIOS[shapes, None].astype(np.float32))
    codes = np.minimum(np.where(sizes > knees, beyond, np.rint(sizes)), 127)
    made = np.empty((len(some), out.shape[1]), np.uint8)
    made[:, :hidden] = np.copysign(codes, scaled).astype(np.int8).view(np.uint8)
    made[:, hidden:] = (scales.view(np.uint32) | shapes[:, None].astype(np.uint32)).astype("<u4").view(np.uint8)
    fits = np.isfinite(scales * RANGES[shapes, None].astype(np.float32))[:, 0]
    good[good] = fits
    out[good] = made[fits]
    return int((~good).sum())


def _narrow_e4m3(rows: NDArray[np.float32], out: NDArray[np.uint8]) -> int:
    hidden = rows.shape[1]
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0)
    scales = np.maximum(largest / _LARGEST_E4M3, _SMALLEST_SCALE["float8_e4m3"])
    good = np.isfinite(rows).all(axis=1) & np.isfinite(scales * _LARGEST_E4M3)[:, 0]
    bits = (rows[good] / scales[good]).view(np.uint32)
    size = bits & np.uint32(0x7FFFFFFF)
    usual = ((size + np.uint32(0x7FFFF) + (size >> 20 & 1)) >> 20) - np.uint32(960)
    small = np.rint(np.minimum(size.view(np.float32), 1) * np.float32(512)).astype(np.uint32)
    out[good, :hidden] = (np.where(size < 0x3C800000, small, usual) | (bits >> 24 & 0x80)).astype(np.uint8)
    out[good, hidden:] = scales[good].astype("<f4").view(np.uint8)
    return int((~good).sum())


# --- frames of zstd ---------------------------------------------------------------------------------------------------


def zstandard() -> Any:
    """Return the package; ``MissingExtraError`` where it is not there."""
    with requires_extra("zstd", "reading and writing compressed spaces"):
        import zstandard as module
    return module


def frames_of(data: NDArray[np.uint8], begins: NDArray[np.int64], item: int) -> list[NDArray[np.uint8]]:
    encoder = zstandard().ZstdCompressor(level=1)
    frames = []
    for begin, end in itertools.pairwise(begins.tolist()):
        planes = np.ascontiguousarray(data[begin:end].reshape(-1, item).T)
        frames.append(np.frombuffer(b"".join(encoder.compress(plane) for plane in planes), np.uint8))
    return frames

"""Ways to store rows that were measured and left out, in NumPy: what they make of rows, and the bits they take.

Each is a function from rows ``[tokens, hidden]`` to what would be read back, and bits a number. Two are limits: the
256 numbers that are best for a document, which are not counted; and normal noise of the size that eight bits a number
leave at least of a normal source, by rate-distortion theory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]
Variant = Callable[[Rows], tuple[Rows, float]]


def by_groups(rows: Rows, *, levels: int, group: int, bits: int, scale_bits: int) -> tuple[Rows, float]:
    """A scale for each token and group of channels; one for all of them where there are no more."""
    tokens, hidden = rows.shape
    group = min(group, hidden)
    padded = np.zeros((tokens, -(-hidden // group) * group), np.float32)
    padded[:, :hidden] = rows
    cut = padded.reshape(tokens, -1, group)
    scales = np.maximum(np.abs(cut).max(axis=2, keepdims=True) / levels, 1e-30)
    if scale_bits == 16:
        scales = np.maximum(scales.astype(np.float16).astype(np.float32), np.float32(6e-8))
    codes = np.clip(np.rint(cut / scales), -levels, levels)
    return (codes * scales).reshape(tokens, -1)[:, :hidden], bits + scale_bits / group


def outliers_apart(rows: Rows, *, levels: int, bits: int, kept: int) -> tuple[Rows, float]:
    """The largest numbers of each token as float16 with their places, the others with a scale a token."""
    hidden = rows.shape[1]
    largest = np.argpartition(np.abs(rows), -kept, axis=1)[:, -kept:]
    rest = rows.copy()
    np.put_along_axis(rest, largest, 0, axis=1)
    found, _ = by_groups(rest, levels=levels, group=hidden, bits=bits, scale_bits=32)
    np.put_along_axis(found, largest, np.take_along_axis(rows, largest, axis=1).astype(np.float16), axis=1)
    return found, bits + (32 + 32 * kept) / hidden


def rotated(rows: Rows, *, then: Variant) -> tuple[Rows, float]:
    """A Hadamard rotation with random signs before another way, and back after it; of the largest powers of two that
    the columns can be cut into."""
    hidden = rows.shape[1]
    size = hidden & -hidden
    signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), hidden)
    matrix = _hadamard(size)

    def turned(given: Rows) -> Rows:
        return (given.reshape(len(given), -1, size) @ matrix).reshape(len(given), hidden)

    found, bits = then(turned(rows * signs))
    return turned(found) * signs, bits


@functools.cache
def _hadamard(size: int) -> Rows:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.sqrt(size)).astype(np.float32)


def best_levels(rows: Rows, *, levels: int = 256, rounds: int = 30) -> tuple[Rows, float]:
    """A scale for each token, its norm, and below it the numbers that are best for all of a document's rows (Lloyd's
    algorithm, from where Panter and Dite have them lie)."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    flat = np.sort((rows / norms).reshape(-1).astype(np.float64))
    spaced = np.cumsum(np.diff(flat) ** (2 / 3))  # densest as the cube root of the density
    numbers = flat[np.searchsorted(spaced, (np.arange(levels) + 0.5) / levels * spaced[-1])]
    sums = np.concatenate([[0.0], np.cumsum(flat)])
    for _ in range(rounds):
        edges = np.concatenate([[0], np.searchsorted(flat, (numbers[1:] + numbers[:-1]) / 2), [len(flat)]])
        counts = np.diff(edges)
        numbers = np.where(counts > 0, np.diff(sums[edges]) / np.maximum(counts, 1), numbers)
    found = numbers[np.searchsorted((numbers[1:] + numbers[:-1]) / 2, rows / norms)] * norms
    return found.astype(np.float32), np.log2(levels) + 32 / rows.shape[1]


def noise(rows: Rows, *, bits: int = 8) -> tuple[Rows, float]:
    """Normal noise of 2 to the power of -bits of each row's norm."""
    made = np.random.default_rng(len(rows)).standard_normal(rows.shape, np.float32)
    sizes = np.linalg.norm(rows, axis=1, keepdims=True) / np.linalg.norm(made, axis=1, keepdims=True)
    return rows + made * sizes * np.float32(2.0**-bits), bits


_INT8 = functools.partial(by_groups, levels=127, bits=8, scale_bits=32)
VARIANTS: Mapping[str, Variant] = {
    "int8, absmax": functools.partial(_INT8, group=1 << 20),
    "int8, groups of 128": functools.partial(_INT8, group=128),
    "int8, groups of 32": functools.partial(_INT8, group=32, scale_bits=16),
    "int8, 4 outliers apart": functools.partial(outliers_apart, levels=127, bits=8, kept=4),
    "int8, rotated": functools.partial(rotated, then=functools.partial(_INT8, group=1 << 20)),
    "limit: noise of 8 bits": noise,
    "limit: the best 256 numbers": best_levels,
    "int4, groups of 32": functools.partial(by_groups, levels=7, group=32, bits=4, scale_bits=16),
    "int4, groups of 32, rotated": functools.partial(
        rotated, then=functools.partial(by_groups, levels=7, group=32, bits=4, scale_bits=16)
    ),
    "int4, 16 outliers apart": functools.partial(outliers_apart, levels=7, bits=4, kept=16),
}

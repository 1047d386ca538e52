"""The writer's blocks: what they hold, in which order, and whose memory it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.backend import Block
from actcache.entries.writer import Writer
from actcache.format.ragged import offsets_of

COLUMNS = {"values": ("float32", (4,)), "token_ids": ("int32", ())}
NAMES = frozenset(COLUMNS)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")  # all with the same first bytes


def add(writer: Writer, numbers: list[int], version: int) -> None:
    """Add entries of ``1 + number % 3`` rows, all of them ``version``."""
    lengths = np.array([1 + number % 3 for number in numbers])

    def fill(out: Any) -> None:
        assert {name: len(array) for name, array in out.items()} == dict.fromkeys(NAMES, lengths.sum())
        out["values"][:] = version
        out["token_ids"][:] = np.repeat(numbers, lengths)

    keys = np.frombuffer(b"".join(map(key, numbers)), np.uint8).reshape(-1, 32)
    writer.add(keys, lengths, NAMES, fill)


class Published:
    """What a writer has published: number -> version; the bytes of its blocks are looked at before it is told so."""

    def __init__(self) -> None:
        self.blocks: list[dict[int, int]] = []

    def __call__(self, block: Block) -> None:
        numbers = [int.from_bytes(one.tobytes(), "big") for one in block.keys]
        assert np.diff(block.offsets).tolist() == [1 + number % 3 for number in numbers]
        assert block.columns["token_ids"].tolist() == [n for n in numbers for _ in range(1 + n % 3)]
        first = block.columns["values"][block.offsets[:-1]]
        assert (block.columns["values"] == np.repeat(first, np.diff(block.offsets), axis=0)).all()
        assert len(numbers) == len(set(numbers))
        self.blocks.append(dict(zip(numbers, first[:, 0].astype(int).tolist(), strict=True)))


@given(st.lists(st.lists(st.integers(0, 12), unique=True, max_size=13), max_size=12), st.sampled_from([1, 5, 20, 1000]))
def test_of_copies_the_last_one_counts(batches, block_rows):
    """Within a block, and among those that are not published yet."""
    published, oracle = Published(), dict[int, int]()
    writer = Writer(published, COLUMNS, 1, segment_bytes=16 * block_rows)
    for version, numbers in enumerate(batches):
        add(writer, numbers, version)
        oracle |= dict.fromkeys(numbers, version)
        for i, rows in writer.find([key(number) for number in range(13)]).items():
            assert rows["values"].tolist() == [[oracle[i]] * 4] * (1 + i % 3)
            assert rows["token_ids"].tolist() == [i] * (1 + i % 3)
        assert set(writer.keys()) <= {key(number) for number in oracle}
    writer.close()
    assert {number: version for block in published.blocks for number, version in block.items()} == oracle
    for block in published.blocks:
        assert sum(1 + number % 3 for number in block) <= max(block_rows, 3)


def test_blocks_are_as_full_as_entry_by_entry():
    together, alone = Published(), Published()
    for published, size in ((together, 50), (alone, 1)):
        writer = Writer(published, COLUMNS, 1, segment_bytes=16 * 17)
        for begin in range(0, 50, size):
            add(writer, list(range(begin, begin + size)), 0)
        writer.close()
    assert together.blocks == alone.blocks
    assert len(alone.blocks) > 4


@pytest.mark.parametrize("count", [1, 40], ids=["one-block", "several-blocks"])
@pytest.mark.parametrize("before", [0, 3])
def test_what_is_refused_leaves_nothing(count, before):
    published = Published()
    writer = Writer(published, COLUMNS, 1, segment_bytes=16 * 17)
    if before:
        add(writer, list(range(100, 100 + before)), 7)

    def fill(out: Any) -> None:
        out["values"][:] = 5
        raise KeyboardInterrupt

    keys = np.frombuffer(b"".join(map(key, range(count))), np.uint8).reshape(-1, 32)
    with pytest.raises(KeyboardInterrupt):
        writer.add(keys, np.ones(count, np.int64), NAMES, fill)
    assert len(writer) == before
    writer.close()
    assert published.blocks == ([dict.fromkeys(range(100, 100 + before), 7)] if before else [])


def test_rows_that_somebody_looks_at_are_not_written_over():
    """Blocks use the memory of those before them, but not while a read of unpublished entries has views of it."""
    published = Published()
    writer = Writer(published, COLUMNS, 1, segment_bytes=16 * 30)
    seen: list[tuple[int, dict[str, np.ndarray]]] = []
    addresses = set()
    for version in range(12):
        numbers = list(range(15 * version, 15 * version + 15))
        add(writer, numbers, version)
        found = writer.find([key(numbers[4])])[0]
        addresses.add(found["values"].ctypes.data)
        if version % 3 == 0:
            seen.append((version, found))
        del found
    writer.close()
    for version, rows in seen:
        assert (rows["values"] == version).all()
        assert (rows["token_ids"] == 15 * version + 4).all()
    assert len(addresses) < 12  # what nobody looks at is used again
    assert sum(map(len, published.blocks)) == 180


def test_one_large_entry_among_small_ones():
    published: list[list[int]] = []
    writer = Writer(lambda block: published.append(np.diff(block.offsets).tolist()), COLUMNS, 1, segment_bytes=16 * 10)
    lengths = np.array([4, 4, 4, 50, 3, 3])
    keys = np.frombuffer(b"".join(map(key, range(6))), np.uint8).reshape(-1, 32)

    def fill(out: Any) -> None:
        for array in out.values():
            array[...] = 0

    writer.add(keys, lengths, NAMES, fill)
    writer.close()
    assert published == [[4, 4], [4], [50], [3, 3]]
    assert offsets_of(lengths)[-1] == sum(map(sum, published))

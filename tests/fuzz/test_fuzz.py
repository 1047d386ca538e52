"""Every target over its seeds, mutated at random for a second each; ``python -m tests.fuzz`` is guided by coverage."""

from __future__ import annotations

import logging
import random
import time
import tracemalloc

import pytest

from tests.fuzz import targets
from tests.fuzz.targets import TARGETS, WORDS, available


@pytest.fixture(scope="module", autouse=True)
def cleaned():
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    targets.stores.cache_clear()
    targets.clean()


def mutated(rng, seeds):
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(len(data) + 1)
        if rng.random() < 0.5:  # where something is written
            at = next((i for i in range(at, min(at + 4096, len(data))) if data[i]), at)
        match rng.randrange(8):
            case 0 | 1 | 2 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 3 if at < len(data):
                data[at] = rng.randrange(256)
            case 4:
                word = rng.choice(WORDS)
                data[at : at + rng.choice([0, len(word)])] = word
            case 5:
                del data[at : at + rng.choice([1, 8, 100, len(data)])]
            case 6:
                other = rng.choice(seeds)
                begin = rng.randrange(len(other))
                data[at : at + 64] = other[begin : begin + 64]
            case 7:
                data[at : at + 8] = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(data)]).to_bytes(8, "little")
    return bytes(data)


def fuzz(name, seconds, seed=0):
    """Return how many inputs were taken and how many refused."""
    target, rng, counts = TARGETS[name](), random.Random(seed), [0, 0]
    seeds = list(target.seeds())
    assert seeds
    for good in seeds:
        assert target(good), "a seed is refused"
    end = time.monotonic() + seconds
    tracemalloc.start()
    try:
        while time.monotonic() < end or sum(counts) < 20:
            data = mutated(rng, seeds)
            before = time.process_time()
            try:
                counts[target(data)] += 1
            except BaseException as error:
                raise AssertionError(f"{name}: {data[:4000]!r}") from error
            assert time.process_time() - before < 10, f"{name} hangs: {data[:4000]!r}"
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    return counts


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_seeds(name):
    if not available(name):
        pytest.skip("its backend is not installed")
    refused, _ = fuzz(name, 0.3)
    assert refused > 5


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", TARGETS)
def test_mutated_seeds_for_long(name):
    if not available(name):
        pytest.skip("its backend is not installed")
    print(name, fuzz(name, 120, seed=int(time.time())))

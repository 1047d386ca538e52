"""``kill -9`` during ``fill``, many times: what was flushed is there and right, and is not computed again.

One driver process imports torch once and forks a child for every fill; the test kills the children.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import actcache
from actcache.models.tokenizing import DocumentEncoder
from actcache.segments.segment import is_name
from tests.support.backends import Kind, each
from tests.support.tiny import save_tiny

DOCUMENTS = 150
PASSAGE = 34  # tokens

DRIVER = """
import functools, json, os, signal, sys
import actcache
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
model = AutoModel.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    path, texts, cut, *more = json.loads(line)
    puts, options = more or (0, {})
    child = os.fork()
    if child == 0:
        store = actcache.open(path, **options)
        store.space = functools.partial(store.space, segment_bytes=1 << 14)  # many segments: kills hit every phase
        too_long = actcache.passages(cut, least=4) if cut else "refuse"
        with actcache.Recycler(model, tokenizer, layer=1, store=store, dtype="float32", too_long=too_long) as recycler:
            put = recycler.space.put_packed
            def put_or_die(*given, **named):
                global puts
                if puts == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                puts -= 1
                put(*given, **named)
            recycler.space.put_packed = put_or_die
            report = recycler.fill(texts, token_budget=256, progress=False)
            there = len(recycler.space)
        new = report.new_passages if cut else report.computed
        print(json.dumps([there - new, new]), flush=True)
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


def texts() -> list[str]:
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "far", "away", "from", "home"]
    return [f"{' '.join(rng.choice(words, rng.integers(3, 30)))} {number}" for number in range(DOCUMENTS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def driver(model: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, str(model)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[bytes, np.ndarray]:
    """Return layer 1 of every document, computed alone by the full model."""
    full = AutoModel.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = {}
    with torch.no_grad():
        for text in texts():
            output = full(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
            rows[actcache.document_key(text)] = output.hidden_states[1][0].numpy()
    return rows


@pytest.fixture(scope="module")
def passages(model: Path) -> dict[bytes, np.ndarray]:
    """Return layer 1 of every passage of the documents in pairs, computed alone by the full model."""
    full = AutoModel.from_pretrained(model).eval()
    encoder = DocumentEncoder(AutoTokenizer.from_pretrained(model), 512, actcache.passages(PASSAGE, least=4))
    rows = {}
    with torch.no_grad():
        for passage in (one for cut in encoder.cut(pairs()) for one in cut):
            ids = torch.from_numpy(passage.token_ids.astype(np.int64))[None]
            rows[passage.key()] = full(input_ids=ids, output_hidden_states=True).hidden_states[1][0].numpy()
    return rows


def pairs() -> list[str]:
    """Return documents of which each has a half with the next one in common."""
    halves = texts()
    return ["\n\n".join(two) for two in itertools.pairwise(halves)]


def rounds(
    kind: Kind,
    driver: subprocess.Popen[str],
    path: Path,
    expected: dict[bytes, np.ndarray],
    count: int,
    order: Sequence[str],
    cut: int = 0,
) -> None:
    chance = random.Random(3)
    longest = 1.0
    stored: set[bytes] = set()
    killed = 0
    for _ in range(count):
        if len(stored) > 0.8 * len(expected):  # start over, so that there is always something left to compute
            path, stored = path.with_name(f"{path.name}+"), set()
        driver.stdin.write(json.dumps([kind.url(path), order, cut]) + "\n")
        driver.stdin.flush()
        child = int(driver.stdout.readline())
        time.sleep(chance.uniform(0.02, longest))
        with contextlib.suppress(ProcessLookupError):  # it had finished before
            os.kill(child, signal.SIGKILL)
        lines = [driver.stdout.readline()]
        while lines[-1] != "ended\n":
            lines.append(driver.stdout.readline())
        killed += len(lines) == 1
        longest *= 1.1 if len(lines) == 1 else 0.7  # so that most are killed, at all stages, on a machine of any speed
        now = check(kind, path, expected)
        assert stored <= now
        stored = now
    assert killed >= count // 2
    driver.stdin.write(json.dumps([kind.url(path), order, cut]) + "\n")
    driver.stdin.flush()
    driver.stdout.readline()
    present, computed = json.loads(driver.stdout.readline())
    assert (present, computed) == (len(stored), len(expected) - len(stored))
    assert driver.stdout.readline() == "ended\n"
    assert check(kind, path, expected) == expected.keys()


def killed_once(
    driver: subprocess.Popen[str],
    url: str,
    expected: dict[bytes, np.ndarray],
    order: Sequence[str],
    cut: int,
    options: dict[str, object] | None = None,
) -> None:
    """Kill a fill before its sixth batch is stored, and let another one end it."""

    def fill(puts: int) -> list[str]:
        driver.stdin.write(json.dumps([url, order, cut, puts, options or {}]) + "\n")
        driver.stdin.flush()
        driver.stdout.readline()
        return list(iter(driver.stdout.readline, "ended\n"))

    def stored() -> set[bytes]:
        with actcache.open(url, "r", **options or {}) as store:
            space = store.space(store.recipes()[0])
            assert space.damaged() == {}
            keys = list(space.keys())
            for key, entry in zip(keys, space.get(keys), strict=True):
                np.testing.assert_allclose(entry.activations, expected[key], atol=1e-5)
            return set(keys)

    assert fill(6) == []
    there = stored()
    assert 0 < len(there) < len(expected)
    assert json.loads(*fill(0)) == [len(there), len(expected) - len(there)]
    assert stored() == expected.keys()


def check(kind: Kind, path: Path, expected: dict[bytes, np.ndarray]) -> set[bytes]:
    """Open the store as it was left; return its keys, after comparing all entries with the full model's rows."""
    if not (path / "actcache.json").exists():
        return set()
    with actcache.open(kind.url(path), "r") as store:
        recipes = store.recipes()
        if not recipes:
            return set()
        space = store.space(recipes[0])
        assert space.damaged() == {}
        keys = list(space.keys())
        for key, entry in zip(keys, space.get(keys), strict=True):
            np.testing.assert_allclose(entry.activations, expected[key], atol=1e-5)
        listed = [file.stem for file in path.glob("spaces/*/segments/*")]
        assert all(is_name(name) for name in listed)
        assert space.usage().segments <= len(listed) or not kind.segmented  # joined ones stay for a while
        return set(keys)


@each(everyday=("hdf5",))
def test_killed_fills_lose_nothing_and_compute_nothing_twice(kind, driver, expected, tmp_path):
    rounds(kind, driver, tmp_path / "store", expected, 4, texts())


@pytest.mark.long
@pytest.mark.timeout(3600)
@each()
def test_killed_fills_for_long(kind, driver, expected, tmp_path):
    rounds(kind, driver, tmp_path / "store", expected, 200, texts())


@each()
def test_a_killed_fill_of_passages_is_ended_by_another(kind, driver, passages, tmp_path):
    """Each passage that was flushed is there, and is computed once, though two documents have it."""
    killed_once(driver, kind.url(tmp_path / "store"), passages, pairs(), PASSAGE)


@pytest.mark.long
@pytest.mark.timeout(1200)
@each()
def test_killed_fills_of_passages(kind, driver, passages, tmp_path):
    """The last fill computes the passages that the others had not flushed, and no others."""
    assert len(passages) > 2 * DOCUMENTS
    rounds(kind, driver, tmp_path / "store", passages, 12, pairs(), PASSAGE)

"""What the tests of the storage engine share: documents by number, and processes of their own."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import actcache

HIDDEN = 8
#: Where files are only in memory, None where there is no such place. For tests to which syncing means nothing.
MEMORY_FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
ROOT = Path(__file__).parents[2]
#: For processes of their own: this repository, and what this one was given (another working tree than the installed).
PYTHONPATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


#: How ``recipe`` stores rows: a test that is run for several codecs sets it (``stored_as``), for its processes, too.
DTYPE = "ACTCACHE_TEST_DTYPE"


def recipe(**changes: Any) -> actcache.Recipe:
    dtype = os.environ.get(DTYPE, "float32")
    return actcache.Recipe(**{"model": "tests", "layer": 1, "hidden_size": HIDDEN, "dtype": dtype, **changes})


@contextmanager
def stored_as(dtype: str) -> Iterator[None]:
    """Have ``recipe`` be of this codec, and ``rows`` exact in it, here and in processes that are started here."""
    before = os.environ.get(DTYPE)
    os.environ[DTYPE] = dtype
    try:
        yield
    finally:
        os.environ.pop(DTYPE) if before is None else os.environ.update({DTYPE: before})


def key(number: int) -> bytes:
    return actcache.document_key(f"document {number}")


def length(number: int, version: int = 0) -> int:
    return 1 + (number * 7 + version * 3) % 9


def rows(number: int, version: int = 0) -> np.ndarray:
    """The activations of a document: small integers, exact in float16 and bfloat16; and in what ``stored_as`` says."""
    rng = np.random.default_rng([number, version])
    made = rng.integers(-100, 100, (length(number, version), HIDDEN)).astype(np.float32)
    if os.environ.get(DTYPE, "").startswith("int8"):
        made[:, 0] = 127  # so that the scale is 1
    return made


def ids(number: int, version: int = 0) -> np.ndarray:
    return np.random.default_rng([number, version, 1]).integers(0, 30000, length(number, version))


def put(space: actcache.Space, numbers: Any, version: int = 0, **options: Any) -> int:
    numbers = list(numbers)
    return space.put(
        [key(n) for n in numbers],
        [rows(n, version) for n in numbers],
        [ids(n, version) for n in numbers],
        **options,
    )


def compact(space: actcache.Space, **options: Any) -> None:
    """Join all segments into one and remove what that replaces at once, unless the options say otherwise."""
    space.compact(**{"waste": 0.0, "grace": 0.0, **options})


def check(space: actcache.Space, held: dict[int, int], numbers: Any) -> None:
    """Compare a ``get`` of ``numbers`` with the oracle ``number -> version``."""
    numbers = list(numbers)
    for number, entry in zip(numbers, space.get([key(n) for n in numbers]), strict=True):
        if number not in held:
            assert entry is None, f"{number} should be absent"
            continue
        assert entry is not None, f"{number} is missing"
        np.testing.assert_array_equal(entry.activations, rows(number, held[number]))
        np.testing.assert_array_equal(entry.token_ids, ids(number, held[number]))


def make_store(url: Any, numbers: Any, *, segments: int = 1, **changes: Any) -> Path:
    """Make a store with these documents in so many segments; return the folder of its space.

    Who asks for the same again gets a copy, unless something is there already.
    """
    scheme, _, path = str(url).rpartition(":")
    wanted = repr((scheme, list(numbers), segments, changes))
    if path.startswith("//") or Path(path).exists():
        _fill(url, numbers, segments, changes)
    else:
        if wanted not in _MADE:
            _MADE[wanted] = Path(_folder()) / str(len(_MADE))
            _fill(f"{scheme}:{_MADE[wanted]}" if scheme else _MADE[wanted], numbers, segments, changes)
        shutil.copytree(_MADE[wanted], path, copy_function=shutil.copyfile)  # which are as old as if they were written
    return Path(path) / "spaces" / recipe(**changes).fingerprint


_MADE: dict[str, Path] = {}


def _fill(url: Any, numbers: Any, segments: int, changes: dict[str, Any]) -> None:
    with actcache.open(url) as store, store.space(recipe(**changes)) as space:
        for part in np.array_split(list(numbers), segments):
            put(space, part.tolist())
            space.flush()


@functools.cache
def _folder() -> str:
    """A folder of this process, gone with it."""
    folder, me = tempfile.mkdtemp(dir=MEMORY_FOLDER), os.getpid()

    def remove() -> None:
        if os.getpid() == me:  # not a fork's child
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def segment_files(folder: Path) -> list[Path]:
    return sorted((folder / "segments").iterdir())


def start(code: str, *arguments: Any, **options: Any) -> subprocess.Popen[str]:
    """Start Python with this code; ``sys.argv[1:]`` are the arguments."""
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "PYTHONWARNINGS": "error", **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
        **options,
    )


def run(code: str, *arguments: Any, timeout: float = 150, **options: Any) -> str:
    """Run Python with this code to its end; return what it printed. Signals and tracebacks fail the test."""
    process = start(code, *arguments, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, f"exit status {process.returncode}\n{out}\n{err}"
    return out

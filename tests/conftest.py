"""For all tests."""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# Several workers share the processors; threads that wait for each other within each of them would take three times as
# long. Inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A store on objects sweeps the machine's temporary folder: each worker has one of its own.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="act-")
os.chmod(tempfile.tempdir, 0o1777)  # as temporary folders are

# A background job of a shell ignores interrupts, and so would every process that a test starts to interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Likewise one that ``nohup`` started, of hang-ups.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


# `make test-long` runs what has the mark "long", and the tests of hypothesis again with its profile "long".
settings.register_profile("everyday", max_examples=60, deadline=None)
settings.register_profile("long", max_examples=2000, deadline=None)
settings.load_profile("everyday")


LISTED = (Path(__file__).parent / "long_run.txt").read_text(encoding="utf-8").splitlines()
REPEATED = re.compile("|".join(["(?!)", *(line for line in LISTED if line and not line.startswith("#"))]))


LONGEST = "tests/models/cluster/test_ray_killed.py"


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a class that names its ``everyday`` tests, all others are for the long run; so is what long_run.txt lists."""
    for item in items:
        if REPEATED.match(item.nodeid.removeprefix("tests/")):
            item.add_marker(pytest.mark.long)
        everyday = getattr(getattr(item, "cls", None), "everyday", None)
        if everyday is not None and item.originalname not in everyday:  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.long)
    items.sort(key=lambda item: LONGEST not in item.nodeid)  # begun last, it would be waited for alone


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


def pytest_collection_finish() -> None:
    """What was imported stays: a collection of garbage, of which tests ask for many, looks at what came after only."""
    gc.collect()
    gc.freeze()

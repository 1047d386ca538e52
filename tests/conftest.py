"""For all tests."""

from __future__ import annotations

import gc
import os
import signal

# Several workers share the processors; threads that wait for each other within each of them would take three times as
# long. Inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A background job of a shell ignores interrupts, and so would every process that a test starts to interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Likewise one that ``nohup`` started, of hang-ups.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    """What was imported stays: a collection of garbage, of which tests ask for many, looks at what came after only."""
    gc.collect()
    gc.freeze()

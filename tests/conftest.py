"""For all tests."""

from __future__ import annotations

import signal

# A background job of a shell ignores interrupts, and so would every process that a test starts to interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)

"""The command ``cachectl``, from its first moment: what it imports takes longer than Ctrl-C.

This is a module of its own since importing anything of ``actcache`` imports NumPy first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run ``cachectl``."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, _end)
    try:
        from actcache.cli import main
    except ValueError as error:
        if type(error).__name__ != "UsageError":  # its class is of the package that just failed to be imported
            raise
        sys.stderr.write(f"cachectl: error: {error}\n")
        sys.exit(2)
    main()  # has signals end what it does from here on


def _end(number: int, frame: FrameType | None) -> None:
    """End on the spot: nothing was begun."""
    how = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    with contextlib.suppress(OSError):  # a terminal that is closed
        os.write(2, f"cachectl: error: {how}; nothing was begun\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    main()

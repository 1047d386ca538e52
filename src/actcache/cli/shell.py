"""What a shell expects of a command: signals end it, output that nobody reads or can show is no failure, and the
library's advice comes in its words.

A batch system, a container, a closed terminal and Ctrl-C differ in the signal alone. What a command has computed is
stored, what it was writing is whole or gone, its processes end; the exit code says which signal came. Only ``cachectl``
does this: what a signal means to another program is that program's own business.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import signal
import stat
import sys
import threading
import time
from types import FrameType
from typing import Any, TextIO

HEEDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: What comes within so many seconds is the same request: ``timeout`` sends SIGTERM twice, systemd SIGTERM and SIGHUP at
#: the end of a session, and of a closed terminal both kernel and shell tell.
SAME_SECONDS = 1.0

_now = time.monotonic


class Interrupted(KeyboardInterrupt):
    """A signal came."""


class Requests:
    """What was asked of this process by signals. The handler of them all."""

    def __init__(self) -> None:
        self.number: int | None = None  # of the signal that came first
        self._finishing: float | None = None  # since when
        self._others = sys.unraisablehook

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = _now()
        if self._finishing is None:
            self.number, self._finishing = number, now
            raise Interrupted
        # Whoever closes the terminal of a command that is finishing does not mean to lose its work.
        if number != signal.SIGHUP and now - self._finishing >= SAME_SECONDS:
            _end_now(number)

    def heed(self) -> None:
        """Have signals end this process's command, but those that it was started to ignore (``nohup``, a job of sh)."""
        if threading.current_thread() is not threading.main_thread():  # others have no say in it
            return
        sys.unraisablehook = self.unraised
        atexit.unregister(_ignore)
        atexit.register(_ignore)
        for number in HEEDED:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                signal.signal(number, self)

    def finish(self) -> None:
        """Let a command that has done its work end in peace."""
        if self._finishing is None:
            self._finishing = _now()

    def unraised(self, what: Any) -> None:
        """Ask again where the request came in the middle of what lets no exception through, such as a finalizer."""
        if self.number is None or not isinstance(what.exc_value, Interrupted):
            self._others(what)
            return
        self._finishing = None
        again = threading.Timer(0.01, os.kill, (os.getpid(), self.number))
        again.daemon = True
        again.start()


def _ignore() -> None:
    """Let the interpreter end in peace, which would otherwise forget its handlers first and die of a late signal."""
    for number in HEEDED:
        signal.signal(number, signal.SIG_IGN)


def _end_now(number: int) -> None:
    """End without another word, as ``kill -9`` would: what was published stands, all else is temporary."""
    processes = sys.modules.get("multiprocessing")
    for process in processes.active_children() if processes is not None else ():
        process.kill()
    with contextlib.suppress(OSError):
        os.write(2, b"cachectl: ended before all was stored; run it again to go on\n")
    os._exit(128 + number)


def what(number: int) -> str:
    """Say what a signal did to a command."""
    return "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


def hung_up(error: OSError) -> bool:
    """Return whether writing a result failed because its terminal was closed."""
    if error.errno != errno.EIO or error.filename is not None or sys.stdout is None:
        return False
    try:
        return stat.S_ISCHR(os.fstat(sys.stdout.fileno()).st_mode)
    except (OSError, ValueError):  # it is no file
        return False


# --- streams ----------------------------------------------------------------------------------------------------------


def escape_missing(stream: TextIO | None) -> None:
    """Have a stream write characters that its encoding lacks as ``\\xe9``; by itself it would raise an error.

    A file name may hold any bytes, a recipe any text, and a locale may have neither.
    """
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def drop_unread() -> None:
    """Forget output that nobody reads any more, or the interpreter fails over it in its last moments."""
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def as_shown(text: str, encoding: str) -> str:
    """Return a text as such a stream shows it, so that a table knows how wide it is."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def text_of_argument(argument: str) -> str:
    """Return an argument that is a text and no file name: UTF-8, also where the locale is not.

    Python decodes arguments by the locale, ASCII's as surrogates, which no document and no recipe has.
    """
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:  # it is of the locale's encoding
        return argument


# --- words ------------------------------------------------------------------------------------------------------------

#: What the library says, and what to do instead in the shell. A test finds advice that is missing here.
SHELL_WORDS = {
    "open it with mode='a' to create one": "cachectl fill makes one",
    ", or read only with mode='r'": "",
    ", or read with mode='r'": "",
    ", or read it with mode='r'": "",
    "read with mode='r'": "give some that may, or let these",
    "free some space and flush again": "free some space and run it again",
    "space.delete(error.keys) makes": "cachectl repair makes",
    "compute on CPUs, by device='cpu'": "compute on CPUs, by --device cpu",
    "see store.fingerprints()": "cachectl ls lists them",
    'too_long="truncate" or too_long="windows"': "--too-long truncate or --too-long windows",
}


def in_shell(message: str) -> str:
    """Return an error's message as one reads it in a shell."""
    for said, instead in SHELL_WORDS.items():
        message = message.replace(said, instead)
    return message

"""``cachectl`` in this process, which starts at once; that it works as a process is for tests/cli/test_cli.py."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import signal
import sys
from dataclasses import dataclass
from typing import Any

from actcache.cli import main
from actcache.cli.shell import HEEDED


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.code in (0, 4), self.err
        return json.loads(self.out)

    def refused(self, code: int) -> str:
        """Check for one line on stderr, no traceback, and the exit code; return the line."""
        lines = [line for line in self.err.splitlines() if line.startswith("cachectl: error: ")]
        assert self.code == code, (self.code, self.err)
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self) -> bool:
        return True


class Pipe(io.TextIOWrapper):
    """A pipe of an encoding; what it lacks is an error, as it is of a process's own streams."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding, errors="strict")

    def getvalue(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


def cachectl(*arguments: object, text: str = "", typed: bool = False, encoding: str | None = None) -> Result:
    """Run a command; stdout is no terminal, and stdin only where its text is ``typed``.

    Args:
        encoding: of stdout and stderr; None for one in which everything can be written.
    """
    out, err = (io.StringIO() if encoding is None else Pipe(encoding) for _ in range(2))
    given = sys.argv, sys.stdin
    logger = logging.getLogger("actcache")
    handlers, heeded = list(logger.handlers), {number: signal.getsignal(number) for number in HEEDED}
    unraisable = sys.unraisablehook
    sys.argv, sys.stdin = ["cachectl", *map(str, arguments)], Terminal(text) if typed else io.StringIO(text)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                code = stop.code
    finally:
        sys.argv, sys.stdin = given
        logger.handlers[:] = handlers
        logger.setLevel(logging.NOTSET)
        for number, given in heeded.items():
            signal.signal(number, given)
        sys.unraisablehook = unraisable
    return Result(code, out.getvalue(), err.getvalue())


def by_space(found: Any) -> dict[str, Any]:
    """Return what JSON says of spaces, by their fingerprints."""
    return {one["space"]: one for one in found["spaces"]}

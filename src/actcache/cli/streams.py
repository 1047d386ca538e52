"""Terminals, pipes and locales that lack characters: what cannot be shown is escaped, and ends no command."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO


def escaping(stream: TextIO | None) -> None:
    """Have a stream write characters that its encoding lacks as ``\\xe9``; by itself it would raise an error.

    A file name may hold any bytes, a recipe any text, and a locale may have neither.
    """
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def let_go() -> None:
    """Forget output that nobody reads any more, or the interpreter fails over it in its last moments."""
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def shown(text: str, encoding: str) -> str:
    """Return a text as such a stream shows it, so that a table knows how wide it is."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def text_of(argument: str) -> str:
    """Return an argument that is a text and no file name: UTF-8, also where the locale is not.

    Python decodes arguments by the locale, ASCII's as surrogates, which no document and no recipe has.
    """
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:  # it is of the locale's encoding
        return argument

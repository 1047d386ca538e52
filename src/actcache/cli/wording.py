"""The library's advice in the words of the shell: there, nobody can give ``mode`` or call ``flush``."""

from __future__ import annotations

#: What the library says, and what to do instead in the shell. A test finds advice that is missing here.
SHELL_WORDS = {
    "open it with mode='a' to create one": "cachectl fill makes one",
    ", or read only with mode='r'": "",
    ", or read with mode='r'": "",
    "read with mode='r'": "give some that may, or let these",
    "free some space and flush again": "free some space and run it again",
    "space.delete(error.keys) makes": "cachectl repair makes",
    "see store.fingerprints()": "cachectl ls lists them",
}


def in_shell(message: str) -> str:
    """Return an error's message as one reads it in a shell."""
    for said, instead in SHELL_WORDS.items():
        message = message.replace(said, instead)
    return message

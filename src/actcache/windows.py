"""Windows: a document longer than the model takes becomes several overlapping entries.

A window's key is made from the document's key, the window spec, the window's number, and whether it is the last. The
last flag makes a document's windows countable without its tokens, and a document whose last window is missing is a miss
rather than a shorter document.
"""

from __future__ import annotations

from dataclasses import dataclass

from actcache.errors import DocumentError
from actcache.key import window_key
from actcache.plain import is_whole


@dataclass(frozen=True)
class Windows:
    """How long documents are cut: windows of ``max_length`` tokens that overlap by ``stride``.

    Args:
        max_length: tokens of a window, special tokens included.
        stride: content tokens that a window shares with the one before it (the tokenizers' ``stride``).

    Raises:
        DocumentError: these are no whole numbers, or a window would not move forward.
    """

    max_length: int
    stride: int = 0

    def __post_init__(self) -> None:
        for name in ("max_length", "stride"):
            value = getattr(self, name)
            if not is_whole(value):
                raise DocumentError(f"{name} of windows is a whole number of tokens, not {value!r:.80}")
            object.__setattr__(self, name, int(value))
        if self.max_length < 1 or not 0 <= self.stride < self.max_length:
            raise DocumentError(f"windows of {self.max_length} tokens cannot overlap by {self.stride}")

    def keys(self, document: bytes, count: int) -> list[bytes]:
        """Return the keys of the ``count`` windows of the document with that key, in order."""
        return [self.key(document, number, last=number == count - 1) for number in range(count)]

    def key(self, document: bytes, number: int, *, last: bool) -> bytes:
        """Return the key of one window, numbered from 0."""
        return window_key(document, self.max_length, self.stride, number, last)


def windows(max_length: int, stride: int = 0) -> Windows:
    """Return the spec by which documents longer than ``max_length`` tokens are cut into overlapping entries."""
    return Windows(max_length, stride)

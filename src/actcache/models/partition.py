"""Shares of a corpus by the documents' keys: processes that know nothing of each other compute no document twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from actcache.errors import UsageError
from actcache.format.keys import Document
from actcache.models.documents import chunked

#: Documents, with their positions in the corpus.
Part = tuple[Sequence[int], list[Document]]


def share_of(key: bytes, shares: int) -> int:
    """Return the share, from 0, to which a document's key falls: a document that is given twice falls to one."""
    return int.from_bytes(key[:8], "little") % shares


@dataclass(frozen=True)
class Partition:
    """One of several shares of a corpus. Each document falls to one of them, in whatever order documents come."""

    number: int  # from 0
    of: int

    @classmethod
    def parse(cls, given: str | tuple[int, int] | Partition) -> Partition:
        """Return the share that ``"3/8"`` or ``(3, 8)`` names: the last of eight is 7/8.

        Raises:
            UsageError: there is no such share.
        """
        if isinstance(given, Partition):
            return given
        try:
            number, of = map(int, given.split("/") if isinstance(given, str) else given)
        except (TypeError, ValueError, AttributeError):
            raise UsageError(
                f"a partition is a number and how many there are, such as 0/8, not {given!r:.60}"
            ) from None
        if not 0 <= number < of:
            raise UsageError(f"there is no partition {number}/{of}: they are numbered 0 to {max(of - 1, 0)}")
        return cls(number, of)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def parts(
        self, texts: Iterable[Document], size: int, keys_of: Callable[[Sequence[Document], int], list[bytes]]
    ) -> Iterator[Part]:
        """Yield this share's documents, ``size`` at a time; raises as ``keys_of`` does, also for others' documents."""
        positions: list[int] = []
        documents: list[Document] = []
        for first, chunk in chunked(texts, size):
            for i, key in enumerate(keys_of(chunk, first)):
                if share_of(key, self.of) == self.number:
                    positions.append(first + i)
                    documents.append(chunk[i])
            if len(documents) >= size:
                yield positions[:size], documents[:size]
                positions, documents = positions[size:], documents[size:]
        if documents:
            yield positions, documents

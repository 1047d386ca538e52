"""Shares of a corpus by the documents' keys: processes that know nothing of each other compute no document twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from actcache.errors import UsageError
from actcache.format.keys import Document
from actcache.models.documents import chunked, document_keys, streamed

#: Documents, with their positions in the corpus.
Part = tuple[Sequence[int], list[Document]]

_READ = 256  # documents that are read at a time
_AHEAD = 4  # chunks of documents that wait for one process at most: another one that has none left then waits, too


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

    def has(self, key: bytes) -> bool:
        """Whether the document of this key falls to this share."""
        return share_of(key, self.of) == self.number

    def parts(
        self, texts: Iterable[Document], size: int, keys_of: Callable[[Sequence[Document], int], list[bytes]]
    ) -> Iterator[Part]:
        """Yield this share's documents, ``size`` at a time; raises as ``keys_of`` does, also for others' documents."""
        positions: list[int] = []
        documents: list[Document] = []
        for first, chunk in chunked(texts, size):
            for i, key in enumerate(keys_of(chunk, first)):
                if self.has(key):
                    positions.append(first + i)
                    documents.append(chunk[i])
            if len(documents) >= size:
                yield positions[:size], documents[:size]
                positions, documents = positions[size:], documents[size:]
        if documents:
            yield positions, documents


class Partitioner:
    """Partitions documents by their keys: one that is given twice comes to the same process twice. They are dealt out
    ``chunk`` at a time.

    What is held is bounded, however unlike the processes' speeds are. Raises as ``streamed`` does; not thread-safe.
    """

    def __init__(
        self,
        texts: Iterable[Document],
        processes: int,
        chunk: int,
        keys_of: Callable[[Sequence[Document], int], list[bytes]] = document_keys,
    ) -> None:
        self._texts, self._chunk, self._keys_of = streamed(texts), chunk, keys_of
        self._waiting: list[list[tuple[int, Document]]] = [[] for _ in range(processes)]
        self.taken = 0  #: documents that were read so far
        self._ended = False

    def part(self, process: int) -> Part | None:
        """Return documents for a process, with their positions: none where it has to wait, None where no more come."""
        mine = self._waiting[process]
        while len(mine) < self._chunk and not self._ended and max(map(len, self._waiting)) < _AHEAD * self._chunk:
            self._read()
        some, self._waiting[process] = mine[: self._chunk], mine[self._chunk :]
        if not some and self._ended:
            return None
        return [position for position, _ in some], [document for _, document in some]

    def _read(self) -> None:
        documents = list(itertools.islice(self._texts, _READ))
        self._ended = len(documents) < _READ
        for i, key in enumerate(self._keys_of(documents, self.taken)):
            self._waiting[share_of(key, len(self._waiting))].append((self.taken + i, documents[i]))
        self.taken += len(documents)

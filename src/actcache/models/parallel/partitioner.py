"""Which process gets which documents."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from actcache.format.keys import Document
from actcache.models.documents import document_keys, streamed
from actcache.models.filling import CHUNK, Part

_READ = 256  # documents that are read at a time
_AHEAD = 4 * CHUNK  # documents that wait for one process at most: another one that has none left then waits, too


class Partitioner:
    """Deals documents to processes by their keys, so that one that is given twice comes to the same process twice.

    Not thread-safe. What is held is bounded, however unlike the processes' speeds are.

    Args:
        texts: streamed.
        hands: how many processes there are.

    Raises:
        UsageError: see ``actcache.models.documents.streamed``.
    """

    def __init__(self, texts: Iterable[Document], hands: int) -> None:
        self._texts = streamed(texts)
        self._waiting: list[list[tuple[int, Document]]] = [[] for _ in range(hands)]
        self.dealt = 0  #: documents that were read so far
        self._ended = False

    def part(self, hand: int) -> Part | None:
        """Return documents for a process, with their positions: none where it has to wait, None where no more come.

        Raises:
            DocumentError: a document has no key; it names its position.
        """
        mine = self._waiting[hand]
        while len(mine) < CHUNK and not self._ended and max(map(len, self._waiting)) < _AHEAD:
            self._read()
        some, self._waiting[hand] = mine[:CHUNK], mine[CHUNK:]
        if not some and self._ended:
            return None
        return [position for position, _ in some], [document for _, document in some]

    def _read(self) -> None:
        documents = list(itertools.islice(self._texts, _READ))
        self._ended = len(documents) < _READ
        for i, key in enumerate(document_keys(documents, self.dealt)):
            hand = int.from_bytes(key[:8], "little") % len(self._waiting)
            self._waiting[hand].append((self.dealt + i, documents[i]))
        self.dealt += len(documents)

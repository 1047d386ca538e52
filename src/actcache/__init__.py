"""actcache: an activation cache storage engine.

A transformer's activations after an intermediate layer are computed once per document and stored; every later run over
the same text starts at the next layer. ``docs/`` says more; ``README.md`` begins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actcache import errors
from actcache.entries.batch import Batch
from actcache.entries.entry import Entry, ReadReport
from actcache.format.keys import Windows, document_key, windows
from actcache.format.media import Audio, Image
from actcache.format.passages import Passages, passages
from actcache.format.recipe import Recipe
from actcache.reader.reader import Reader
from actcache.reader.rows import RowReader
from actcache.store.collection import Collection
from actcache.store.space import Space
from actcache.store.store import Store
from actcache.store.store import open_store as open

if TYPE_CHECKING:
    from actcache.models.recycler import Recycler
    from actcache.models.recyclers import Recyclers

__version__ = "0.1.0"

__all__ = [
    "Audio",
    "Batch",
    "Collection",
    "Entry",
    "Image",
    "Passages",
    "ReadReport",
    "Reader",
    "Recipe",
    "Recycler",
    "Recyclers",
    "RowReader",
    "Space",
    "Store",
    "Windows",
    "document_key",
    "errors",
    "open",
    "passages",
    "windows",
]


def __getattr__(name: str) -> Any:
    # Recyclers need torch and transformers; the store does not.
    if name == "Recycler":
        from actcache.models.recycler import Recycler

        return Recycler
    if name == "Recyclers":
        from actcache.models.recyclers import Recyclers

        return Recyclers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

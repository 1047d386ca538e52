"""Every exception that actcache raises on purpose, arranged by what the person who catches it would do.

``ActcacheError``
    - ``UsageError`` (also ``ValueError``): change the call.
    - ``StoreError``: look at the store or the place where it lies.
    - ``DataError``: something that was read back is not what was stored.
    - ``ModelError``: the transformer, its tokenizer or its canaries do not fit the recipe.

Messages say what is wrong and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class ActcacheError(Exception):
    """Base of all exceptions of this package."""


class _OfKeys(ActcacheError):
    def __init__(self, message: str, keys: Sequence[bytes] = ()) -> None:
        super().__init__(message)
        self.keys = list(keys)


class UsageError(ActcacheError, ValueError):
    """An argument is wrong; nothing was stored or changed."""


class KeyFormatError(UsageError):
    """A key is not 32 bytes, or the same key stands twice in one ``put``."""


class DocumentError(UsageError):
    """A document is empty, too long for the model, or of a kind that has no key."""


class DocumentTooLongError(DocumentError):
    """A document is longer than the model takes and the caller said to refuse such documents."""


class ShapeError(UsageError):
    """An array has another shape, dtype or length than the space stores or the caller's buffer holds."""


class NonFiniteError(UsageError):
    """Activations hold NaN or infinity, before or after the conversion to the stored dtype."""


class CodecOverflowError(NonFiniteError):
    """A finite activation is too large for the stored dtype and would have become infinite."""


class LayerError(UsageError):
    """The layer to cut at lies outside 1..N-1."""


class RecipeError(UsageError):
    """A recipe's field has a value that no recipe can have."""


class BackendError(UsageError):
    """A URL names a backend that is not installed or not known."""


class MissingExtraError(BackendError):
    """A backend is known but the library that it needs is not installed; the message says which to install."""


@contextmanager
def requires_extra(extra: str, need: str) -> Iterator[None]:
    """Have an import that fails say what needs it, and which extra brings it: ``MissingExtraError``."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(f"{need}: pip install 'actcache[{extra}]' ({error})") from None


class StoreError(ActcacheError):
    """The store, or the place where it lies, does not allow what was asked."""

    lost = 0  #: how many entries that had been put were dropped, because what held them was closed


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no store at the path, and the mode does not create one."""


class StoreGoneError(StoreError):
    """The store that was opened is no longer where it was: moved, removed, or another one lies there. Nothing was
    written; what was put and not flushed is still held, and a ``flush`` stores it once the store is back."""


class NotAStoreError(StoreError):
    """Something that is no store lies at the path."""


class _NotFoundError(StoreError, KeyError):
    __str__ = Exception.__str__  # KeyError would print the message's repr


class SpaceNotFoundError(_NotFoundError):
    """The store has no space for the recipe; the message lists the nearest ones and what differs."""


class CollectionNotFoundError(_NotFoundError):
    """The store has no collection of that name."""


class ReadOnlyError(StoreError, PermissionError):
    """A write to a store that was opened, or lies, read-only."""


class OutOfSpaceError(StoreError, OSError):
    """The disk or quota is full. What was flushed before is safe; what was not is still held by the writer."""


class StorageIOError(StoreError, OSError):
    """The operating system refused a read or write for another reason."""


class ClosedError(StoreError):
    """The store, space or reader was closed before this call."""


class MissingEntryError(_OfKeys, _NotFoundError):
    """Documents that a read needs are not in the space. ``keys`` holds their keys."""


class DataError(ActcacheError):
    """Bytes of the store are damaged, foreign, or of a version that this release cannot read."""


class FormatError(DataError):
    """A file of the store is truncated, foreign, or says impossible things about itself."""


class SegmentGoneError(FormatError):
    """A segment is no longer there: compaction has replaced it, or somebody removed it. Refresh and look again."""


class FormatVersionError(FormatError):
    """The store was written by a newer release."""


class CorruptEntryError(_OfKeys, DataError):
    """Entries failed their checksum, or their bytes cannot be read. ``keys`` holds their keys.

    Every other entry is unaffected. ``space.delete(error.keys)`` turns them into misses that a fill recomputes.
    """


class ModelError(ActcacheError):
    """The model or its tokenizer cannot be used as asked."""


class UnsupportedModelError(ModelError):
    """The architecture is not in the table of families (``actcache.models.families``)."""


class UnseenTokenError(ModelError):
    """A model whose vocabulary was pruned met tokens that it does not keep. ``ids`` holds their ids."""

    def __init__(self, message: str, ids: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ids = list(ids)


class LowerHalfMismatchError(ModelError):
    """The task model's lower half is not the one whose activations are stored."""


class TokenizationMismatchError(ModelError):
    """A model that is to read another's stored rows has other token ids than that for one text."""


class CanaryError(ModelError):
    """Recomputed canary documents differ from the stored ones by more than the tolerance: the numbers have changed."""


class WorkerError(ModelError):
    """A process that computes for this one died, or failed with an error of another library."""


class ErrorBudgetError(ModelError):
    """Storing as asked would change the numbers by more than is allowed."""


class VerificationError(ModelError):
    """Recomputed documents differ from the stored ones by more than the tolerance. ``report`` says by how much."""

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report: Any = report

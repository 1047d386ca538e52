"""Labels as a reader takes and delivers them: one number or array of one shape a document, or one number a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ShapeError
from actcache.format.arguments import to_numpy
from actcache.format.ragged import offsets_of, row_indices

IGNORED = -100  # at padding; what torch's cross entropy ignores


@dataclass(frozen=True)
class DocumentLabels:
    """Labels of documents, ``[n, ...]``."""

    values: NDArray[Any]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, members: NDArray[Any]) -> DocumentLabels:
        return DocumentLabels(self.values[members])

    def of_batch(self, members: NDArray[np.int64], lengths: NDArray[np.int64], width: int | None) -> NDArray[Any]:
        """Return the labels of some documents, ``[B, ...]``."""
        return self.values[members]


@dataclass(frozen=True)
class TokenLabels:
    """Labels of tokens: document i's are ``values[offsets[i]:offsets[i + 1]]``."""

    values: NDArray[Any]
    offsets: NDArray[np.int64]
    positions: NDArray[np.int64]  # of the documents, for messages

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, members: NDArray[Any]) -> TokenLabels:
        lengths = np.diff(self.offsets)[members]
        rows = self.values[row_indices(self.offsets[:-1][members], lengths, None)]
        return TokenLabels(rows, offsets_of(lengths), self.positions[members])

    def of_batch(self, members: NDArray[np.int64], lengths: NDArray[np.int64], width: int | None) -> NDArray[Any]:
        """Return the labels of some documents' tokens, ``[B, width]`` padded with -100, or ``[T]`` packed.

        Args:
            lengths: tokens of these documents.

        Raises:
            ShapeError: a document has another number of tokens than of labels.
        """
        begins, counts = self.offsets[members], self.offsets[members + 1] - self.offsets[members]
        if (counts != lengths).any():
            i = int(np.argmax(counts != lengths))
            raise _mismatch(self.positions[members][i], lengths[i], counts[i])
        rows = self.values[row_indices(begins, lengths, None)]
        if width is None:
            return rows
        padded = np.full((len(members), width), IGNORED, self.values.dtype)
        padded[np.arange(width) < lengths[:, None]] = rows
        return padded


Labels = DocumentLabels | TokenLabels


def out_of_column(given: Any) -> Any:
    """Return labels that a library holds in a column of its own (of datasets, pandas, polars, pyarrow) as a list.

    Arrays, tensors, lists and tuples are returned as they are.
    """
    if isinstance(given, np.ndarray | list | tuple | str | bytes):
        return given
    for name in ("to_list", "to_pylist"):
        if hasattr(given, name):
            return getattr(given, name)()
    return list(given) if isinstance(given, Sequence) else given


def labels_of(given: Any, lengths: NDArray[np.int64]) -> Labels:
    """Return labels in stored form; whole numbers and truth values as int64, which losses want.

    Args:
        given: an array, tensor, list or column (see ``out_of_column``) of numbers or of arrays of one shape, one a
            document; or a list or column of 1-d arrays of which each has as many elements as its document has tokens.
        lengths: ``[n]`` tokens of each document, 0 where that is not known.

    Raises:
        ShapeError: they are none of these, or not one a document.
    """
    count, given = len(lengths), out_of_column(given)
    if isinstance(given, np.ndarray) and given.dtype == object:
        given = list(given)
    if isinstance(given, list | tuple) and len(given) == count and count and np.ndim(given[0]) == 1:
        arrays = [to_numpy(one) for one in given]
        counts = np.array([one.size for one in arrays], np.int64)
        of_tokens = bool((counts != counts[0]).any()) or bool((counts == lengths).all())
        if of_tokens and all(one.ndim == 1 for one in arrays):
            wrong = np.flatnonzero((counts != lengths) & (lengths > 0))
            if len(wrong):
                i = int(wrong[0])
                raise _mismatch(i, lengths[i], counts[i])
            return TokenLabels(_numbers(np.concatenate(arrays)), offsets_of(counts), np.arange(count))
    return DocumentLabels(_numbers(_one_each(given, count)))


def of_entries(given: Any, documents: NDArray[np.int64], count: int) -> Any:
    """Return labels of entries from labels of documents, one or several entries of which come from each.

    Args:
        documents: ``[n]``, whose each entry is.
        count: of documents.

    Raises:
        ShapeError: the labels are not one a document.
    """
    given = out_of_column(given)
    if isinstance(given, list | tuple):
        if len(given) != count:
            raise ShapeError(f"{count} documents and {len(given)} labels: give one a document")
        return [given[i] for i in documents.tolist()]
    return _one_each(given, count)[documents]


def _one_each(given: Any, count: int) -> NDArray[Any]:
    values = to_numpy(given)
    if not values.ndim or len(values) != count:
        raise ShapeError(f"{count} documents and labels of shape {list(values.shape)}: give one a document")
    return values


def _mismatch(position: int, tokens: int, labels: int) -> ShapeError:
    return ShapeError(
        f"position {position}: {tokens} tokens and {labels} labels; labels of tokens are one for each token of the "
        "entry, special tokens included (-100 where there is none)"
    )


def _numbers(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.kind not in "biuf":
        raise ShapeError(f"labels are numbers, not {values.dtype}: give each class a number")
    return values if values.dtype.kind == "f" else values.astype(np.int64)

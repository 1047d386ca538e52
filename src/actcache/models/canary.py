"""Canaries: fixed documents whose rows are kept with a space, to tell whether a model computes the same numbers.

Identity covers what has bytes (``actcache.models.lower_state``). What has none only running can see: hooks, an
adapter's scale, a number that a module's forward reads, kernels, libraries. So a recycler computes the canaries before
it serves from a space or adds to it. They are four texts, and one long document of their tokens for what shows at a
distance; of models of images or audio, three that are made of whole numbers (``MediaEncoder.canaries``).
"""

from __future__ import annotations

import io
import json
import logging
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CanaryError, FormatError, NonFiniteError, UnsupportedModelError
from actcache.models.lower_half import LowerHalf, plan_encoded
from actcache.models.processing import Features, Made, MediaEncoder
from actcache.models.tokenizing import DocumentEncoder, Encoded

#: What turns documents into what a model takes.
Encoder = DocumentEncoder | MediaEncoder

logger = logging.getLogger(__name__)

BLOB_NAME = "canaries.npz"

#: Part of format version 1: they never change.
TEXTS = (
    "The quick brown fox jumps over the lazy dog, and nobody in the village was very much surprised.",
    "Zażółć gęślą jaźń; 東京は今日も雨です。 Привет, мир! café naïve \U0001f469\u200d\U0001f680\U0001f680",
    "def area(r: float) -> float: return 3.14159 * r ** 2  # 1,024 rows; 0x7f != 127.5e-3",
    "When a transformer has read a document once, its lower layers will compute the same activations at every later "
    "reading, as long as nobody changes their weights. A cache may therefore keep them on disk and start each epoch in "
    "the middle of the network, which saves about half of the time, provided that what it returns is what the layers "
    "would have computed.",
)

# The largest relative error of a canary (see ``relative_error``) that another kernel, device or batch shape explains.
# Summing in another order moves a layer's output by a few units in the last place (2^-24, 2^-11, 2^-8 relative), and
# that grows along the layers: 3e-6, 2e-3 and 1.6e-2 were measured in float32, float16 and bfloat16, where TF32 and
# other weights give above 1e-3 in float32. So each limit lies above the rounding of its dtype and below what a change
# of the computation does.
TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}

_LONGEST = 1024  # tokens of the long canary, where the model takes as many
_LAST = 128  # rows of a canary are kept at most, the last ones: they depend on all before them
_FEW = 32  # different tokens in all texts: fewer say little
_MEDIA = 3  # images or audio, where these are a model's documents
_TOGETHER = 1 << 20  # padded tokens of a batch: all of them
_SHORT = 8  # tokens of a document that is computed beside the canaries to see whether company matters
_MAX_BLOB = 64 << 20
# Columns that are small beside others carry more of the rounding; measured in bfloat16, up to 1.2 times as much in
# models without large columns.
_SMALL_COLUMNS = 4.0


def make(encoder: Encoder, lower: LowerHalf, provenance: Mapping[str, str]) -> bytes:
    """Compute the canaries, each alone, and return them as one blob: token ids, float32 rows, and where from.

    Raises:
        NonFiniteError: their rows hold infinity or NaN.
        UnsupportedModelError: their rows are others when they are computed as one batch.
        ModelError: the lower half is in train mode.
    """
    these = _documents(encoder)
    alone = [rows for document in these for rows in _rows(lower, [document])]
    if not all(np.isfinite(rows).all() for rows in alone):
        raise NonFiniteError(
            f"this {type(lower.base_model).__name__} makes infinity or NaN of the canaries in {lower.compute_dtype}, "
            "and so it may of documents: compute in another dtype (bfloat16, float32)"
        )
    for error in _errors(*_in_company(lower, these, alone)):
        if not error <= TOLERANCE[lower.compute_dtype]:
            raise UnsupportedModelError(
                f"this {type(lower.base_model).__name__} computes a document by the others of its batch: the same "
                f"tokens alone and in a batch are {error:.2g} apart, more than the {TOLERANCE[lower.compute_dtype]:g} "
                f"that other kernels explain in {lower.compute_dtype}. Such rows cannot be stored. Are its activations "
                "quantized, or has its attention or its experts room for so many tokens a batch?"
            )
    what = json.dumps({"texts": _texts(encoder), "provenance": dict(provenance)}).encode()
    out = io.BytesIO()
    np.savez(
        out,
        token_ids=_ids(these),
        lengths=np.array([one.length for one in these], np.int64),
        rows=np.concatenate(alone),
        what=np.frombuffer(what, np.uint8),
    )
    return out.getvalue()


def _in_company(
    lower: LowerHalf, these: Sequence[Made], alone: list[NDArray[np.float32]]
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """Return rows of documents that were each computed alone, and the same computed in a batch with others."""
    texts = [one for one in these if isinstance(one, Encoded)]
    if texts:
        short = Encoded(texts[-1].token_ids[:_SHORT], texts[-1].type_ids[:_SHORT])
        return [*alone, *_rows(lower, [short])], _rows(lower, [*texts, short])
    others = [replace(one, values=-2 * one.values) for one in these if isinstance(one, Features)]
    return alone, [_rows(lower, [one, other])[0] for one, other in zip(these, others, strict=True)]


def check(blob: bytes, encoder: Encoder, lower: LowerHalf, provenance: Mapping[str, str]) -> float:
    """Compute the canaries with this model and compare them with stored ones; return the largest relative error.

    Raises:
        CanaryError: the error is above ``TOLERANCE``, or the texts make other tokens; it names what else differs.
        FormatError: the blob is no such thing.
        ModelError: the lower half is in train mode.
    """
    stored_ids, stored_lengths, stored_rows, theirs = _read(blob, lower.hidden_size, _texts(encoder))
    changed = [name for name in sorted(theirs.keys() | provenance.keys()) if theirs.get(name) != provenance.get(name)]
    where = "; ".join(f"{name}: {theirs.get(name)!r} then, {provenance.get(name)!r} now" for name in changed) or (
        "nothing that is recorded: is it a hook, an adapter, an attribute of a module that was changed after loading?"
    )
    these = _documents(encoder)
    ids = _ids(these)
    lengths = np.array([one.length for one in these], np.int64)
    if not (np.array_equal(stored_ids, ids) and np.array_equal(stored_lengths, lengths)):
        raise CanaryError(
            f"the space's canaries make other tokens or rows here, though its recipe is the same ({where})"
        )
    computed = [*_rows(lower, these[:-1]), *_rows(lower, these[-1:])]  # little padding
    ends = np.cumsum([len(rows) for rows in computed])[:-1]
    error = max(_errors(np.split(stored_rows, ends), computed))
    tolerance = TOLERANCE[lower.compute_dtype]
    if not error <= tolerance:
        raise CanaryError(
            f"the space's canary documents come out differently here: relative error {error:.2g}, more than the "
            f"{tolerance:g} that other kernels explain in {lower.compute_dtype}. What differs: {where}. Use "
            "another store, or go back to that set-up"
        )
    if changed:
        logger.info("the space was recorded in another set-up (%s); its canaries agree (error %.2g)", where, error)
    return error


def token_ids(blob: bytes, hidden_size: int) -> NDArray[np.int32]:
    """Return the ids of all stored canaries' tokens, one after another; raises ``FormatError`` as ``check`` does."""
    return _read(blob, hidden_size, TEXTS)[0]


def _documents(encoder: Encoder) -> Sequence[Made]:
    return encoder.canary_features() if isinstance(encoder, MediaEncoder) else documents(encoder)


def documents(encoder: DocumentEncoder) -> list[Encoded]:
    """Return the texts, cut to what the model takes, and one long document of their tokens in a fixed disorder."""
    texts = [windows[0] for windows in encoder.truncating.encode(TEXTS)]
    tokens = np.concatenate([one.token_ids for one in texts])
    if len(np.unique(tokens)) < _FEW:
        tokens = _spread_ids(encoder)
    count = np.arange(min(_LONGEST, encoder.max_length or _LONGEST))
    # A sequence that does not repeat within _LONGEST: what stands far from a row is not what stands near it.
    ids = tokens[(count * count * 7 + count * 3) % 1021 % len(tokens)]
    return [*texts, Encoded(ids.astype(np.int32), np.zeros(len(ids), np.int8))]


def _spread_ids(encoder: DocumentEncoder) -> NDArray[np.int64]:
    """Return ids from all over the vocabulary: of one that has no words of the texts, as of events or amino acids.

    Where all rows of a document are of one unknown token, attention comes to the same whatever its weights are.
    """
    size = min(len(encoder.tokenizer), encoder.vocabulary)
    ids = np.unique(np.linspace(0, size - 1, min(size, _LAST)).astype(np.int64))
    plain = np.setdiff1d(ids, encoder.tokenizer.all_special_ids)
    return plain if len(plain) else ids


def _texts(encoder: Encoder) -> Sequence[str]:
    """Return the documents as a blob names them; what is no text has its number."""
    return TEXTS if isinstance(encoder, DocumentEncoder) else [f"{encoder.name} {i}" for i in range(_MEDIA)]


def _ids(these: Sequence[Made]) -> NDArray[np.int32]:
    return np.concatenate([np.empty(0, np.int32), *(one.token_ids for one in these if isinstance(one, Encoded))])


def _rows(lower: LowerHalf, some: Sequence[Made]) -> list[NDArray[np.float32]]:
    """Return the rows that are kept of documents that are computed together."""
    texts = [one for one in some if isinstance(one, Encoded)]
    if texts:
        computed = lower.run_last(_LAST, [one.token_ids for one in texts], [one.type_ids for one in texts])
        return [rows.astype(np.float32) for rows in computed]
    result: list[Any] = [None] * len(some)
    for batch in plan_encoded(some, _TOGETHER):
        for i, rows in zip(batch, lower.run_encoded([some[i] for i in batch])[lower.site], strict=True):
            result[i] = rows.astype(np.float32)[-_LAST:]
    return result


def _errors(expected: Sequence[NDArray[np.float32]], found: Sequence[NDArray[np.float32]]) -> list[float]:
    """Return each document's relative error."""
    columns = column_sizes(np.concatenate(expected))
    return [relative_error(there, here, columns) for there, here in zip(expected, found, strict=True)]


def _read(
    blob: bytes, hidden_size: int, expected: Sequence[str]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], dict[str, str]]:
    def refuse(why: object) -> FormatError:
        return FormatError(
            f"the space's {BLOB_NAME} is damaged or foreign ({why}): delete it, and the next fill makes it"
        )

    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            if sum(member.file_size for member in archive.infolist()) > _MAX_BLOB:
                raise refuse("it says that it is too large")
        with np.load(io.BytesIO(blob), allow_pickle=False) as arrays:
            ids, lengths, rows = (arrays[name] for name in ("token_ids", "lengths", "rows"))
            what = json.loads(arrays["what"].astype(np.uint8).tobytes())
        texts, provenance = what["texts"], what["provenance"]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise refuse(error) from None
    good = (
        ids.dtype == np.int32
        and lengths.dtype == np.int64
        and rows.dtype == np.float32
        and ids.ndim == 1
        and lengths.shape == ((len(TEXTS) + 1,) if expected is TEXTS else (len(expected),))
        and bool((lengths > 0).all())
        and len(ids) == (int(lengths.sum()) if expected is TEXTS else 0)
        and rows.shape == (int(np.minimum(lengths, _LAST).sum()), hidden_size)
        and texts == list(expected)
        and isinstance(provenance, dict)
    )
    if not good:
        raise refuse("its arrays do not fit together")
    return ids, lengths, rows, provenance


def relative_error(
    expected: NDArray[np.generic], found: NDArray[np.generic], columns: NDArray[np.float64] | None = None
) -> float:
    """Return the relative error of a document's rows ``[tokens, hidden]``, infinite where something is no number.

    It is the largest of that of all numbers together (L2) and of the median row, each row by its own norm: one row with
    a large norm, as decoders have at the first token, would hide what happens to all others.

    With ``columns``, the root mean square of each over many documents, a quarter of the median row's error with columns
    brought to one size counts, too: a column that is large everywhere would hide the others.
    """
    there = expected.astype(np.float64)
    difference = found.astype(np.float64) - there
    error = max(
        float(np.linalg.norm(difference)) / (float(np.linalg.norm(there)) or 1.0),
        _median_row(difference, there),
        0.0 if columns is None else _median_row(difference / columns, there / columns) / _SMALL_COLUMNS,
        key=lambda value: math.inf if math.isnan(value) else value,
    )
    return math.inf if math.isnan(error) else error


def column_sizes(rows: NDArray[np.generic]) -> NDArray[np.float64]:
    """Return the root mean square of each column of ``[rows, hidden]``; 1 where that is 0."""
    sizes: NDArray[np.float64] = np.sqrt(np.mean(np.square(rows.astype(np.float64)), axis=0))
    sizes[sizes == 0] = 1.0
    return sizes


def _median_row(difference: NDArray[np.float64], there: NDArray[np.float64]) -> float:
    norms = np.linalg.norm(there, axis=1)
    norms[norms == 0] = 1.0
    return float(np.median(np.linalg.norm(difference, axis=1) / norms)) if len(norms) else 0.0

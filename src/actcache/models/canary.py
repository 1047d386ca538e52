"""Canaries: fixed texts whose rows are kept with a space, to tell whether another set-up computes the same numbers.

Provenance (library versions, device, attention implementation) is not part of a space's identity, so that an upgrade
costs nobody their cache. Where it differs, the canaries are computed again and compared. So they are before a model
adds to a space or replays it: neither identity nor provenance sees hooks, an adapter's scale, or attributes that were
changed after loading.
"""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CanaryError, FormatError
from actcache.models.record import LowerHalf
from actcache.models.tokenizing import DocumentEncoder

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

# The largest relative error (L2, all canaries together) that another kernel, device or batch shape explains. Summing in
# another order moves a layer's output by a few units in the last place (2^-24, 2^-11, 2^-8 relative), and that grows
# along the layers: 1e-6 was measured in float32 where TF32 and other weights give above 1e-3. So each limit lies well
# above the rounding of its dtype and well below what a change of the computation does.
TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}

_MAX_BLOB = 64 << 20


class Blobs(Protocol):
    """What is asked of a space."""

    def blob(self, name: str) -> bytes | None: ...

    def put_blob(self, name: str, data: bytes, *, replace: bool = False) -> bool: ...


def make(encoder: DocumentEncoder, lower: LowerHalf, provenance: Mapping[str, str]) -> bytes:
    """Compute the canaries and return them as one blob: token ids, rows before any codec (float32), and where from."""
    ids, lengths, rows = _compute(encoder, lower)
    what = json.dumps({"texts": TEXTS, "provenance": dict(provenance)}).encode()
    out = io.BytesIO()
    np.savez(out, token_ids=ids, lengths=lengths, rows=rows, what=np.frombuffer(what, np.uint8))
    return out.getvalue()


def check(
    blob: bytes, encoder: DocumentEncoder, lower: LowerHalf, provenance: Mapping[str, str], *, always: bool = False
) -> float | None:
    """Compare stored canaries with what this model computes now.

    Args:
        always: whether to compute them where the stored provenance equals the given one, too.

    Returns:
        The relative error; None where the stored provenance equals the given one, so that nothing was computed.

    Raises:
        CanaryError: the error is above the tolerance of the compute dtype, or the texts make other tokens. It names the
            provenance fields that differ.
        FormatError: the blob is no such thing.
        ModelError: the lower half is in train mode.
    """
    stored_ids, stored_lengths, stored_rows, theirs = _read(blob, lower.hidden_size)
    changed = {
        name: (theirs.get(name), provenance.get(name))
        for name in sorted(theirs.keys() | provenance.keys())
        if theirs.get(name) != provenance.get(name)
    }
    if not (changed or always):
        return None
    ids, lengths, rows = _compute(encoder, lower)
    where = "; ".join(f"{name}: {old!r} then, {new!r} now" for name, (old, new) in changed.items()) or (
        "nothing that is recorded: is it a hook, an adapter, an attribute of a module that was changed after loading?"
    )
    if not (np.array_equal(stored_ids, ids) and np.array_equal(stored_lengths, lengths)):
        raise CanaryError(f"the space's canary texts make other tokens here, though its recipe is the same ({where})")
    norm = float(np.linalg.norm(stored_rows))
    error = float(np.linalg.norm(rows - stored_rows)) / (norm or 1.0)
    tolerance = TOLERANCE[lower.compute_dtype]
    if not error <= tolerance:  # NaN is no agreement
        raise CanaryError(
            f"the space's canary documents come out differently here: relative error {error:.2g}, more than the "
            f"{tolerance:g} that other kernels explain in {lower.compute_dtype}. What differs: {where}. Use "
            "another store, or go back to that set-up"
        )
    return error


def settle(
    space: Blobs, encoder: DocumentEncoder, lower: LowerHalf, provenance: Mapping[str, str], *, create: bool
) -> bytes | None:
    """Check a space's canaries, or make them where there are none and ``create`` is set.

    Returns:
        The canaries, which agree; None where the space has none.

    Raises:
        CanaryError, FormatError: as ``check``.
    """
    blob = space.blob(BLOB_NAME)
    if blob is None and create:
        made = make(encoder, lower, provenance)
        if space.put_blob(BLOB_NAME, made):
            return made
        blob = space.blob(BLOB_NAME)  # another process was first
    if blob is None:
        return None
    error = check(blob, encoder, lower, provenance)
    if error is not None:
        logger.info("%r was recorded in another set-up; its canaries agree (relative error %.2g)", space, error)
    return blob


def token_ids(blob: bytes, hidden_size: int) -> NDArray[np.int32]:
    """Return the ids of all stored canaries' tokens, one after another; raises ``FormatError`` as ``check`` does."""
    return _read(blob, hidden_size)[0]


def _compute(
    encoder: DocumentEncoder, lower: LowerHalf
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.float32]]:
    encoded = [windows[0] for windows in encoder.truncating().encode(TEXTS)]
    rows = lower.run([one.token_ids for one in encoded], [one.type_ids for one in encoded])
    ids = np.concatenate([one.token_ids for one in encoded])
    return ids, np.array([len(one.token_ids) for one in encoded], np.int64), np.concatenate(rows).astype(np.float32)


def _read(blob: bytes, hidden_size: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], dict[str, str]]:
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
        and rows.shape == (len(ids), hidden_size)
        and lengths.shape == (len(TEXTS),)
        and int(lengths.sum()) == len(ids)
        and texts == list(TEXTS)
        and isinstance(provenance, dict)
    )
    if not good:
        raise refuse("its arrays do not fit together")
    return ids, lengths, rows, provenance

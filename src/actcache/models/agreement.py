"""Whether a model computes the numbers of a space: asked before anything is served from it or added to it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from actcache.errors import CanaryError, UsageError
from actcache.models import canary
from actcache.models.record import LowerHalf
from actcache.models.tokenizing import DocumentEncoder
from actcache.models.verification import verify_stored
from actcache.space import Space

logger = logging.getLogger(__name__)

_SAMPLE = 8  # entries that are computed again where a space has no canaries


def agree(
    space: Space, encoder: DocumentEncoder, lower: LowerHalf, provenance: Mapping[str, str], *, create: bool
) -> bytes | None:
    """Compute a space's canaries and compare them; where it has none, some of its entries.

    Args:
        create: make the canaries where there are none, for a space that is about to be added to.

    Returns:
        The canaries, which agree; None where the space has none.

    Raises:
        CanaryError: canaries or entries come out differently.
        FormatError: the canaries are damaged.
        ModelError: the lower half is in train mode.
        UnsupportedModelError: the model's rows depend on the others of a batch, and so are no canaries.
    """
    blob = space.blob(canary.BLOB_NAME)
    if blob is None and len(space):
        _compare_entries(space, encoder, lower)
    if blob is None and create:
        made = canary.make(encoder, lower, provenance)
        if space.put_blob(canary.BLOB_NAME, made):
            return made
        blob = space.blob(canary.BLOB_NAME)  # another process was first
    if blob is not None:
        canary.check(blob, encoder, lower, provenance)
    return blob


def _compare_entries(space: Space, encoder: DocumentEncoder, lower: LowerHalf) -> None:
    try:
        report = verify_stored(space, lower, encoder, sample=_SAMPLE)
    except UsageError:
        logger.warning(
            "%r has neither canaries nor token ids: nothing shows whether this model computes its numbers", space
        )
        return
    if report.failed:
        raise CanaryError(
            f"{space!r} has no canaries, and {len(report.failed)} of {report.documents} entries are not what this "
            "model computes from their token ids: another model recorded them. Use another store"
        )

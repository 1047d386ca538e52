"""Whether a model computes the numbers of a space: asked before anything is served from it or added to it."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence

from actcache.errors import CanaryError, UsageError
from actcache.models import canary
from actcache.models.matching import check_same_lower_half
from actcache.models.record import LowerHalf, evaluating
from actcache.models.tokenizing import DocumentEncoder
from actcache.models.verification import disagreeing, verify_stored
from actcache.store.document_entries import find_entries
from actcache.store.space import Space

logger = logging.getLogger(__name__)

_SAMPLE = 3  # of the caller's own documents, computed again where they are present
_WITHOUT_CANARIES = 8  # entries that are computed again where a space has no canaries


class Agreement:
    """Sees to it that what a space serves, and what is added to it, is what a lower half computes. Not thread-safe.

    Args:
        provenance: the set-up that the lower half is computed in.
        enabled: whether canaries and documents are computed again; the weights are looked at in any case.
    """

    def __init__(
        self,
        space: Space,
        encoder: DocumentEncoder,
        lower: LowerHalf,
        provenance: Mapping[str, str],
        *,
        enabled: bool = True,
    ) -> None:
        self._space, self._encoder, self._lower = space, encoder, lower
        self._provenance, self._enabled = provenance, enabled
        self._canaries: bytes | None = None  # the space's, where they agree

    @property
    def enabled(self) -> bool:
        return self._enabled

    def when_opened(self) -> None:
        """Compare the canaries; raises ``CanaryError``."""
        if self._enabled:
            with evaluating(self._lower.base_model):
                self._compare_canaries(create=False)

    def before_serving(self, documents: Sequence[bytes]) -> None:
        """Compare the weights, the canaries and some of the documents (by their keys) that are about to be served.

        Raises:
            LowerHalfMismatchError: the lower half was trained meanwhile.
            CanaryError: it computes other numbers.
        """
        check_same_lower_half(self._lower.base_model, self._space.recipe)
        if self._enabled:
            with evaluating(self._lower.base_model):
                self._compare_canaries(create=False)
                self.of_present(documents)

    def before_adding(self) -> None:
        """Compare the weights and the canaries, which are made where there are none.

        Raises:
            LowerHalfMismatchError, CanaryError: as ``before_serving``.
            ModelError: the lower half is in train mode.
            UnsupportedModelError, NonFiniteError: its rows cannot be stored.
        """
        check_same_lower_half(self._lower.base_model, self._space.recipe)
        if self._enabled or self._space.blob(canary.BLOB_NAME) is None:
            self._compare_canaries(create=True)

    def of_present(self, documents: Sequence[bytes]) -> None:
        """Compute a few of these documents (by their keys) again, chosen at random among those that are present.

        Canaries are the same for all: that a hook looks for a token which they do not hold, only documents show.

        Raises:
            CanaryError: one comes out differently.
        """
        if not self._enabled or not documents:
            return
        some = random.Random().sample(documents, min(_SAMPLE, len(documents)))  # the caller's own state stays as it is
        keys = [entries[0] for entries in find_entries(self._space, some, self._encoder.windows) if entries]
        wrong = disagreeing(self._space, self._lower, self._encoder, keys)
        if wrong:
            raise CanaryError(
                f"{len(wrong)} of {len(keys)} stored documents that were computed again come out differently here, "
                f"though weights, configuration and canaries agree; the first is {wrong[0].hex()}. Is there a hook "
                "that looks at tokens? Use another store, or go back to the model that recorded them"
            )

    def reference(self) -> bytes:
        """Return the space's canaries, or, where it has none yet, those that this model makes."""
        if self._canaries is not None:
            return self._canaries
        with evaluating(self._lower.base_model):
            return canary.make(self._encoder, self._lower, self._provenance)

    def _compare_canaries(self, *, create: bool) -> None:
        blob = self._canaries or self._space.blob(canary.BLOB_NAME)
        if blob is None and len(self._space):
            self._compare_entries()
        if blob is None and create:
            made = canary.make(self._encoder, self._lower, self._provenance)
            if self._space.put_blob(canary.BLOB_NAME, made):
                self._canaries = made
                return
            blob = self._space.blob(canary.BLOB_NAME)  # another process was first
        if blob is not None:
            canary.check(blob, self._encoder, self._lower, self._provenance)
            self._canaries = blob

    def _compare_entries(self) -> None:
        try:
            report = verify_stored(self._space, self._lower, self._encoder, sample=_WITHOUT_CANARIES)
        except UsageError:
            logger.warning(
                "%r has neither canaries nor token ids: nothing shows whether this model computes its numbers",
                self._space,
            )
            return
        if report.failed:
            raise CanaryError(
                f"{self._space!r} has no canaries, and {len(report.failed)} of {report.documents} entries are not what "
                "this model computes from their token ids: another model recorded them. Use another store"
            )

"""Whether a model computes the numbers of a space: asked before anything is served from it or added to it."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from actcache.errors import CanaryError, LowerHalfMismatchError, UsageError
from actcache.models import canary
from actcache.models.families import base_model_of, family_of
from actcache.models.lower_half import LowerHalf, together
from actcache.models.modes import evaluating
from actcache.models.provenance import setup_of
from actcache.models.sites import site_in
from actcache.models.verification import disagreeing, verify_stored
from actcache.models.weights import check_same_lower_half, check_same_lower_halves
from actcache.store.document_entries import find_entries
from actcache.store.space import Space

logger = logging.getLogger(__name__)

_SAMPLE = 3  # of the caller's own documents, computed again where they are present
_WITHOUT_CANARIES = 8  # entries that are computed again where a space has no canaries


class Agreement:
    """Sees to it that what a space serves, and what is added to it, is what a lower half computes. Not thread-safe.

    Where it is not ``enabled``, it looks at the weights only, and computes no canaries and documents again.
    """

    def __init__(self, space: Space, encoder: canary.Encoder, lower: LowerHalf, *, enabled: bool = True) -> None:
        self.space, self.encoder, self.lower, self.enabled = space, encoder, lower, enabled
        self._setup = setup_of(lower)
        self._canaries: bytes | None = None  # the space's, where they agree

    def when_opened(self) -> None:
        """Compare the canaries; raises ``CanaryError``."""
        if self.enabled:
            with evaluating(self.lower.base_model):
                self._compare_canaries(create=False)

    def before_serving(self, documents: Sequence[bytes]) -> None:
        """Compare the weights, the canaries and some of the documents (by their keys) that are about to be served.

        Raises ``LowerHalfMismatchError`` where the lower half was trained meanwhile, ``CanaryError`` for other numbers.
        """
        check_same_lower_half(self.lower.base_model, self.space.recipe)
        if self.enabled:
            with evaluating(self.lower.base_model):
                self._compare_canaries(create=False)
                self.of_present(documents)

    def before_adding(self) -> None:
        """Compare the weights and the canaries; see the function."""
        before_adding([self])

    def compare_canaries(self) -> None:
        """Compare the canaries, which ``canary.make`` makes where there are none; raises as both do."""
        if self.enabled or self.space.blob(canary.BLOB_NAME) is None:
            self._compare_canaries(create=True)

    def of_present(self, documents: Sequence[bytes]) -> None:
        """Compute a few of these documents (by their keys) again, chosen at random; raises ``CanaryError``.

        Canaries are the same for all: that a hook looks for a token which they do not hold, only documents show.
        """
        if not self.enabled or not documents:
            return
        some = random.Random().sample(documents, min(_SAMPLE, len(documents)))  # the caller's own state stays as it is
        keys = [entries[0] for entries in find_entries(self.space, some, self.encoder.windows) if entries]
        wrong = disagreeing(self.space, self.lower, self.encoder, keys)
        if wrong:
            raise CanaryError(
                f"{len(wrong)} of {len(keys)} stored documents that were computed again come out differently here, "
                f"though weights, configuration and canaries agree; the first is {wrong[0].hex()}. Is there a hook "
                "that looks at tokens? Use another store, or go back to the model that recorded them"
            )

    def check_task_model(self, model: PreTrainedModel) -> None:
        """Run canaries through a task model with the space's weights; raises ``LowerHalfMismatchError``."""
        if not self.enabled:
            return
        canaries = self._canaries
        if canaries is None:  # the space has none yet
            with evaluating(self.lower.base_model):
                canaries = canary.make(self.encoder, self.lower, self._setup)
        base, recipe = base_model_of(model), self.space.recipe
        family = replace(family_of(base), equal_lengths=self.lower.family.equal_lengths)
        lower = LowerHalf(base, family, site_in(base, family, recipe), recipe.compute_dtype)
        try:
            with evaluating(base):
                canary.check(canaries, self.encoder, lower, setup_of(lower))
        except CanaryError as error:
            raise LowerHalfMismatchError(
                f"the lower half of this {type(model).__name__} has the recorded weights and configuration, but {error}"
            ) from error

    def _compare_canaries(self, *, create: bool) -> None:
        blob = self._canaries or self.space.blob(canary.BLOB_NAME)
        if blob is None and len(self.space):
            self._compare_entries()
        if blob is None and create:
            made = canary.make(self.encoder, self.lower, self._setup)
            if self.space.put_blob(canary.BLOB_NAME, made):
                self._canaries = made
                return
            blob = self.space.blob(canary.BLOB_NAME)  # another process was first
        if blob is not None:
            canary.check(blob, self.encoder, self.lower, self._setup)
            self._canaries = blob

    def _compare_entries(self) -> None:
        try:
            report = verify_stored(self.space, self.lower, self.encoder, sample=_WITHOUT_CANARIES)
        except UsageError:
            logger.warning(
                "%r has neither canaries nor token ids: nothing shows whether this model computes its numbers",
                self.space,
            )
            return
        if report.failed:
            raise CanaryError(
                f"{self.space!r} has no canaries, and {len(report.failed)} of {report.documents} entries are not what "
                "this model computes from their token ids: another model recorded them. Use another store"
            )


def when_opened(agreements: Sequence[Agreement]) -> None:
    """Compare the canaries of several sites of one model, computed by the same passes; raises ``CanaryError``."""
    with together([one.lower for one in agreements]):
        for one in agreements:
            one.when_opened()


def before_adding(agreements: Sequence[Agreement]) -> None:
    """Compare the weights and the canaries of several sites of one model, hashed once and computed by the same passes.

    Canaries are made where there are none. Raises as ``check_same_lower_half`` and ``canary.make`` do.
    """
    check_same_lower_halves(agreements[0].lower.base_model, [one.space.recipe for one in agreements])
    with together([one.lower for one in agreements]):
        for one in agreements:
            one.compare_canaries()

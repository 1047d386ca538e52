"""Whether a store's spaces hold what their models compute, from the token ids beside the entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actcache.admin.inspection import Progress, chosen, opened
from actcache.admin.recompute.models import RecordedModels
from actcache.errors import DataError, ModelError, UsageError
from actcache.models.verification import Verification, check_sample, verify_stored
from actcache.store.store import Store


@dataclass(frozen=True)
class StoreRecomputation:
    """What ``recompute`` found, by fingerprint."""

    spaces: dict[str, Verification]
    unable: dict[str, str]  # spaces of which nothing could be computed again, and why

    @property
    def ok(self) -> bool:
        """Whether all that was computed again is within its tolerance."""
        return all(found.ok for found in self.spaces.values())


def recompute(
    store: Store,
    models: RecordedModels,
    prefixes: Sequence[str] = (),
    *,
    sample: int,
    seed: int | None = None,
    progress: Progress | None = None,
) -> StoreRecomputation:
    """Compute entries of each space again from their stored token ids, and compare; changes nothing.

    Type ids are the stored ones; else zeros or, where an entry has two separators and zeros are wrong, those of a pair
    of texts. (Pairs that were recorded without special tokens and without type ids come out wrong.)

    An entry may be off by what other kernels do in the compute dtype (``models.canary.TOLERANCE``) and by the stored
    dtype's rounding, as a relative error (L2): 6e-4 for float16 entries computed in float32.

    Args:
        prefixes: of the fingerprints of the spaces; all where there are none.
        sample: entries of each space, drawn at random.
        seed: of the choice; None for another each time.
        progress: told the fingerprint, and entries.

    Raises:
        UsageError: a prefix fits no space, or the sample is none.
        StoreError: the store cannot be read.
    """
    check_sample(sample)
    spaces, unable = {}, {}
    for fingerprint in chosen(store, prefixes):

        def tell(done: int, total: int, name: str = fingerprint) -> None:
            if progress is not None:
                progress(name, done, total)

        try:
            with opened(store, fingerprint) as space:
                model = models.of(space.recipe)
                model.check_canaries(space)
                spaces[fingerprint] = verify_stored(
                    space, model.lower, model.encoder, sample=sample, seed=seed, progress=tell
                )
        except (DataError, ModelError, UsageError) as error:
            unable[fingerprint] = str(error)
    return StoreRecomputation(spaces, unable)

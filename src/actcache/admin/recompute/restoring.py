"""Repair where the model is at hand: what is corrupt is quarantined, then computed again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actcache.admin.inspection import Progress, chosen, opened
from actcache.admin.recompute.inputs import Lost, lost_before, lost_now, of_documents, of_other_spaces, proven
from actcache.admin.recompute.models import RecordedModel, RecordedModels
from actcache.errors import DataError, ModelError, UsageError
from actcache.format.keys import Document
from actcache.models.lower_half import TOKEN_BUDGET, plan_batches
from actcache.models.tokenizing import Encoded
from actcache.models.verification import computable
from actcache.store.space import Repair, Space
from actcache.store.store import Store

_HELD = 8 * TOKEN_BUDGET  # tokens whose rows are held before they are put


@dataclass(frozen=True)
class Restoration:
    """What became of one space."""

    quarantined: list[bytes]  # keys of corrupt entries, by this repair
    set_aside: list[str]  # segments that could not be read, by this repair; what they held a fill computes again
    recomputed: list[bytes] = field(default_factory=list)  # keys of entries that are back
    missing: list[bytes] = field(default_factory=list)  # keys of quarantined entries that are not
    unable: str | None = None  # why nothing could be computed


@dataclass(frozen=True)
class StoreRestoration:
    """What ``repair`` did, by fingerprint; what is unreadable was left alone."""

    spaces: dict[str, Restoration]
    unreadable: dict[str, str]


def repair(
    store: Store,
    models: RecordedModels,
    prefixes: Sequence[str] = (),
    *,
    texts: Callable[[], Iterable[Document]] | None = None,
    stride: int = 0,
    progress: Progress | None = None,
) -> StoreRestoration:
    """Verify spaces, quarantine what is corrupt, and compute it again; also what earlier repairs quarantined.

    An entry is computed again only from what is certain to be its document: a text of that key, the token ids that
    another space of the store has for it, or its own token ids where they prove themselves (``recomputing.inputs``).
    Run it again where it was interrupted: what lies in quarantine and is absent is looked at each time (lmdb keeps no
    quarantine: there a fill goes on).

    Args:
        prefixes: of the fingerprints of the spaces; all where there are none.
        texts: returns the corpus from its beginning; it is streamed once for each space that has lost something.
        stride: of the windows into which documents are cut, which a recipe does not say.
        progress: told the fingerprint, and entries.

    Raises:
        DocumentError: a document of the corpus has no key.
        StoreError: read-only, disk full, ...; what was computed before stays.
    """
    spaces, unreadable = {}, {}
    for fingerprint in chosen(store, prefixes):
        try:
            with opened(store, fingerprint) as space:
                spaces[fingerprint] = _Repair(store, space, progress).run(models, texts, stride)
        except DataError as error:
            unreadable[fingerprint] = str(error)
    return StoreRestoration(spaces, unreadable)


class _Repair:
    def __init__(self, store: Store, space: Space, progress: Progress | None) -> None:
        self._store, self._space, self._progress = store, space, progress

    def run(self, models: RecordedModels, texts: Callable[[], Iterable[Document]] | None, stride: int) -> Restoration:
        found = self._space.verify(self._tell("verify"))
        lost = lost_now(self._space, found.corrupt)  # before they are out of the way
        done = self._space.repair(found) if not found.intact else Repair([], [])
        lost = lost_before(self._store, self._space) | lost
        keys = list(lost)
        lost = {keys[i]: lost[keys[i]] for i in np.flatnonzero(~self._space.contains(keys)).tolist()}
        if not lost:
            return Restoration(done.quarantined, done.set_aside)
        extras = frozenset().union(*(one.extras for one in lost.values()))
        try:
            model = models.of(self._space.recipe, stride=stride, extras=sorted(extras))
            model.check_canaries(self._space, create=True)
        except (ModelError, UsageError, DataError) as error:
            return Restoration(done.quarantined, done.set_aside, [], sorted(lost), str(error))
        inputs = self._inputs(model, lost, texts)
        recomputed = self._compute(model, inputs, lost)
        return Restoration(done.quarantined, done.set_aside, recomputed, sorted(lost.keys() - set(recomputed)))

    def _inputs(
        self, model: RecordedModel, lost: Mapping[bytes, Lost], texts: Callable[[], Iterable[Document]] | None
    ) -> dict[bytes, Encoded]:
        inputs = of_documents(self._space, model.encoder, proven(model.encoder, lost), lost)
        left = {key: one for key, one in lost.items() if key not in inputs}
        if left and texts is not None:
            inputs |= of_documents(self._space, model.encoder, texts(), left)
            left = {key: one for key, one in lost.items() if key not in inputs}
        inputs |= of_other_spaces(self._store, self._space.recipe, model.encoder, left)
        return {key: one for key, one in inputs.items() if computable(model.lower, one)}

    def _compute(
        self, model: RecordedModel, inputs: Mapping[bytes, Encoded], lost: Mapping[bytes, Lost]
    ) -> list[bytes]:
        tell, recomputed = self._tell("compute"), []
        try:
            for extras, keys in _parts(inputs, lost):
                self._put(model, keys, [inputs[key] for key in keys], extras)
                recomputed += keys
                if tell is not None:
                    tell(len(recomputed), len(inputs))
        finally:
            self._space.flush()
        return recomputed

    def _put(self, model: RecordedModel, keys: list[bytes], given: list[Encoded], extras: list[str]) -> None:
        rows: list[Any] = [None] * len(keys)
        for batch in plan_batches([len(one.token_ids) for one in given], TOKEN_BUDGET):
            some = [given[i] for i in batch]
            computed = model.lower.run([one.token_ids for one in some], [one.type_ids for one in some])
            for i, array in zip(batch, computed, strict=True):
                rows[i] = array
        more: dict[str, Any] = {name: [getattr(one, name) for one in given] for name in extras}
        self._space.put(keys, rows, [one.token_ids for one in given], **more)

    def _tell(self, what: str) -> Callable[[int, int], None] | None:
        if self._progress is None:
            return None
        progress, name = self._progress, f"{self._space.recipe.fingerprint[:8]} {what}"
        return lambda done, total: progress(name, done, total)


def _parts(inputs: Mapping[bytes, Encoded], lost: Mapping[bytes, Lost]) -> Iterator[tuple[list[str], list[bytes]]]:
    """Yield what is computed and put at once: the optional arrays that these entries had, and their keys."""

    def extras_of(key: bytes) -> list[str]:
        return sorted(lost[key].extras)

    keys = sorted(inputs, key=lambda key: (extras_of(key), len(inputs[key].token_ids)))
    for extras, group in itertools.groupby(keys, key=extras_of):
        part: list[bytes] = []
        held = 0
        for key in group:
            part.append(key)
            held += len(inputs[key].token_ids)
            if held >= _HELD:
                yield extras, part
                part, held = [], 0
        if part:
            yield extras, part

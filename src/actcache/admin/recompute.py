"""Entries computed again by the model that recorded them: to verify them, and to restore what was quarantined."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actcache.admin.inspection import Progress, StepProgress, StoreRepair, each_space, step_of
from actcache.admin.lost import Lost, lost_before, lost_now, of_documents, of_media, of_other_spaces, proven
from actcache.errors import CanaryError, DataError, ModelError, UsageError
from actcache.format.keys import Document, Windows
from actcache.format.passages import Passages
from actcache.format.ragged import runs
from actcache.format.recipe import COMPUTE_DTYPES, Recipe
from actcache.models.agreement import Agreement
from actcache.models.lower_half import TOKEN_BUDGET, LowerHalf, plan_encoded
from actcache.models.partial_vocabulary import vocabulary_size
from actcache.models.passages import passages_in
from actcache.models.pretrained import load_pretrained, load_tokenizer
from actcache.models.processing import Made, MediaEncoder, takes_features
from actcache.models.sites import site_in, where_of
from actcache.models.tokenizing import DocumentEncoder, Encoded, TooLong, tokenizer_digest
from actcache.models.verification import Verification, check_sample, computable, verify_stored
from actcache.models.weights import check_same_lower_half
from actcache.store.space import Repair, Space
from actcache.store.store import Store

_HELD = 8 * TOKEN_BUDGET  # tokens whose rows are held before they are put


@dataclass(frozen=True)
class RecordedModel:
    """The lower half of a recipe, and how its documents become token ids. Not thread-safe."""

    name: str
    lower: LowerHalf
    encoder: DocumentEncoder | MediaEncoder
    cutter: DocumentEncoder | None = None  # of texts, where these are cut into passages, which the encoder takes

    def check_canaries(self, space: Space, *, create: bool = False) -> None:
        """Compare the space's canaries with what this model computes here; ``create`` makes them where there are none.

        Raises:
            CanaryError: they come out differently.
        """
        agreement = Agreement(space, self.encoder, self.lower)
        try:
            (agreement.before_adding if create else agreement.when_opened)()
        except CanaryError as error:
            raise CanaryError(f"{self.name} with these libraries and this device: {error}") from error


class RecordedModels:
    """Finds the models of recipes; the last one stays loaded. Not thread-safe.

    Args:
        model: id or folder of the model of all recipes that it is asked for; None for the one that each names.
        device: where to compute; None for a CUDA device where there is one, else the CPU.
    """

    def __init__(self, model: str | Path | None = None, *, device: str | None = None) -> None:
        self._model, self._device = None if model is None else str(model), device
        self._loaded: tuple[tuple[str, str | None, str], PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def of(
        self,
        recipe: Recipe,
        *,
        stride: int = 0,
        passages: Passages | None = None,
        extras: Sequence[str] = (),
        documents: bool = False,
    ) -> RecordedModel:
        """Return the model of a recipe, which encodes documents with ``extras``, of ``spans`` and ``word_ids``.

        Args:
            stride: of the windows into which documents are cut, which a recipe does not say.
            passages: how documents are cut, in spaces that have passages; which a recipe does not say, either.
            documents: whether the documents themselves are at hand, without which nothing of images and audio is.

        Raises:
            ModelError: the recipe names no weights (its entries were put without a recycler), the model cannot be
                loaded, or its tokenizer is another one.
            LowerHalfMismatchError: the model's lower half is not the one that was recorded.
            LayerError: the model has no such layer or module.
        """
        if recipe.weights is None or recipe.tokenizer is None:
            raise ModelError(
                "the recipe holds no digests of weights and tokenizer, for its entries were put without a recycler: "
                "nobody can tell which model computed them"
            )
        name = self._model or recipe.model
        model, tokenizer = self._load(name, recipe)
        if takes_features(model):
            return self._of_media(name, model, tokenizer, recipe, documents)
        family = check_same_lower_half(model, recipe)
        if tokenizer_digest(tokenizer) != recipe.tokenizer:
            raise ModelError(
                f"the tokenizer of {name} is not the one that recorded the space, though the lower half is: give the "
                "model's folder as it was then"
            )
        lower = LowerHalf(model, family, site_in(model, family, recipe), recipe.compute_dtype)
        too_long: TooLong = "truncate" if recipe.too_long == "truncate" else "refuse"
        if recipe.too_long == "windows" and recipe.max_length is not None:
            too_long = Windows(recipe.max_length, stride)
        cut = recipe.max_length, too_long, recipe.special_tokens
        encoder = DocumentEncoder(tokenizer, *cut, vocabulary=vocabulary_size(model), extras=extras)
        cutter = None
        if recipe.too_long == "passages" and passages is not None:
            cutter = DocumentEncoder(
                tokenizer, recipe.max_length, passages, recipe.special_tokens, vocabulary=vocabulary_size(model)
            )
        return RecordedModel(name, lower, encoder, cutter)

    def cutter(self, recipe: Recipe, passages: Passages) -> DocumentEncoder:
        """Return what cuts documents into the passages of a recipe's space; only the tokenizer is loaded.

        Raises:
            ModelError: it cannot be loaded, or is another one.
        """
        revision = recipe.provenance.get("revision") if self._model is None else None
        name = self._model or recipe.model
        tokenizer = load_tokenizer(name, revision)
        if tokenizer_digest(tokenizer) != recipe.tokenizer:
            raise ModelError(
                f"the tokenizer of {name} is not the one that recorded the space: say where it is (--model)"
            )
        return DocumentEncoder(tokenizer, recipe.max_length, passages, recipe.special_tokens)

    def _of_media(
        self, name: str, model: PreTrainedModel, processor: Any, recipe: Recipe, documents: bool
    ) -> RecordedModel:
        if not documents:
            raise ModelError(
                "its documents are images or audio, and entries hold nothing that these could be computed again from: "
                "give the documents themselves, recycler.verify(texts=documents) or cachectl repair --corpus FOLDER"
            )
        family = check_same_lower_half(model, recipe)
        lower = LowerHalf(model, family, site_in(model, family, recipe), recipe.compute_dtype)
        encoder = MediaEncoder(processor, model, lower.count_rows, too_long=recipe.too_long or "refuse")
        if encoder.digest() != recipe.tokenizer:
            raise ModelError(
                f"the processor of {name} is not the one that recorded the space, though the lower half is: give the "
                "model's folder as it was then"
            )
        return RecordedModel(name, lower, encoder)

    def _load(self, name: str, recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        revision = recipe.provenance.get("revision") if self._model is None else None
        weights = recipe.provenance.get("weights_dtype", "")  # as the caller had loaded them, in another dtype perhaps
        what = name, revision, weights if weights in COMPUTE_DTYPES else ""
        if self._loaded is None or self._loaded[0] != what:
            self._loaded = None  # one model in memory at a time
            try:
                dtype: torch.dtype | None = getattr(torch, what[2]) if what[2] else None
                loaded = load_pretrained(name, [where_of(recipe)], self._device, revision, dtype)
            except ModelError as error:
                hint = "" if self._model is not None else "; say where the model lies on this machine (--model)"
                raise ModelError(f"{error}{hint}") from error
            self._loaded = (what, *loaded)
        return self._loaded[1], self._loaded[2]


@dataclass(frozen=True)
class StoreRecomputation:
    """What ``verify_by_recomputing`` found, by fingerprint."""

    spaces: dict[str, Verification]
    unable: dict[str, str]  # spaces of which nothing could be computed again, and why

    @property
    def ok(self) -> bool:
        """Whether all that was computed again is within its tolerance."""
        return all(found.ok for found in self.spaces.values())


def verify_by_recomputing(
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
        sample: entries of each space, drawn at random.
        seed: of the choice; None for another each time.
    """
    check_sample(sample)

    def verify_space(space: Space) -> Verification:
        model = models.of(space.recipe)
        model.check_canaries(space)
        tell = step_of(progress, space.recipe.fingerprint)
        return verify_stored(space, model.lower, model.encoder, sample=sample, seed=seed, progress=tell)

    return StoreRecomputation(*each_space(store, prefixes, verify_space, (DataError, ModelError, UsageError)))


@dataclass(frozen=True)
class Restoration(Repair):
    """What became of one space; what segments held that were set aside, a fill computes again."""

    recomputed: list[bytes] = field(default_factory=list)  # keys of entries that are back
    missing: list[bytes] = field(default_factory=list)  # keys of quarantined entries that are not
    without_columns: list[bytes] = field(default_factory=list)  # of these, whose own columns are damaged as well
    unable: str | None = None  # why nothing could be computed


def repair_by_recomputing(
    store: Store,
    models: RecordedModels,
    prefixes: Sequence[str] = (),
    *,
    texts: Callable[[], Iterable[Document]] | None = None,
    stride: int = 0,
    passages: Passages | None = None,
    progress: Progress | None = None,
) -> StoreRepair[Restoration]:
    """Verify spaces, quarantine what is corrupt, and compute it again; also what earlier repairs quarantined.

    An entry is computed again only from what is certain to be its document: a text of that key, the token ids that
    another space of the store has for it, or its own token ids where they prove themselves (``actcache.admin.lost``).
    Run it again where it was interrupted: what lies in quarantine and is absent is looked at each time (lmdb keeps no
    quarantine: there a fill goes on).

    Args:
        texts: returns the corpus from its beginning; it is streamed once for each space that has lost something.
        stride: of the windows into which documents are cut, which a recipe does not say.
        passages: how documents are cut, in spaces that have passages.

    Raises:
        DocumentError: a document of the corpus has no key; what was computed before stays, as after any error.
    """

    def repair_space(space: Space) -> Restoration:
        return _Repair(store, space, progress).run(models, texts, stride, passages)

    return StoreRepair(*each_space(store, prefixes, repair_space))


class _Repair:
    def __init__(self, store: Store, space: Space, progress: Progress | None) -> None:
        self._store, self._space, self._progress = store, space, progress

    def run(
        self,
        models: RecordedModels,
        texts: Callable[[], Iterable[Document]] | None,
        stride: int,
        passages: Passages | None,
    ) -> Restoration:
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
            known: dict[str, Any] = {
                "stride": stride,
                "passages": passages,
                "extras": sorted(extras),
                "documents": texts is not None,
            }
            model = models.of(self._space.recipe, **known)
            model.check_canaries(self._space, create=True)
        except (ModelError, UsageError, DataError) as error:
            return Restoration(done.quarantined, done.set_aside, [], sorted(lost), unable=str(error))
        inputs = self._inputs(model, lost, texts)
        # Without its columns an entry would be trained on otherwise than its caller meant.
        bad = sorted(key for key, one in inputs.items() if not _has_its_columns(lost[key], one.length))
        recomputed = self._compute(model, {key: one for key, one in inputs.items() if key not in bad}, lost)
        missing = sorted(lost.keys() - set(recomputed))
        return Restoration(done.quarantined, done.set_aside, recomputed, missing, bad)

    def _inputs(
        self, model: RecordedModel, lost: Mapping[bytes, Lost], texts: Callable[[], Iterable[Document]] | None
    ) -> dict[bytes, Made]:
        if isinstance(model.encoder, MediaEncoder):
            return {} if texts is None else of_media(model.encoder, texts(), lost)
        inputs = of_documents(self._space, model.encoder, proven(model.encoder, lost), lost)
        left = {key: one for key, one in lost.items() if key not in inputs}
        if left and texts is not None:
            documents = texts() if model.cutter is None else passages_in(model.cutter, texts())
            inputs |= of_documents(self._space, model.encoder, documents, left)
            left = {key: one for key, one in lost.items() if key not in inputs}
        inputs |= of_other_spaces(self._store, self._space.recipe, model.encoder, left)
        return {key: one for key, one in inputs.items() if computable(model.lower, one)}

    def _compute(self, model: RecordedModel, inputs: Mapping[bytes, Made], lost: Mapping[bytes, Lost]) -> list[bytes]:
        tell, recomputed = self._tell("compute"), []
        try:
            for extras, keys in _parts(inputs, lost):
                self._put(model, keys, [inputs[key] for key in keys], extras, [lost[key].own for key in keys])
                recomputed += keys
                if tell is not None:
                    tell(len(recomputed), len(inputs))
        finally:
            self._space.flush()
        return recomputed

    def _put(
        self,
        model: RecordedModel,
        keys: list[bytes],
        given: list[Made],
        extras: list[str],
        own: list[Mapping[str, NDArray[Any]] | None],
    ) -> None:
        rows: list[Any] = [None] * len(keys)
        for batch in plan_encoded(given, TOKEN_BUDGET):
            computed = model.lower.run_encoded([given[i] for i in batch])[model.lower.site]
            for i, array in zip(batch, computed, strict=True):
                rows[i] = array
        more: dict[str, Any] = {name: [getattr(one, name) for one in given] for name in extras}
        if own[0] is not None:  # then all of them have their columns
            more["columns"] = {name: [one[name] for one in own if one is not None] for name in own[0]}
        ids = [one.token_ids for one in given if isinstance(one, Encoded)]
        self._space.put(keys, rows, ids or None, **more)

    def _tell(self, what: str) -> StepProgress | None:
        return step_of(self._progress, f"{self._space.recipe.fingerprint[:8]} {what}")


def _has_its_columns(one: Lost, tokens: int) -> bool:
    """Return whether an entry that has so many tokens gets the columns back that it had."""
    return not one.has_own or (one.own is not None and all(len(column) == tokens for column in one.own.values()))


def _kind(one: Lost) -> tuple[list[str], bool]:
    """Return what optional arrays an entry had, and whether it had columns of the caller's own."""
    return sorted(one.extras), one.has_own


def _parts(inputs: Mapping[bytes, Made], lost: Mapping[bytes, Lost]) -> Iterator[tuple[list[str], list[bytes]]]:
    """Yield what is computed and put at once: the optional arrays that these entries had, and their keys."""
    kinds = {key: _kind(lost[key]) for key in inputs}
    lengths = {key: one.length for key, one in inputs.items()}
    keys = sorted(inputs, key=lambda key: (kinds[key], lengths[key]))
    for (extras, _), group in itertools.groupby(keys, key=kinds.__getitem__):
        some = list(group)
        yield from ((extras, some[run]) for run in runs(np.array([lengths[key] for key in some]), _HELD))

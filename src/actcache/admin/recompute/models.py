"""The model that recorded a space, loaded again and known by its recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actcache.errors import CanaryError, ModelError
from actcache.format.keys import Windows
from actcache.format.recipe import COMPUTE_DTYPES, Recipe
from actcache.models.agreement import Agreement
from actcache.models.lower_half import LowerHalf
from actcache.models.partial_vocabulary import vocabulary_size
from actcache.models.pretrained import load_pretrained
from actcache.models.tokenizing import DocumentEncoder, TooLong, tokenizer_digest
from actcache.models.weights import check_same_lower_half
from actcache.store.space import Space


@dataclass(frozen=True)
class RecordedModel:
    """The lower half of a recipe, and how its documents become token ids. Not thread-safe."""

    name: str
    lower: LowerHalf
    encoder: DocumentEncoder

    def check_canaries(self, space: Space, *, create: bool = False) -> None:
        """Compare the space's canaries with what this model computes here.

        Args:
            create: for a space that is about to be added to: they are made where there are none.

        Raises:
            CanaryError: they come out differently.
        """
        agreement = Agreement(space, self.encoder, self.lower)
        try:
            if create:
                agreement.before_adding()
            else:
                agreement.when_opened()
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

    def of(self, recipe: Recipe, *, stride: int = 0, extras: Sequence[str] = ()) -> RecordedModel:
        """Return the model of a recipe.

        Args:
            stride: of the windows into which documents are cut, which a recipe does not say.
            extras: of ``spans``, ``word_ids``, what documents are to be encoded with.

        Raises:
            ModelError: the recipe names no weights (its entries were put without a recycler), the model cannot be
                loaded, or its tokenizer is another one.
            LowerHalfMismatchError: the model's lower half is not the one that was recorded.
            LayerError: the model has too few layers.
        """
        if recipe.weights is None or recipe.tokenizer is None:
            raise ModelError(
                "the recipe holds no digests of weights and tokenizer, for its entries were put without a recycler: "
                "nobody can tell which model computed them"
            )
        name = self._model or recipe.model
        model, tokenizer = self._load(name, recipe)
        family = check_same_lower_half(model, recipe)
        if tokenizer_digest(tokenizer) != recipe.tokenizer:
            raise ModelError(
                f"the tokenizer of {name} is not the one that recorded the space, though the lower half is: give the "
                "model's folder as it was then"
            )
        lower = LowerHalf(model, family, recipe.layer, recipe.compute_dtype)
        too_long: TooLong = "truncate" if recipe.too_long == "truncate" else "refuse"
        if recipe.too_long == "windows" and recipe.max_length is not None:
            too_long = Windows(recipe.max_length, stride)
        encoder = DocumentEncoder(
            tokenizer,
            recipe.max_length,
            too_long,
            recipe.special_tokens,
            vocabulary=vocabulary_size(model),
            extras=extras,
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
                loaded = load_pretrained(name, [recipe.layer], self._device, revision, dtype)
            except ModelError as error:
                hint = "" if self._model is not None else "; say where the model lies on this machine (--model)"
                raise ModelError(f"{error}{hint}") from error
            self._loaded = (what, *loaded)
        return self._loaded[1], self._loaded[2]

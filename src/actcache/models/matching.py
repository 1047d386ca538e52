"""Whether a model's lower half is the one whose activations are stored."""

from __future__ import annotations

from transformers import PreTrainedModel

from actcache.errors import CanaryError, LowerHalfMismatchError
from actcache.format.recipe import Recipe
from actcache.models import canary
from actcache.models.families import Family, base_model_of, family_of
from actcache.models.lower_half import LowerHalf, evaluating
from actcache.models.provenance import setup_of
from actcache.models.tensors import dtype_name
from actcache.models.tokenizing import DocumentEncoder
from actcache.models.weights import lower_digest


def check_same_lower_half(model: PreTrainedModel, recipe: Recipe) -> Family:
    """Return the family of a base or task model that has the recipe's lower half.

    Raises:
        LowerHalfMismatchError: weights or configuration of the lower half are others; it names the fields.
        LayerError, UnsupportedModelError: the model cannot be cut at the recipe's layer.
    """
    base = base_model_of(model)
    family = family_of(base)
    family.check_layer(base, recipe.layer)
    theirs, ours = family.numbers_of(base.config), recipe.config
    different = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    if different:
        fields = "; ".join(f"{name}: {theirs.get(name)!r}, recorded {ours.get(name)!r}" for name in different)
        raise LowerHalfMismatchError(
            f"the lower half of this {type(model).__name__} computes other numbers than the recorded one: its "
            f"configuration differs ({fields}). Record its activations with a recycler of its own"
        )
    if lower_digest(base, family, recipe.layer) != recipe.weights:
        dtype, recorded = dtype_name(base.dtype), recipe.provenance.get("weights_dtype")
        hint = "" if recorded in (None, dtype) else f" (they are {dtype}, load the model with dtype {recorded})"
        raise LowerHalfMismatchError(
            f"the embeddings or layers 1..{recipe.layer} of this {type(model).__name__} have other weights than those "
            f"that were recorded{hint}: they were fine-tuned, adapted, or are another model's. Keep the lower half "
            "frozen, or record its activations with a recycler of its own"
        )
    return family


def check_same_numbers(model: PreTrainedModel, recipe: Recipe, encoder: DocumentEncoder, canaries: bytes) -> None:
    """Run canaries through a model whose lower half has the recipe's weights, and compare what comes out.

    Raises:
        LowerHalfMismatchError: other numbers come out.
    """
    base = base_model_of(model)
    lower = LowerHalf(base, family_of(base), recipe.layer, recipe.compute_dtype)
    try:
        with evaluating(base):
            canary.check(canaries, encoder, lower, setup_of(lower))
    except CanaryError as error:
        raise LowerHalfMismatchError(
            f"the lower half of this {type(model).__name__} has the recorded weights and configuration, but {error}"
        ) from error

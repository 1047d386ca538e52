"""Loading what ``reduced.save_pretrained`` wrote."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from actcache.errors import FormatError, LowerHalfMismatchError, ModelError, UsageError
from actcache.format.recipe import Recipe
from actcache.models.families import Family, base_model_of, family_of, is_registered, way_of
from actcache.models.replay import reduce
from actcache.models.saving import DESCRIPTION_NAME, VERSION, WEIGHTS_NAME
from actcache.models.sites import LAST
from actcache.models.stubs import EmbeddingStub
from actcache.models.tensors import first_parameter, set_parameter
from actcache.models.training.adapters import AdapterSpec, insert_adapters

#: Fields of a recipe that say how rows and documents are stored, not whose they are.
STORED = ("dtype", "compute_dtype", "max_length", "too_long")


def load_reduced(
    folder: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    task_class: type[PreTrainedModel] | None = None,
    allow: Collection[str] = (),
    dtype: torch.dtype | str = "auto",
    **options: Any,
) -> PreTrainedModel:
    """Return a reduced model that ``save_pretrained`` (or the ``Trainer``) wrote, in eval mode, on the CPU.

    Args:
        recipe: of the space that it is to run on; None to compare nothing.
        task_class: the task model's class, where it is not one of transformers.
        allow: of ``dtype``, ``compute_dtype``, ``max_length`` and ``too_long``, fields in which the recipes may differ:
            trained on float32 entries, run on float16.
        dtype: of the weights; ``"auto"`` for the one that each of them, and what is computed anew instead of being
            saved (rotary frequencies), had when it was saved.
        options: of transformers' ``from_config``: ``attn_implementation``.

    Raises:
        LowerHalfMismatchError: it was trained on another lower half, layer, or tokenizer than the recipe's.
        ModelError: the folder holds no reduced model, or its recipe is not known or differs otherwise.
    """
    path = Path(folder)
    if set(allow) - set(STORED):
        raise UsageError(f"recipes may differ in {', '.join(STORED)} at most, not in {', '.join(sorted(allow))}")
    what, theirs = _read(path)
    if recipe is not None:
        check_recipe(theirs, recipe, allow, path)
    kind = task_class or class_named(what["task_class"], path)
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if wanted != "auto" and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise UsageError(f"dtype {dtype!r} is neither a floating point dtype of torch nor 'auto'")
    try:
        state = load_file(path / WEIGHTS_NAME)
        config = kind.config_class.from_dict(what["config"])  # type: ignore[union-attr]
        config.tie_word_embeddings = True  # as it may have been: by ties it is seen which embeddings a decoder has
        # The lower half is about to be dropped, and the rest to be loaded; but a proof has to run it.
        initialized = no_init_weights() if is_registered(config.model_type) else contextlib.nullcontext()
        with torch.random.fork_rng(devices=[]), initialized:
            full = kind._from_config(config, dtype=main_dtype(state) if wanted == "auto" else wanted, **options)
        full.eval().tie_weights()
        way = what.get("way")  # what was proved when it was reduced; these weights prove nothing yet
        family = None if way is None else way_of(family_of(base_model_of(full)), way)
        reduced = reduce(full, what["layer"] if what["layer"] == LAST else int(what["layer"]), family)
        if what["adapters"] is not None:
            insert_adapters(reduced, AdapterSpec.from_json(what["adapters"]))
        for first, *others in what["tied"]:
            for name in others:
                set_parameter(reduced, name, reduced.get_parameter(first))
        if wanted == "auto":
            computed = {name: getattr(torch, dtype) for name, dtype in what.get("buffers", {}).items()}
            _cast_as(reduced, {**computed, **{name: tensor.dtype for name, tensor in state.items()}})
        reduced.load_state_dict(state)
        reduced.eval()
    except (OSError, SafetensorError, RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"{path} cannot be loaded as a reduced {kind.__name__}: {error}") from error
    reduced.__dict__["actcache_recipe"] = theirs
    return reduced


def main_dtype(state: Mapping[str, torch.Tensor]) -> torch.dtype:
    """Return the dtype that most weights have, of those that a model can be made in."""
    makes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    counts = Counter(tensor.dtype for tensor in state.values() if tensor.dtype in makes and tensor.numel())
    return max(makes, key=lambda dtype: counts[dtype])


def _cast_as(reduced: PreTrainedModel, saved: Mapping[str, torch.dtype]) -> None:
    """Give weights and buffers the dtypes that they had when they were saved; what is tied stays tied."""
    for name, tensor in (*reduced.named_parameters(), *reduced.named_buffers()):
        if name in saved:
            tensor.data = tensor.data.to(saved[name])
    # The stub of the embeddings goes with the first layer behind it, whatever dtype the head has.
    if reduced.__dict__["actcache_layer"] == LAST:
        return
    family: Family = reduced.__dict__["actcache_family"]
    like = first_parameter(family.layers_of(base_model_of(reduced))[reduced.__dict__["actcache_layer"]])
    for module in reduced.modules():
        if isinstance(module, EmbeddingStub):
            module.zero = module.zero.to(like.dtype)


def _read(path: Path) -> tuple[dict[str, Any], Recipe | None]:
    """Return what a folder says of its reduced model, and the recipe that it belongs to."""
    try:
        what = json.loads((path / DESCRIPTION_NAME).read_text(encoding="utf-8"))
        version, expected = what["version"], {"task_class", "config", "layer", "recipe", "adapters", "tied"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} holds no reduced model: {DESCRIPTION_NAME} is not there or not one ({error})"
        ) from None
    if version != VERSION:
        raise ModelError(f"{path} was written by a newer release (version {version}): update actcache")
    if not expected <= what.keys():
        raise ModelError(f"{path / DESCRIPTION_NAME} lacks {', '.join(sorted(expected - what.keys()))}")
    try:
        return what, None if what["recipe"] is None else Recipe.from_json(what["recipe"])
    except FormatError as error:
        raise ModelError(f"{path / DESCRIPTION_NAME}: {error}") from None


def check_recipe(
    theirs: Recipe | None, ours: Recipe, allow: Collection[str], path: Path, *, kind: str = "reduced model"
) -> None:
    """Refuse a saved model that was trained on the rows of another recipe, but for the fields in ``allow``."""
    if theirs is None:
        raise ModelError(
            f"the model in {path} was reduced without a recycler, so what it was trained on is not known: if it was "
            "this, load it with actcache.models.load_reduced(folder)"
        )
    differ = {name: pair for name, pair in theirs.differences(ours).items() if name not in allow}
    if not differ:
        return
    fields = "; ".join(f"{name}: {old!r}, here {new!r}" for name, (old, new) in differ.items())
    message = f"the {kind} in {path} was trained on the activations of another recipe ({fields})"
    if set(differ) <= set(STORED):
        raise ModelError(f"{message}: if that is as you want it, pass allow={sorted(differ)}")
    raise LowerHalfMismatchError(f"{message}: use a recycler of the model, layer and tokenizer that it belongs to")


def class_named(name: str, path: Path) -> type[PreTrainedModel]:
    """Return transformers' class of that name; raises ``ModelError`` where there is none."""
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ModelError(f"the task class of {path}, {name!r}, is not one of transformers: pass it as task_class=")
    return found

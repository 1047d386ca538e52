"""What becomes of a reduced model after training: merged into a full model, or saved with the recipe it belongs to.

A saved reduced model is a folder with ``model.safetensors`` (upper layers and head) and ``reduced.json`` (recipe, task
class, configuration, adapters). transformers would load such weights and make up the lower half at random. Two things
keep it from that: there is no ``config.json``, which the auto classes need; and under the name of one of the lower
half's weights there is an empty tensor, which every class refuses, since its shape is another.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from actcache.errors import ModelError
from actcache.models.families import Family, base_model_of, way_in
from actcache.models.sites import LAST
from actcache.models.tensors import dtype_name, set_parameter, unshared
from actcache.models.training.adapters import insert_adapters, spec_of
from actcache.models.weights import check_same_lower_half

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)

WEIGHTS_NAME = "model.safetensors"  # where the Trainer looks for a checkpoint's weights
DESCRIPTION_NAME = "reduced.json"
VERSION = 1
#: Options of ``save_pretrained`` that change nothing here.
IGNORED_OPTIONS = ("safe_serialization", "max_shard_size", "token", "save_original_format")


def save(
    reduced: Any, folder: str | os.PathLike[str], *, state_dict: Mapping[str, torch.Tensor] | None, write: bool
) -> None:
    """Write a reduced model to a folder; see ``ReducedModel.save_pretrained``."""
    recipe = reduced.__dict__.get("actcache_recipe")
    refuse_peft(reduced)
    spec = spec_of(reduced)
    config = json.loads(reduced.config.to_json_string(use_diff=False))
    config["dtype"] = dtype_name(reduced.dtype)  # as it is, not as it was once loaded
    what = {
        "actcache": "a reduced model: load it with actcache.Recycler(...).load_reduced(folder)",
        "version": VERSION,
        "task_class": task_class_of(reduced).__name__,
        "config": {**config, "architectures": [task_class_of(reduced).__name__]},
        "layer": reduced.actcache_layer,
        "way": None if reduced.actcache_family.found is None else way_in(reduced.actcache_family),
        "recipe": None if recipe is None else recipe.to_json(),
        "adapters": None if spec is None else asdict(spec),
        "tied": _tied(reduced),
        "buffers": computed_buffers(reduced),
    }
    if write:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        packed = [name for name, value in reduced.state_dict().items() if not isinstance(value, torch.Tensor)]
        if packed:
            raise ModelError(
                f"{packed[0]} of this reduced model is no plain tensor (a quantized weight?), and safetensors files "
                "hold nothing else: save the model before it is quantized"
            )
        tensors = unshared(reduced.state_dict() if state_dict is None else state_dict)
        tensors[guard_of(reduced)] = torch.empty(0)
        save_file(tensors, path / WEIGHTS_NAME, metadata={"format": "pt"})
        (path / DESCRIPTION_NAME).write_text(json.dumps(what, indent=1), encoding="utf-8")


def merge(reduced: Any, full_model: Model) -> Model:
    """Put a reduced model's upper layers, head and adapters into a full model, in place, and return that.

    Its outputs on a text are then those of the reduced model on the text's stored activations. Where the reduced model
    has trained its own copy of a weight that the full model shares with its embeddings, they are no longer tied.

    Args:
        full_model: of the task class that was reduced, with the recorded lower half. Where the reduced model has
            adapters it gets the same.

    Raises:
        LowerHalfMismatchError: its lower half is another than the recorded one.
        ModelError: classes, layers or shapes differ, or PEFT's modules are in the reduced model. Nothing was changed.
    """
    task_class = task_class_of(reduced)
    refuse_peft(reduced)
    if type(full_model) is not task_class:
        raise ModelError(
            f"a reduced {task_class.__name__} goes into a {task_class.__name__}, not a {type(full_model).__name__}"
        )
    recipe = reduced.__dict__.get("actcache_recipe")
    if recipe is not None:
        check_same_lower_half(full_model, recipe)
    family, layer = reduced.actcache_family, reduced.actcache_layer
    base = base_model_of(full_model)
    lower = {family.stack: family.stack_of(base)} if layer == LAST else family.lower_of(base, layer)
    spec, there = spec_of(reduced), spec_of(full_model)
    if there is not None and there != spec:
        raise ModelError(f"the full model has other adapters ({there}) than the reduced one ({spec})")
    prefix = next(f"{path}." if path else "" for path, module in full_model.named_modules() if module is base)
    state, target = reduced.state_dict(), full_model.state_dict()
    # What the reduced model carries for itself because it lacks the layer that has it (as a relative position bias).
    new = {name for name in state if name not in target and not (spec and there is None and ".adapter." in name)}
    frozen = {name for name, parameter in reduced.named_parameters() if not parameter.requires_grad}
    lacking = {n for n in target if n not in state and not n.startswith(tuple(f"{prefix}{path}." for path in lower))}
    wrong = sorted((new - frozen) | lacking | {n for n in state if n in target and state[n].shape != target[n].shape})
    if wrong:
        raise ModelError(
            f"the reduced model does not fit this {task_class.__name__}: it differs in {', '.join(wrong[:5])}"
            f"{', ...' if len(wrong) > 5 else ''}; give a full model with the same configuration"
        )
    if spec is not None and there is None:
        insert_adapters(full_model, spec)
        target = full_model.state_dict()
    _copy(state, target, full_model, {t.data_ptr() for part in lower.values() for t in part.state_dict().values()})
    return full_model


def task_class_of(reduced: Any) -> type[PreTrainedModel]:
    """Return the class of the task model that was reduced; raises ``ModelError`` where the model is no reduced one."""
    task_class: type[PreTrainedModel] | None = getattr(type(reduced), "actcache_task_class", None)
    if task_class is None:
        raise ModelError(f"a {type(reduced).__name__} is no reduced model: recycler.reduce(task_model) makes one")
    return task_class


@torch.no_grad()
def _copy(
    state: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor], full_model: PreTrainedModel, lower: set[int]
) -> None:
    untied = []
    for name in sorted(state.keys() & target.keys()):
        value = state[name].to(target[name].device, target[name].dtype)
        if target[name].data_ptr() not in lower:
            target[name].copy_(value)
        elif not torch.equal(value, target[name]):
            set_parameter(full_model, name, nn.Parameter(value.detach().clone()))
            untied.append(name)
    if untied:
        # That is one switch for all of a model's ties.
        for first, *others in _tied(full_model):
            for name in others:
                set_parameter(full_model, name, nn.Parameter(full_model.get_parameter(first).detach().clone()))
        full_model.config.tie_word_embeddings = False
        full_model.all_tied_weights_keys = {}
        logger.warning("%s was trained on its own: it is no longer tied to the embeddings", ", ".join(sorted(untied)))


def guard_of(reduced: Any) -> str:
    """Return the name of a matrix in the first layer, which is not the reduced model's; see the module."""
    if reduced.actcache_layer == LAST:
        guard: str = reduced.actcache_guard
        return guard
    family, base = reduced.actcache_family, base_model_of(reduced)
    layers = family.layers_of(base)
    path = next(path for path, module in reduced.named_modules() if module is layers)
    matrix = _matrix_in(layers[reduced.actcache_layer])
    there = reduced.state_dict()
    numbers = [i for i in range(reduced.actcache_layer) if f"{path}.{i}.{matrix}" not in there]
    return f"{path}.{numbers[0]}.{matrix}" if numbers else f"{path}.0.actcache_guard"  # a first layer may be kept


def guard_in(task_model: PreTrainedModel, family: Family) -> str:
    """Return the name of a matrix in the first layer of a full model."""
    first = family.layers_of(base_model_of(task_model))[0]
    path = next(path for path, module in task_model.named_modules() if module is first)
    return f"{path}.{_matrix_in(first)}"


def _matrix_in(layer: nn.Module) -> str:
    """Return the name of a layer's first matrix, or of its first filters where it has none."""
    weights = [(name, weight.ndim) for name, weight in layer.named_parameters()]
    return next(name for dimensions in (2, 3, 4) for name, there in weights if there == dimensions)


def _tied(model: nn.Module) -> list[list[str]]:
    """Return the names of parameters that are one, group by group."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def computed_buffers(reduced: nn.Module) -> dict[str, str]:
    """Return the dtypes of the floating point buffers that no state dict has: ``model.to(dtype)`` rounds them, too."""
    saved = reduced.state_dict()
    return {n: dtype_name(b.dtype) for n, b in reduced.named_buffers() if n not in saved and b.is_floating_point()}


def refuse_peft(reduced: nn.Module) -> None:
    """Raise ``ModelError`` where PEFT's modules are in a model that is to be saved or merged."""
    if any(type(module).__module__.partition(".")[0] == "peft" for module in reduced.modules()):
        raise ModelError(
            "PEFT has put modules into this reduced model: take peft_model.merge_and_unload(), or save what PEFT "
            "trained with peft_model.save_pretrained(folder); PeftModel.from_pretrained(full_model, folder) loads that"
        )

"""Encoder-decoders that start from what their encoder gives: the encoder's rows stand in the place of the encoder.

The decoder and the heads are the task model's own. Generation needs the encoder once, for the prompt, so that a model
whose prompts are stored generates from them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from actcache.errors import LayerError, ModelError, ShapeError
from actcache.format.recipe import Recipe
from actcache.models.families import Family, base_model_of, family_of
from actcache.models.lower_half import LowerHalf
from actcache.models.sites import LAST, site_in
from actcache.models.stubs import InjectedRows
from actcache.models.tensors import first_parameter


class EncoderStub(nn.Module):
    """Stands in the place of an encoder, and gives the rows that were injected.

    Args:
        encoder: what it stands for, for its configuration and the name of its input.
    """

    dtype_like: torch.Tensor

    def __init__(self, encoder: nn.Module, injected: InjectedRows, like: torch.Tensor) -> None:
        super().__init__()
        self.injected = injected
        self.config: Any = getattr(encoder, "config", None)
        self.main_input_name = getattr(encoder, "main_input_name", "input_ids")
        for name, module in encoder.named_children():  # Whisper counts frames by what its convolutions skip
            if hasattr(module, "stride"):
                self.__dict__[name] = SimpleNamespace(stride=module.stride)
        self.register_buffer("dtype_like", torch.zeros((), dtype=like.dtype, device=like.device), persistent=False)

    def forward(self, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        rows = self.injected.get()[0]
        if rows is None:
            raise ModelError("the encoder's rows are stored: call the model with **batch.model_inputs()")
        rows = rows.to(self.dtype_like.dtype)
        return (rows,) if return_dict is False else BaseModelOutput(last_hidden_state=rows)


def is_encoder_decoder(base_model: PreTrainedModel, family: Family) -> bool:
    """Return whether a model's layers are those of an encoder, beside which it has a decoder."""
    return bool(family.stack) and bool(getattr(base_model.config, "is_encoder_decoder", False))


def starts_at(recipe: Recipe, task_model: PreTrainedModel) -> int | str:
    """Return where a model that is reduced to a recipe's rows starts, as ``models.reduce`` takes it.

    Raises:
        LayerError: nothing that replay knows of is left to run there, or the model has no such layer.
    """
    base = base_model_of(task_model)
    family = family_of(base)
    count = len(family.layers_of(base))
    if recipe.layer is not None and 1 <= recipe.layer < count:
        return recipe.layer
    last = LowerHalf(base, family, LAST).site if is_encoder_decoder(base, family) else None
    if last is not None and site_in(base, family, recipe) == last:
        return LAST
    instead = f"one of the layers 1..{count - 1}" + (
        "" if last is None else ', or layer="last" (what the encoder gives)'
    )
    raise LayerError(
        f"rows of {recipe.site_name} are for reading (recycler.reader(texts)): a reduced {type(task_model).__name__} "
        f"starts after {instead}. Record that"
    )


def encoder_stub(task_model: PreTrainedModel, family: Family, injected: InjectedRows) -> dict[int, Any]:
    """Return what stands for the encoder of a task model, by the encoder's id; ``LayerError`` where it has none."""
    base = base_model_of(task_model)
    if not is_encoder_decoder(base, family):
        raise LayerError(
            f"{type(task_model).__name__} is no encoder-decoder, so rows that are taken after its last layer are for "
            "reading: a reduced model starts after one of the layers 1..N-1"
        )
    encoder = family.stack_of(base)
    inside = {id(parameter) for parameter in encoder.parameters()}
    others = (one for one in task_model.parameters() if id(one) not in inside and one.is_floating_point())
    return {id(encoder): EncoderStub(encoder, injected, next(others, first_parameter(encoder)))}


def replay(
    reduced: Any, forward: Callable[..., Any], activations: Any, token_ids: Any, attention_mask: Any, options: Any
) -> Any:
    """Call a task model's forward with stored rows in the place of what its encoder gives."""
    given = _given(reduced, activations, token_ids, attention_mask)
    injected: InjectedRows = reduced.actcache_injected
    before = injected.put(activations, attention_mask)
    try:
        if not _reads_text(reduced):
            return forward(encoder_outputs=_encoder(reduced)(), **options)
        return forward(**given, **options)
    finally:
        injected.put(*before)


def generate(reduced: Any, activations: Any, token_ids: Any, attention_mask: Any, options: dict[str, Any]) -> Any:
    """Generate as the full model does, from stored rows of the prompts; see ``ReducedModel.generate``."""
    if not is_encoder_decoder(base_model_of(reduced), reduced.actcache_family):
        raise ModelError(
            "a reduced decoder cannot generate: each new token attends to the keys and values that the lower layers "
            "made of the tokens before it, and those are not stored. Put the weights back, "
            "reduced.merge_into(full_model), and generate with the full model"
        )
    given = _given(reduced, activations, token_ids, attention_mask)
    injected: InjectedRows = reduced.actcache_injected
    before = injected.put(activations, attention_mask)
    try:
        with torch.no_grad():
            encoded = _encoder(reduced)(**given)
    finally:
        injected.put(*before)
    task_class = reduced.actcache_task_class
    # The same modules under the task model's own class, whose methods call its forward.
    plain = task_class.__new__(task_class)
    plain.__dict__ = reduced.__dict__
    mask = {"attention_mask": attention_mask} if _reads_text(reduced) and attention_mask is not None else {}
    return plain.generate(encoder_outputs=encoded, **mask, **options)


def _encoder(reduced: Any) -> nn.Module:
    family: Family = reduced.actcache_family
    return family.stack_of(base_model_of(reduced))


def _reads_text(reduced: Any) -> bool:
    return bool(reduced.actcache_task_class.main_input_name == "input_ids")


def _given(reduced: Any, activations: Any, token_ids: Any, attention_mask: Any) -> dict[str, Any]:
    """Return what an encoder is called with; raises where the rows are none, or not these tokens'."""
    if not isinstance(activations, torch.Tensor):
        raise ModelError("a reduced model needs activations: call it with **batch.model_inputs() of a reader's batch")
    if activations.ndim != 3 or not activations.is_floating_point():
        raise ShapeError(f"activations are [batch, tokens, width], not {list(activations.shape)} {activations.dtype}")
    if not _reads_text(reduced):
        return {}
    given = {"input_ids": token_ids, "attention_mask": attention_mask}
    for name, value in given.items():
        if value is not None and value.shape != activations.shape[:2]:
            raise ShapeError(f"{name} {list(value.shape)} do not belong to activations {list(activations.shape)}")
    if token_ids is None:
        raise ModelError("a reduced model needs token_ids: call it with **batch.model_inputs() of a reader's batch")
    return {name: value for name, value in given.items() if value is not None}

"""Replay: a task model without its lower half, which starts at layer k+1 from stored rows.

The reduced model keeps the task model's own code: its class is a subclass of the task class, the embeddings are a stub
and the first k layers pass through, the last of them handing over the stored rows. Layer indices stay what they were.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import threading
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from actcache.errors import ModelError, ShapeError, UnsupportedModelError
from actcache.models.family import Family, base_model_of, family_of

logger = logging.getLogger(__name__)

#: Inputs of a task model that only its embeddings read, or that replay does not support.
_DROPPED = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "inputs_embeds",
    "past_key_values",
    "use_cache",
)
_CAPTURED = ("hidden_states", "attentions", "cross_attentions")


def reduce(task_model: PreTrainedModel, layer: int, family: Family | None = None) -> PreTrainedModel:
    """Return a copy of a task model that starts at layer ``layer + 1`` from stored rows. The task model is untouched.

    The copy has the task model's own outputs. Its ``forward`` takes ``activations`` [batch, tokens, hidden] in any
    floating point dtype, ``token_ids`` and ``attention_mask`` [batch, tokens], padded on the right, and by name what
    else the task model takes (``labels``, ...). Its ``state_dict`` holds the upper layers and the head, under the task
    model's names. Hidden states and attentions of the lower half are None in its outputs. Gradient checkpointing must
    be the non-reentrant kind.

    A head that is tied to the word embeddings gets its own copy of the matrix, which training then changes on its own.

    Args:
        layer: the rows are the output of this layer, 1-based.
        family: how to split the model; None to look it up.

    Raises:
        LayerError: ``layer`` is not in 1..N-1.
        UnsupportedModelError: the model's family is not known, or it is a decoder.
    """
    base = base_model_of(task_model)
    family = family or family_of(base)
    family.check_layer(base, layer)
    if isinstance(task_model, _Reduced):
        raise ModelError("the model is a reduced one already; reduce the task model")
    if getattr(base.config, "is_decoder", False):
        raise UnsupportedModelError(
            f"{type(task_model).__name__} is configured as a decoder, whose key-value cache replay does not support; "
            "load it with is_decoder=False"
        )
    layers = family.layers_of(base)
    like = next(parameter for parameter in layers[layer].parameters() if parameter.is_floating_point())
    # deepcopy takes what it finds in the memo for done: the lower half is neither copied nor touched.
    memo: dict[int, Any] = {
        id(module): _Embeddings(base.config.hidden_size, like) for module in family.embeddings_of(base).values()
    }
    memo |= {id(layers[i]): _PassThrough(family.tuple_arity) for i in range(layer)}
    reduced = copy.deepcopy(task_model, memo)
    task_class: Any = type(task_model)
    reduced.__class__ = _reduced_class(task_class)
    reduced.__dict__["actcache_family"], reduced.__dict__["actcache_layer"] = family, layer
    base_model_of(reduced).register_forward_hook(functools.partial(_mark_absent, layer=layer))
    _untie(task_model, reduced, family.lower_of(base, layer))
    return reduced


class _Embeddings(nn.Module):
    """Stands where the embeddings stood and has no weights: returns zeros ``[batch, tokens, hidden]``."""

    zero: torch.Tensor

    def __init__(self, hidden_size: int, like: torch.Tensor) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.register_buffer("zero", torch.zeros((), dtype=like.dtype, device=like.device), persistent=False)

    def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.ndim != 2:
            raise ShapeError(f"token_ids do not fit the model, which takes [batch, tokens]: {list(input_ids.shape)}")
        return self.zero.expand(*input_ids.shape, self.hidden_size)

    @property
    def word_embeddings(self) -> nn.Module:
        # where get_input_embeddings() looks
        return self


class _Handed(threading.local):
    """The rows of the forward that is running in this thread, and the pass-through that takes them.

    Not the module's state, which threads that use one model at once would share: one would get the other's rows.
    """

    def __init__(self) -> None:  # in each thread
        self.rows: torch.Tensor | None = None
        self.to: nn.Module | None = None


_handed = _Handed()


class _PassThrough(nn.Module):
    """Stands where a layer of the lower half stood: returns its input, or the rows that were put in."""

    def __init__(self, tuple_arity: int | None) -> None:
        super().__init__()
        self.tuple_arity = tuple_arity

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        rows = _handed.rows
        if rows is not None and _handed.to is self:
            if rows.shape != hidden.shape:
                raise ShapeError(
                    f"activations {list(rows.shape)} do not fit the model, which expects {list(hidden.shape)}"
                )
            hidden = rows.to(hidden.dtype)
        return hidden if self.tuple_arity is None else (hidden, *[None] * (self.tuple_arity - 1))


class _Reduced:
    """What a reduced model adds to its task class. As thread-safe as the task class's own forward."""

    main_input_name = "token_ids"

    def _replay(self, forward: Any, activations: Any, token_ids: Any, attention_mask: Any, kwargs: Any) -> Any:
        layers = self.actcache_family.layers_of(base_model_of(self))  # type: ignore[attr-defined,arg-type]
        hidden_size = self.config.hidden_size  # type: ignore[attr-defined]
        _check_inputs(activations, token_ids, attention_mask, hidden_size)
        _check_options(self, layers, kwargs)
        last = layers[self.actcache_layer - 1]  # type: ignore[attr-defined]
        # A multiple choice model flattens [batch, choices, tokens] to [batch * choices, tokens] before its base model.
        before = _handed.rows, _handed.to
        _handed.rows, _handed.to = activations.flatten(0, -3), last
        try:
            return forward(input_ids=token_ids, attention_mask=attention_mask, **kwargs)
        finally:
            _handed.rows, _handed.to = before

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class has no importable name
        return _new_reduced, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _reduced_class(task_class: Any) -> Any:  # a class of models, and a subclass of it
    def forward(
        self: Any, activations: Any = None, token_ids: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        original = functools.partial(task_class.forward, self)
        return self._replay(original, activations, token_ids, attention_mask, kwargs)

    own = inspect.signature(task_class.forward).parameters
    first = ("activations", "token_ids", "attention_mask")
    either, named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("self", either)]
    parameters += [inspect.Parameter(name, either, default=None) for name in first]
    for name, parameter in own.items():
        if name != "self" and name not in _DROPPED:
            keep = parameter.kind is inspect.Parameter.VAR_KEYWORD
            parameters.append(parameter if keep else parameter.replace(kind=named))
    # The Trainer drops the columns of a data set that the signature does not name.
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    forward.__doc__ = f"{task_class.__name__}'s forward, from stored activations."
    reduced = type(f"Reduced{task_class.__name__}", (_Reduced, task_class), {"forward": forward})
    # transformers finds what a base model can record (output_hidden_states) by its class's qualified name
    reduced.__module__, reduced.__qualname__ = task_class.__module__, task_class.__qualname__
    return reduced


def _new_reduced(task_class: Any) -> PreTrainedModel:
    cls = _reduced_class(task_class)
    reduced: PreTrainedModel = cls.__new__(cls)
    return reduced


def _check_inputs(activations: Any, token_ids: Any, attention_mask: Any, hidden_size: int) -> None:
    if activations is None or token_ids is None:
        missing = "activations" if activations is None else "token_ids"
        raise ModelError(
            f"a reduced model needs {missing}: call it with **batch.model_inputs() of a reader's batch (and not with "
            "input_ids, which its lower half would read)"
        )
    if not isinstance(activations, torch.Tensor) or not isinstance(token_ids, torch.Tensor):
        raise ShapeError("activations and token_ids must be torch tensors: give the reader a device")
    if activations.ndim < 3 or activations.shape[-1] != hidden_size:
        raise ShapeError(
            f"activations are [batch, tokens, {hidden_size}] for this model, not {list(activations.shape)}"
        )
    if not activations.is_floating_point():
        raise ShapeError(f"activations are {activations.dtype}, no floating point: decode them first")
    for name, value in (("token_ids", token_ids), ("attention_mask", attention_mask)):
        if value is not None and value.shape != activations.shape[:-1]:
            raise ShapeError(
                f"{name} {list(value.shape)} do not belong to activations {list(activations.shape)}: they are "
                f"{list(activations.shape[:-1])}"
            )


def _check_options(model: Any, layers: nn.ModuleList, kwargs: dict[str, Any]) -> None:
    unusable = [name for name in _DROPPED if kwargs.get(name) is not None and kwargs[name] is not False]
    if unusable:
        raise ModelError(f"a reduced model starts from activations and takes no {', '.join(unusable)}")
    selected = kwargs.get("output_hidden_states", model.config.output_hidden_states)
    if not (selected is None or isinstance(selected, bool)):
        raise ModelError("a reduced model cannot select hidden states by number; pass output_hidden_states=True")
    if model.training and any(_reentrant(layer) for layer in layers):
        raise ModelError(
            "reentrant gradient checkpointing gives a reduced model's layers no gradients: enable it with "
            'activation_checkpointing_kwargs={"use_reentrant": False}'
        )


def _reentrant(layer: nn.Module) -> bool:
    if not getattr(layer, "gradient_checkpointing", False):
        return False
    function = layer._gradient_checkpointing_func
    return isinstance(function, functools.partial) and function.keywords.get("use_reentrant") is not False


def _mark_absent(module: nn.Module, args: Any, output: Any, *, layer: int) -> Any:
    # Keep hidden_states[i] the output of layer i; those of the lower half are not known.
    absent = (None,) * layer
    if isinstance(output, tuple):
        return tuple(absent + item if isinstance(item, tuple) else item for item in output)
    for name in _CAPTURED:
        if output.get(name):
            output[name] = absent + output[name]
    return output


def _untie(task_model: PreTrainedModel, reduced: PreTrainedModel, lower: dict[str, nn.Module]) -> None:
    lower_modules = {id(module) for part in lower.values() for module in part.modules()}
    lower_parameters = {id(parameter) for part in lower.values() for parameter in part.parameters()}
    shared = [
        f"{path}.{name}"
        for path, module in task_model.named_modules()
        if id(module) not in lower_modules
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in lower_parameters
    ]
    # Nothing may tie a weight to the stub, now or where the copy is saved and loaded.
    reduced.config.tie_word_embeddings = False
    reduced.all_tied_weights_keys = {}
    if shared:
        logger.warning(
            "%s shares %s with its lower half, whose activations are stored: the reduced model has its own copy, which "
            "training changes without changing the embeddings",
            type(task_model).__name__,
            ", ".join(shared),
        )

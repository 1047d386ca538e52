"""Replay: a task model without its lower half, which starts at layer k+1 from stored rows.

The reduced model keeps the task model's own code: its class is a subclass of the task class, the embeddings are a stub
and the first k layers pass through, the last of them handing over the stored rows. Layer indices stay what they were.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from actcache.errors import ModelError, ShapeError, UnsupportedModelError, UsageError
from actcache.models import after_encoder, proof, saving
from actcache.models.after_encoder import encoder_stub
from actcache.models.answers import as_positions, takes_answers
from actcache.models.discovery import main_input_of
from actcache.models.families import Family, base_model_of, family_of
from actcache.models.feature_stubs import FeatureReplay, check_lengths, feature_stubs
from actcache.models.processing import FEATURE_NAMES, takes_features
from actcache.models.sites import LAST
from actcache.models.stubs import (
    BiasPassThrough,
    ConvolutionStub,
    EmbeddingStub,
    FirstLayerRuns,
    InjectedRows,
    NoAnswersAtPadding,
    PassThrough,
)
from actcache.models.tensors import first_parameter

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
    "encoder_outputs",
)


def reduce(task_model: PreTrainedModel, layer: int | str, family: Family | None = None) -> PreTrainedModel:
    """Return a copy of a task model that starts at layer ``layer + 1`` from stored rows. The task model is untouched.

    The copy has the task model's own outputs. Its ``forward`` takes ``activations`` [batch, tokens, hidden] in any
    floating point dtype, ``token_ids`` and ``attention_mask`` [batch, tokens], padded on either side, and by name what
    else the task model takes (``labels``, ...). Its ``state_dict`` holds the upper layers and the head, under the task
    model's names. A question answering model takes ``labels`` [batch, 2], too, an answer's first and last token.

    In its outputs, ``hidden_states[i]`` is layer i's and ``attentions[i]`` layer i + 1's, as in the full model's; those
    of the lower half are not known, and are empty: ``[batch, 0, hidden]`` and ``[batch, heads, 0, 0]``. There is no
    key-value cache, and answers never begin or end at padding. Gradient checkpointing must be the non-reentrant kind.

    What both halves share is told of in one warning: a head that is tied to the word embeddings gets its own copy of
    the matrix, which training then changes on its own; relative position biases and tables that layers of both halves
    use are there, but frozen.

    Args:
        layer: the rows are the output of this layer, 1..N-1; or ``"last"``, of an encoder-decoder: they are what the
            encoder gives.

    Raises:
        LayerError: ``layer`` is none of these: rows that are taken elsewhere are for reading.
        UnsupportedModelError: the model's family is not known, or it is a BERT-like model configured as a decoder.
    """
    base = base_model_of(task_model)
    family = family or family_of(base)
    if isinstance(layer, str) and layer == LAST:
        return _copied(task_model, family, LAST, {})
    layer = family.check_layer(base, layer)
    if not family.proved:
        family = proof.of_replay(task_model, family, layer, _shared_copy)
    reduced = _copied(task_model, family, layer, {})
    lower = family.lower_of(base, layer)
    if absent := [name for name in family.withheld if name not in ("hidden_states", "attentions")]:
        what = f"{', '.join(absent)} of a {type(task_model).__name__}"
        logger.warning("%s are of the lower half: the reduced model does not give them", what)
    notes = _untie(task_model, reduced, lower) + _freeze_shared(reduced, family)
    if notes:
        logger.warning("both halves of %s use %s", type(task_model).__name__, "; ".join(notes))
    return reduced


def _shared_copy(task_model: PreTrainedModel, family: Family, layer: int) -> PreTrainedModel:
    """Return a reduced model that has no weights of its own: it uses the task model's. For proofs."""
    tensors = itertools.chain(task_model.parameters(), task_model.buffers())
    return _copied(task_model, family, layer, {id(tensor): tensor for tensor in tensors})


def _copied(task_model: PreTrainedModel, family: Family, layer: int | str, memo: dict[int, Any]) -> PreTrainedModel:
    base = base_model_of(task_model)
    if isinstance(task_model, ReducedModel):
        raise ModelError("the model is a reduced one already; reduce the task model")
    if family.found is None and getattr(base.config, "is_decoder", False):
        raise UnsupportedModelError(
            f"{type(task_model).__name__} is configured as a decoder, whose key-value cache replay does not support; "
            "load it with is_decoder=False"
        )
    _check_whole(task_model)
    # deepcopy takes what it finds in the memo for done: the lower half is neither copied nor touched.
    injected = InjectedRows()
    features = None
    if isinstance(layer, str):
        stubs = encoder_stub(task_model, family, injected)
    else:
        stubs, features = _stubs_of(task_model, base, family, layer, injected)
    reduced = copy.deepcopy(task_model, {**memo, **stubs})
    task_class: Any = type(task_model)
    reduced.__class__ = _reduced_class(task_class)
    reduced.__dict__["actcache_family"], reduced.__dict__["actcache_layer"] = family, layer
    reduced.__dict__["actcache_injected"], reduced.__dict__["actcache_features"] = injected, features
    for module in reduced.modules():
        if isinstance(module, PreTrainedModel):
            module.config.use_cache = False  # it would hold nothing of the lower half
    if isinstance(layer, str):
        reduced.__dict__["actcache_guard"] = saving.guard_in(task_model, family)
        return reduced
    inner = base_model_of(reduced)
    _keep_all_layers(inner, family)
    if family.first_layer_runs:
        first = family.layers_of(inner)[0]
        first.register_forward_hook(
            FirstLayerRuns(injected, injected if layer == 1 else None, family.layout), prepend=True
        )
    stack = family.stack_of(inner)
    runner = stack if family.found is None else inner.get_submodule(family.found.runner)
    # Its own code does, over all layers.
    collects = not any(getattr(type(one), "_can_record_outputs", None) for one in (stack, runner))
    stack.register_forward_hook(functools.partial(_mark_absent, layer=layer, all_layers=collects))
    if any(cls.__name__.endswith("ForQuestionAnswering") for cls in task_class.__mro__):
        head: Any = getattr(reduced, "qa_outputs", None) or getattr(reduced, "classifier", None)
        if isinstance(head, nn.Module):
            head.register_forward_hook(NoAnswersAtPadding(injected))
    return reduced


def _check_whole(task_model: PreTrainedModel) -> None:
    """Refuse a model whose modules were given other forwards: a copy of it would run the model's own."""
    name = type(task_model).__name__
    if any(hasattr(module, "_hf_hook") for module in task_model.modules()):
        raise ModelError(
            f"this {name} is spread over devices, or a disk, by accelerate (device_map), whose hooks stand in its "
            "modules' forwards: load the task model on one device to reduce it (recording takes it as it is)"
        )
    if "forward" in vars(task_model):
        raise ModelError(
            f"the forward of this {name} was replaced on the model itself, and a reduced model has its class's: take "
            "that back (del model.forward), and compile or wrap the reduced model"
        )


def _keep_all_layers(base: PreTrainedModel, family: Family) -> None:
    """Have training skip none of the layers: among them is the one that puts the rows in (wav2vec2 skips one in ten).

    What training masks of features before the first layer (SpecAugment) has no features here.
    """
    if getattr(base.config, "apply_spec_augment", False):
        base.config.apply_spec_augment = False
    of_layers = base.get_submodule(family.layers.rpartition(".")[0])
    owners = [of_layers, *([config] if (config := getattr(of_layers, "config", None)) is not None else [])]
    for owner in owners:
        for name in [name for name in vars(owner) if name.endswith("layerdrop") and not name.startswith("decoder")]:
            if getattr(owner, name):
                logger.info("%s=%s is 0 in the reduced model: no layer is skipped", name, getattr(owner, name))
                setattr(owner, name, 0.0)


def _stubs_of(
    task_model: PreTrainedModel, base: PreTrainedModel, family: Family, layer: int, injected: InjectedRows
) -> tuple[dict[int, Any], FeatureReplay | None]:
    """Return what stands for each part of the lower half, by the part's id; and how a model that takes no text runs."""
    layers = family.layers_of(base)
    like = first_parameter(layers[layer])
    matrix = None
    if any(hasattr(task_model, name) for name in family.matrix_readers):
        words = base.get_input_embeddings()
        path = next(path for path, module in base.named_modules() if module is words)
        matrix = path.rpartition(".")[2], copy.deepcopy(words).requires_grad_(False)
    width = family.width_of(base)
    stubs: dict[int, Any] = {}
    features = None
    if takes_features(base):
        stubs, features = feature_stubs(base, family, layer, like, injected)
    else:
        stubs = {id(module): EmbeddingStub(width, like, matrix) for module in family.embeddings_of(base).values()}
        stubs |= {id(module): EmbeddingStub(width, like) for module in family.alias_of(base).values()}
    layout = family.layout if features is None else replace(family.layout, grid=features.grid)
    stubs |= {id(module): ConvolutionStub() for module in family.convolution_of(base).values()}
    for i in range(1 if family.first_layer_runs else 0, layer):
        takes = injected if i == layer - 1 else None
        stubs[id(layers[i])] = (
            PassThrough(layers[i], family.tuple_arity, takes, layout, injected if family.first_layer_runs else None)
            if family.relative_bias is None
            else BiasPassThrough(layers[i], family.tuple_arity or 2, takes, family.relative_bias if i == 0 else None)
        )
    return stubs, features


class ReducedModel:
    """What a reduced model adds to its task class: replay, saving, merging. As thread-safe as that class's forward."""

    main_input_name = "token_ids"

    def _replay(self: Any, forward: Any, activations: Any, token_ids: Any, attention_mask: Any, kwargs: Any) -> Any:
        if self.actcache_layer == LAST:
            return after_encoder.replay(self, forward, activations, token_ids, attention_mask, kwargs)
        injected: InjectedRows = self.actcache_injected
        family: Family = self.actcache_family
        features: FeatureReplay | None = self.actcache_features
        if features is not None:
            token_ids = activations
        check_inputs(activations, token_ids, attention_mask, family.width_of(base_model_of(self)), features is None)
        _check_options(self, kwargs)
        if features is not None:
            check_lengths(activations, attention_mask, features)
            kwargs |= features.inputs(activations)
            attention_mask = None  # all are of one length
        _check_padding(self, family, attention_mask)
        if attention_mask is not None:
            padding = getattr(self.config, "pad_token_id", None)
            if padding is not None:  # heads of decoders look for the last token that is another
                token_ids = token_ids.masked_fill(attention_mask == 0, padding)
            if family.positions_in_layers and (
                family.found is None or _takes_positions(self.actcache_task_class)
            ):  # each document's own, wherever its padding is
                kwargs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
        # A multiple choice model flattens [batch, choices, tokens] to [batch * choices, tokens] before its base model.
        before = injected.put(activations.flatten(0, -3), attention_mask)
        if features is None:
            kwargs |= {"input_ids": token_ids, "attention_mask": attention_mask}
        try:
            output = forward(**kwargs)
        finally:
            injected.put(*before)
        output = _without(output, family.withheld, self.actcache_task_class)
        if kwargs.get("labels") is not None and "loss" in getattr(output, "__dataclass_fields__", ()):
            _check_loss(output.loss, self.actcache_task_class)
        return output

    def merge_into(self, full_model: saving.Model) -> saving.Model:
        """Put the trained upper layers, head and adapters into a full model; see ``merge``."""
        return saving.merge(self, full_model)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Save upper layers, head and adapters with their recipe; ``recycler.load_reduced`` loads them.

        The ``Trainer`` saves its checkpoints by this, and goes on from them.

        Args:
            is_main_process: whether this process writes.
            state_dict: the weights, where they are not to be taken from the model.
            options: transformers' others. There is one file of weights, whatever its size.

        Raises:
            ModelError: PEFT's modules are in the model.
            UsageError: an option asks for what this does not do.
        """
        asked = [name for name, value in options.items() if value and name not in saving.IGNORED_OPTIONS]
        if asked:
            raise UsageError(f"a reduced model is saved without {', '.join(asked)}: leave it out")
        saving.save(self, save_directory, state_dict=state_dict, write=is_main_process)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Load weights as any module does; what ``save_pretrained`` wrote to keep others from it is left out."""
        guard = saving.guard_of(self)
        own = {name: value for name, value in state_dict.items() if name != guard}
        return super().load_state_dict(own, *args, **options)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> NoReturn:
        """Refuse: a reduced model is loaded by the recycler that it belongs to."""
        raise ModelError("a reduced model is loaded with recycler.load_reduced(folder), which compares the recipes")

    def push_to_hub(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse: a reduced model is no repository of the hub."""
        raise ModelError("push the full model instead: reduced.merge_into(full_model).push_to_hub(...)")

    def generate(
        self, activations: Any = None, token_ids: Any = None, attention_mask: Any = None, **options: Any
    ) -> Any:
        """Generate from prompts that are stored, of an encoder-decoder, as the full model does from their tokens.

        Args:
            activations, token_ids, attention_mask: of the prompts, as of ``forward``.
            options: transformers' own.

        Raises:
            ModelError: it is a decoder alone, whose new tokens need what the lower layers made of those before.
        """
        return after_encoder.generate(self, activations, token_ids, attention_mask, options)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # the class has no importable name
        return _new_reduced, (self.actcache_task_class,), self.__dict__


@functools.cache
def _reduced_class(task_class: Any) -> Any:  # a class of models, and a subclass of it
    forward = forward_from_rows(task_class, "_replay", _DROPPED, "from stored activations")
    reduced = type(
        f"Reduced{task_class.__name__}",
        (ReducedModel, task_class),
        {
            "forward": forward,
            "actcache_task_class": task_class,
            "main_input_name": "activations" if main_input_of(task_class) in FEATURE_NAMES else "token_ids",
        },
    )
    # transformers finds what a base model can record (output_hidden_states) by its class's qualified name
    reduced.__module__, reduced.__qualname__ = task_class.__module__, task_class.__qualname__
    return reduced


def forward_from_rows(task_class: Any, method: str, dropped: Collection[str], how: str) -> Any:
    """Return a task class's forward that takes stored rows: it hands the class's own one, and its inputs, to a method.

    Args:
        method: of the model, called with the original forward, activations, token ids, attention mask and the others.
        dropped: arguments of the original that the signature does not have.
        how: says in the docstring where the numbers come from.
    """

    def forward(
        self: Any, activations: Any = None, token_ids: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        original = functools.partial(task_class.forward, self)
        if answers:
            kwargs = as_positions(kwargs, task_class)
        return getattr(self, method)(original, activations, token_ids, attention_mask, kwargs)

    answers = takes_answers(task_class)
    forward.__signature__ = signature_from_rows(task_class, dropped)  # type: ignore[attr-defined]
    forward.__doc__ = f"{task_class.__name__}'s forward, {how}."
    return forward


def signature_from_rows(task_class: Any, dropped: Collection[str]) -> inspect.Signature:
    """Return the signature of a task class's forward that takes stored rows, without the ``dropped`` parameters.

    It names everything: the ``Trainer`` drops the columns of a data set that the signature does not name.
    """
    own = inspect.signature(task_class.forward).parameters
    either, named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("self", either)]
    parameters += [inspect.Parameter(n, either, default=None) for n in ("activations", "token_ids", "attention_mask")]
    kept = (parameter for name, parameter in own.items() if name not in ("self", *dropped))
    parameters += [one if one.kind is inspect.Parameter.VAR_KEYWORD else one.replace(kind=named) for one in kept]
    return inspect.Signature(parameters)


def _new_reduced(task_class: Any) -> PreTrainedModel:
    cls = _reduced_class(task_class)
    reduced: PreTrainedModel = cls.__new__(cls)
    return reduced


@functools.cache
def _takes_positions(task_class: Any) -> bool:
    return "position_ids" in inspect.signature(task_class.forward).parameters


def _check_padding(model: Any, family: Family, attention_mask: Any) -> None:
    """Refuse the padding that was proved to change a model's numbers."""
    if attention_mask is None or not (family.equal_lengths or family.right_padding):
        return
    name = model.actcache_task_class.__name__
    if family.equal_lengths and not bool(attention_mask.bool().all()):
        raise ShapeError(
            f"padding changes the numbers of a {name}: give it batches of documents of one length "
            "(recycler.reader(texts, batch_size=1), or your own batches of equal lengths)"
        )
    if family.right_padding and not bool(attention_mask[..., 0].bool().all()):
        raise ShapeError(f"padding on the left changes the numbers of a {name}: pad on the right, as readers do")


def check_inputs(activations: Any, token_ids: Any, attention_mask: Any, hidden_size: int, text: bool = True) -> None:
    """Refuse rows that are none, or of another width, and ids or a mask of other tokens."""
    if activations is None or token_ids is None:
        missing = "activations" if activations is None else "token_ids"
        raise ModelError(
            f"a model of stored rows needs {missing}: call it with **batch.model_inputs() of a reader's batch (and not "
            "with input_ids or pixel_values, which its lower half would read)"
        )
    if not isinstance(activations, torch.Tensor) or not isinstance(token_ids, torch.Tensor | None):
        raise ShapeError("activations and token_ids must be torch tensors: give the reader a device")
    if activations.ndim < 3 or activations.shape[-1] != hidden_size:
        raise ShapeError(
            f"activations are [batch, tokens, {hidden_size}] for this model, not {list(activations.shape)}"
        )
    if not activations.is_floating_point():
        raise ShapeError(f"activations are {activations.dtype}, no floating point: decode them first")
    for name, value in (("token_ids", token_ids), ("attention_mask", attention_mask)) if text else ():
        if value is not None and value.shape != activations.shape[:-1]:
            raise ShapeError(
                f"{name} {list(value.shape)} do not belong to activations {list(activations.shape)}: they are "
                f"{list(activations.shape[:-1])}"
            )


def _check_options(model: Any, kwargs: dict[str, Any]) -> None:
    unusable = [name for name in _DROPPED if kwargs.get(name) is not None and kwargs[name] is not False]
    if unusable:
        raise ModelError(f"a reduced model starts from activations and takes no {', '.join(unusable)}")
    for name in ("hidden_states", "attentions"):
        option = f"output_{name}"
        if name in model.actcache_family.withheld and kwargs.get(option, getattr(model.config, option, False)):
            raise ModelError(
                f"a reduced {model.actcache_task_class.__name__} has no {name}: they are of stages that it does not "
                f"run. Leave {option}=True out"
            )
    selected = kwargs.get("output_hidden_states", model.config.output_hidden_states)
    if not isinstance(selected, bool | None):
        raise ModelError("a reduced model cannot select hidden states by number; pass output_hidden_states=True")
    if model.training and any(_reentrant(module) for module in model.modules()):
        raise ModelError(
            "reentrant gradient checkpointing gives a reduced model's layers no gradients: enable it with "
            'activation_checkpointing_kwargs={"use_reentrant": False}'
        )


def _without(output: Any, withheld: tuple[str, ...], task_class: Any) -> Any:
    """Return what a reduced model gives without the outputs that are the lower half's."""
    if not withheld:
        return output
    if not hasattr(output, "items"):
        raise ModelError(
            f"a reduced {task_class.__name__} has no {' and '.join(withheld)}, so that its outputs have other places "
            "than the full model's: leave return_dict=False out, and take them by their names"
        )
    return type(output)(**{name: value for name, value in output.items() if name not in withheld})


def _check_loss(loss: Any, task_class: Any) -> None:
    """Refuse labels that a head did nothing with: training would go on without them."""
    names = [name for name in inspect.signature(task_class.forward).parameters if "label" in name]
    if loss is None and names:
        raise ModelError(
            f"a {task_class.__name__} computes no loss of labels alone: it takes {' and '.join(names)} together, so "
            "add the others to batch.model_inputs()"
        )


def _reentrant(layer: nn.Module) -> bool:
    if not getattr(layer, "gradient_checkpointing", False):
        return False
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return isinstance(function, functools.partial) and function.keywords.get("use_reentrant") is not False


def _mark_absent(module: nn.Module, args: Any, output: Any, *, layer: int, all_layers: bool) -> Any:
    """Keep hidden_states[i] the output of layer i; those of the lower half are not known: tensors of no tokens."""

    def marked(item: tuple[Any, ...]) -> tuple[Any, ...]:
        known = item[layer:] if all_layers else item
        like = next((one for one in known if isinstance(one, torch.Tensor)), None)
        return (None if like is None else _of_no_tokens(like),) * layer + known

    if isinstance(output, tuple):
        return tuple(marked(item) if isinstance(item, tuple) else item for item in output)
    for name in ("hidden_states", "attentions", "cross_attentions"):
        if output.get(name):
            output[name] = marked(output[name])
    return output


def _of_no_tokens(like: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor in the place of one: [batch, 0, hidden], or of attentions [batch, heads, 0, 0].

    It has the batch's size, for what gathers outputs (the ``Trainer``, Accelerate) takes nothing else.
    """
    batch, *rest = like.shape
    return like.new_empty((batch, rest[0], 0, 0) if like.ndim == 4 else (batch, 0, rest[-1]))


def _untie(task_model: PreTrainedModel, reduced: PreTrainedModel, lower: dict[str, nn.Module]) -> list[str]:
    """Let nothing of the copy be tied to what it lacks; return what to tell of it."""
    lower_modules = {id(module) for part in lower.values() for module in part.modules()}
    lower_parameters = {id(parameter) for part in lower.values() for parameter in part.parameters()}
    there = {name for name, _ in reduced.named_parameters(remove_duplicate=False)}
    shared = [
        f"{path}.{name}"
        for path, module in task_model.named_modules()
        if id(module) not in lower_modules
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in lower_parameters and f"{path}.{name}" in there
    ]
    # Nothing may tie a weight to the stub, now or where the copy is saved and loaded.
    reduced.config.tie_word_embeddings = False
    reduced.all_tied_weights_keys = {}
    note = f"{', '.join(shared)}, of which the reduced model has its own copy: training that changes no embeddings"
    return [note] if shared else []


def _freeze_shared(reduced: PreTrainedModel, family: Family) -> list[str]:
    """Freeze what layers of both halves use; return what to tell of it."""
    base = base_model_of(reduced)
    parts = family.shared_of(base)
    first = family.layers_of(base)[0]
    if family.first_layer_runs:
        parts |= {f"{family.layers}.0": first}
    if isinstance(first, BiasPassThrough):
        parts |= {f"{family.layers}.0.{name}": part for name, part in first.named_children()}
    if any(hasattr(reduced, name) for name in family.matrix_readers):
        parts |= family.embeddings_of(base)
    frozen = [f"{path}.{name}" for path, part in parts.items() for name, _ in part.named_parameters()]
    for part in parts.values():
        part.requires_grad_(False)
    note = f"{', '.join(frozen)}, which are frozen, for the stored activations depend on them"
    return [note] if frozen else []

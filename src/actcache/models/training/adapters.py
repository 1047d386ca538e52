"""Bottleneck adapters (Houlsby et al., 2019) in the upper layers of a full or reduced model.

An adapter is ``h + f(h W_down) W_up``, after the output projection of attention and after that of the feed-forward
part, before the residual connection is added. Everything else of the layers is frozen. It hangs on the projection as
its child ``adapter``, by a forward hook: the projection's own weights keep their names, so checkpoints fit as before.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from actcache.errors import LayerError, ModelError, UnsupportedModelError, UsageError
from actcache.format.arguments import whole, whole_numbers
from actcache.models.families import base_model_of, family_of
from actcache.models.tensors import unshared

Model = TypeVar("Model", bound=nn.Module)

_METADATA = "actcache_adapters"
_STD = 1e-2  # Houlsby et al.: a Gaussian of this deviation, cut off at two deviations, so that training starts near h

_BERT = "attention.output.dense", "output.dense"
_LLAMA = "self_attn.o_proj", "mlp.down_proj"
#: ``config.model_type`` -> paths within a layer of the output projections of attention and of the feed-forward part.
_PLACES: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2"), _BERT),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"), _LLAMA),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "mpnet": ("attention.attn.o", "output.dense"),
    "modernbert": ("attn.Wo", "mlp.Wo"),
    **dict.fromkeys(("t5", "mt5"), ("layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo")),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
}


@dataclass(frozen=True)
class AdapterSpec:
    """Where a model's adapters are, what they look like, and what trains beside them."""

    bottleneck: int
    layers: tuple[int, ...]  # 1-based
    activation: str
    places: tuple[str, ...]  # paths of the projections within a layer
    layer_norms: bool  # whether the normalizations of these layers train
    also_train: tuple[str, ...]  # paths of other modules that train

    @classmethod
    def from_json(cls, value: Any) -> AdapterSpec:
        """Rebuild a spec from ``dataclasses.asdict``; raises ``ModelError`` where the value is no such thing."""
        try:
            return cls(
                int(value["bottleneck"]),
                tuple(int(layer) for layer in value["layers"]),
                str(value["activation"]),
                tuple(str(place) for place in value["places"]),
                bool(value["layer_norms"]),
                tuple(str(path) for path in value["also_train"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"this describes no adapters of this format version: {error!r}") from None


class Bottleneck(nn.Module):
    """One adapter: ``[..., width]`` to the same shape, at the start nearly the identity."""

    def __init__(self, width: int, bottleneck: int, activation: str, like: torch.Tensor) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck, dtype=like.dtype, device=like.device)
        self.activation = ACT2FN[activation]
        self.up = nn.Linear(bottleneck, width, dtype=like.dtype, device=like.device)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=_STD, a=-2 * _STD, b=2 * _STD)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        adapted: torch.Tensor = hidden + self.up(self.activation(self.down(hidden)))
        return adapted


def add_adapters(
    model: Model,
    bottleneck: int = 64,
    *,
    layers: Iterable[int] | None = None,
    activation: str = "gelu",
    places: Sequence[str] | None = None,
    layer_norms: bool = False,
    also_train: Sequence[str] = (),
) -> Model:
    """Put adapters into a task model, full or reduced, in place; freeze all but them and the head; return the model.

    The head is what the task model has outside of its base model. The papers differ in what trains with it: nothing
    (the embedding recycling paper, the default here) or the layers' normalizations (Houlsby et al.).

    Args:
        bottleneck: its width; the paper tries 24, 64 and 256.
        layers: which get adapters, 1-based, numbered as in the full model; by default all of a full model ("full
            adapter setting"), and of a reduced model all that it has.
        activation: a name of transformers' activations.
        places: paths, within a layer, of the projections that get one; by default those of the model's type.
        layer_norms: whether the normalizations of these layers train too.
        also_train: paths of other modules that train, as ``"bert.pooler"``.

    Raises:
        LayerError: a layer is not one of the model's own.
        ModelError: it has adapters already.
        UnsupportedModelError: the model's type is not in the table, and ``places`` are not given.
        UsageError: an option has no such value.
    """
    bottleneck = whole("bottleneck", bottleneck, 1)
    if activation not in ACT2FN:
        raise UsageError(f"adapters have an activation of transformers, not {activation!r}")
    base = base_model_of(model)
    count = len(family_of(base).layers_of(base))
    own = range(getattr(model, "actcache_layer", 0) + 1, count + 1)
    wanted = tuple(own) if layers is None else tuple(sorted({*whole_numbers("layers", layers).tolist()}))
    if not wanted or not set(wanted) <= set(own):
        raise LayerError(
            f"this {type(model).__name__} has layers {own.start}..{count}, so no adapters go into {wanted}"
        )
    where = tuple(places) if places is not None else _places_of(base)
    insert_adapters(model, AdapterSpec(bottleneck, wanted, activation, where, layer_norms, tuple(also_train)))
    return model


def insert_adapters(model: nn.Module, spec: AdapterSpec) -> None:
    """Put a spec's new adapters into a model, and freeze all but what trains; raises ``ModelError``."""
    if spec_of(model) is not None:
        raise ModelError(f"this {type(model).__name__} has adapters already; take a fresh copy of it for others")
    projections = _projections(model, spec)
    for path in spec.also_train:
        _submodule(model, path)
    for projection in projections:
        width = projection.out_features if hasattr(projection, "out_features") else projection.nf  # a Conv1D of GPT-2
        projection.adapter = Bottleneck(int(width), spec.bottleneck, spec.activation, projection.weight)
        projection.register_forward_hook(_adapt)
    model.__dict__["actcache_adapters"] = spec
    trained = set(trained_names(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def spec_of(model: nn.Module) -> AdapterSpec | None:
    """Return what adapters a model has; None where it has none."""
    return model.__dict__.get("actcache_adapters")


def _known_spec(model: nn.Module) -> AdapterSpec:
    if (spec := spec_of(model)) is None:
        raise ModelError(f"this {type(model).__name__} has no adapters: actcache.models.add_adapters puts them in")
    return spec


def trained_names(model: nn.Module) -> list[str]:
    """Return the names of what trains in a model with adapters: theirs, the head's, and what was asked for."""
    base, spec = base_model_of(model), _known_spec(model)
    parts = [projection.adapter for projection in _projections(model, spec)]
    parts += [_submodule(model, path) for path in spec.also_train]
    if spec.layer_norms:
        layers = family_of(base).layers_of(base)
        modules = (module for number in spec.layers for module in layers[number - 1].modules())
        parts += [module for module in modules if type(module).__name__.endswith("Norm")]
    wanted = {id(parameter) for part in parts for parameter in part.parameters()}
    of_base = {id(parameter) for parameter in base.parameters()}  # a head that is tied to it does not train
    return [name for name, p in model.named_parameters() if id(p) in wanted or id(p) not in of_base]


def save_adapters(model: nn.Module, path: str | Path) -> None:
    """Write what trains in a model with adapters to one safetensors file; raises ``ModelError`` where it has none."""
    names = trained_names(model)
    what = {"version": 1, "spec": asdict(_known_spec(model)), "model": _kind(model)}
    state = model.state_dict()
    save_file(unshared({name: state[name] for name in names}), str(path), metadata={_METADATA: json.dumps(what)})


def load_adapters(model: Model, path: str | Path) -> Model:
    """Put the adapters and the head of ``save_adapters`` into a model, in place, and return it.

    What was trained in a reduced model fits the full one, and the other way round.

    Args:
        model: of the class that was saved, full or reduced, with the same frozen weights (which is not checked),
            without adapters or with the same.

    Raises:
        ModelError: the file is no such thing, or does not fit the model.
        LayerError: it has adapters in layers that a reduced model lacks.
    """
    what, state = _read(path)
    spec = AdapterSpec.from_json(what["spec"])
    if what["model"] != _kind(model):
        raise ModelError(f"{path} holds adapters of {what['model']}, and this is {_kind(model)}")
    lowest = getattr(model, "actcache_layer", 0) + 1
    if min(spec.layers, default=lowest) < lowest:
        raise LayerError(f"{path} holds adapters of layers {spec.layers}, and this reduced model begins at {lowest}")
    if spec_of(model) is None:
        insert_adapters(model, spec)
    elif spec_of(model) != spec:
        raise ModelError(f"{path} holds other adapters ({spec}) than the model has ({spec_of(model)})")
    everything = dict(model.named_parameters())
    parameters = {name: everything[name] for name in trained_names(model)}
    theirs = {name: tensor.shape for name, tensor in state.items()}
    ours = {name: parameter.shape for name, parameter in parameters.items()}
    wrong = sorted(name for name in theirs.keys() | ours if theirs.get(name) != ours.get(name))
    if wrong:
        raise ModelError(f"{path} does not fit this {type(model).__name__}: it differs in {', '.join(wrong[:5])}, ...")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
    return model


def copy_sharing_frozen(model: Model) -> Model:
    """Return a copy that shares the model's frozen parameters: for several tasks' adapters over one set of layers."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def _adapt(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    adapted: torch.Tensor = module.adapter(output)
    return adapted


def _places_of(base: PreTrainedModel) -> tuple[str, str]:
    try:
        return _PLACES[base.config.model_type]
    except KeyError:
        raise UnsupportedModelError(
            f"where the adapters of a {type(base).__name__} go is not known: name the output projections of attention "
            f"and feed-forward within a layer, as places={_BERT}"
        ) from None


def _projections(model: nn.Module, spec: AdapterSpec) -> list[Any]:
    base = base_model_of(model)
    layers = family_of(base).layers_of(base)
    if max(spec.layers) > len(layers):
        raise ModelError(f"adapters of layers {spec.layers} do not fit a model of {len(layers)} layers")
    return [_submodule(layers[number - 1], place) for number in spec.layers for place in spec.places]


def _submodule(module: nn.Module, path: str) -> Any:
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise ModelError(f"a {type(module).__name__} has no part {path!r}") from None


def _kind(model: nn.Module) -> str:
    return f"{type(model).__qualname__} of {base_model_of(model).config.model_type}"


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(str(path), "pt") as file:
            what = json.loads((file.metadata() or {})[_METADATA])
            if what["version"] != 1:
                raise ModelError(f"{path} was written by a newer release: update actcache")
            what["spec"], what["model"]
            return what, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} holds no adapters that save_adapters wrote: {error!r}") from None

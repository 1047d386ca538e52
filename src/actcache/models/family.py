"""What differs between families of transformers: the one table that recording and replaying consult.

A family says where a base model keeps its embeddings and its layers, and which configuration values change the lower
half's numbers. It is an allow-list: a release of transformers that adds a field must not change anybody's identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from actcache.errors import LayerError, UnsupportedModelError

_BERT_CONFIG: Mapping[str, Any] = {
    "hidden_size": None,
    "num_attention_heads": None,
    "intermediate_size": None,
    "hidden_act": None,
    "layer_norm_eps": None,
    "max_position_embeddings": None,
    "type_vocab_size": None,
    "position_embedding_type": "absolute",  # what models without the field do
    "is_decoder": False,
    "add_cross_attention": False,
}


@dataclass(frozen=True)
class Family:
    """Models that are split in the same way. Immutable.

    Args:
        name: what errors call it.
        model_types: the ``config.model_type`` of its members.
        layers: dotted path of the ``ModuleList`` of layers within the base model.
        embeddings: dotted paths of the modules that come before the layers and that a reduced model needs no more.
        numeric_config: configuration values that change the lower half's numbers, with the value that stands for a
            field that the configuration does not have.
        padding_shifts_positions: positions are numbered from ``pad_token_id + 1`` (the RoBERTa convention).
        tuple_arity: None where a layer returns the bare tensor, else the length of the tuple that it returns.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str = "encoder.layer"
    embeddings: tuple[str, ...] = ("embeddings",)
    numeric_config: Mapping[str, Any] = field(default_factory=lambda: dict(_BERT_CONFIG))
    padding_shifts_positions: bool = False
    tuple_arity: int | None = None

    def layers_of(self, base_model: nn.Module) -> nn.ModuleList:
        """Return the layers of a base model, the first at index 0.

        Raises:
            UnsupportedModelError: the path of ``layers`` leads to no ``ModuleList``.
        """
        try:
            layers = base_model.get_submodule(self.layers)
        except AttributeError:
            layers = base_model
        if not isinstance(layers, nn.ModuleList):
            raise UnsupportedModelError(
                f"family {self.name!r} looks for the layers of a {type(base_model).__name__} at {self.layers!r}; there "
                "is no list of layers"
            )
        return layers

    def embeddings_of(self, base_model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules before the layers by their paths."""
        return {path: base_model.get_submodule(path) for path in self.embeddings}

    def lower_of(self, base_model: nn.Module, layer: int) -> dict[str, nn.Module]:
        """Return the modules of the lower half by their paths: embeddings and layers 1..``layer``."""
        layers = self.layers_of(base_model)
        return self.embeddings_of(base_model) | {f"{self.layers}.{i}": layers[i] for i in range(layer)}

    def check_layer(self, base_model: nn.Module, layer: int) -> None:
        """Refuse a layer that leaves nothing to record or nothing to replay.

        Raises:
            LayerError: ``layer`` is not in 1..N-1.
        """
        count = len(self.layers_of(base_model))
        if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= count - 1:
            raise LayerError(
                f"layer {layer!r} cannot be cut at: {type(base_model).__name__} has layers 1..{count}, and one of "
                f"1..{count - 1} leaves layers on both sides"
            )

    def numbers_of(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the configuration values that change the lower half's numbers, and the family's name."""
        values = {name: getattr(config, name, absent) for name, absent in self.numeric_config.items()}
        return {"family": self.name, **values}

    def max_tokens(self, config: PreTrainedConfig) -> int | None:
        """Return how many tokens the model's positions allow; None where there is no limit."""
        positions = getattr(config, "max_position_embeddings", None)
        if positions is None:
            return None
        return int(positions) - (int(config.pad_token_id or 0) + 1 if self.padding_shifts_positions else 0)


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Add a family to the table; a later registration of a ``model_type`` replaces the earlier one.

    What to check for a new family: that a reduced model's outputs equal the full model's on padded batches, at every
    layer (``tests/models/test_replay.py`` shows how), and that every configuration value that changes the numbers of
    the lower half is named in ``numeric_config``. Not thread-safe: register at import time.
    """
    for model_type in family.model_types:
        _FAMILIES[model_type] = family


register_family(Family("bert", ("bert",)))
register_family(
    Family(
        "roberta",
        ("roberta", "xlm-roberta", "camembert"),
        # pad_token_id: positions are counted from it, over the tokens that are not it
        numeric_config={**_BERT_CONFIG, "pad_token_id": None},
        padding_shifts_positions=True,
    )
)


def base_model_of(model: nn.Module) -> PreTrainedModel:
    """Return the base model within a task model; a base model is its own.

    Raises:
        UnsupportedModelError: the model is not one of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"a {type(model).__name__} is no transformers model: give a PreTrainedModel, as from_pretrained returns it"
        )
    base = model.base_model
    return base if isinstance(base, PreTrainedModel) else model


def family_of(base_model: PreTrainedModel) -> Family:
    """Return the family of a base model.

    Raises:
        UnsupportedModelError: it is not in the table; the message says how to describe it.
    """
    model_type = base_model.config.model_type
    try:
        return _FAMILIES[model_type]
    except KeyError:
        raise UnsupportedModelError(
            f"models of type {model_type!r} ({type(base_model).__name__}) are not in the table of families, which has "
            f"{', '.join(sorted(_FAMILIES))}. Describe the family with actcache.models.register_family(Family(name, "
            "model_types, layers=path of its ModuleList, embeddings=paths of what comes before, numeric_config=...))"
        ) from None

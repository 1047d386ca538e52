"""How a transformer is split: what recording and replaying ask of a family of models.

A family says where a base model keeps its embeddings and its layers, what its two halves share, and which configuration
values change the lower half's numbers. What is in the table at the end of this file has names for the latter, so that a
release of transformers that adds a field changes nobody's identity; any other model's family is found by running it
(``actcache.models.discovery``), and its identity is its whole configuration, but for what is known to be cosmetic.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from actcache.errors import LayerError, ModelError, UnsupportedModelError
from actcache.format.arguments import is_whole
from actcache.models.discovery import Stack, find_stack, main_input_of, positions_limit, takes
from actcache.models.layouts import Layout


def numbers(*names: str, **absent: Any) -> dict[str, Any]:
    """Return a ``numeric_config``: fields of every configuration, and others with what models without the field do."""
    return {**dict.fromkeys(names), **absent}


#: What BERT and its kin call the values that change a lower half's numbers.
BERT_CONFIG: Mapping[str, Any] = numbers(
    *("hidden_size", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("max_position_embeddings", "type_vocab_size"),
    "is_causal",  # no field of any class, but transformers looks at it
    position_embedding_type="absolute",
    is_decoder=False,
    add_cross_attention=False,
)


@dataclass(frozen=True)
class Family:
    """Models that are split in the same way. Immutable.

    Paths are dotted and start at the base model. A path that ends in ``?`` is one that not every member has.
    """

    name: str
    model_types: tuple[str, ...]  # the ``config.model_type`` of its members
    layers: str = "encoder.layer"  # path of the ``ModuleList`` of layers
    # Paths of what comes before the layers, which a reduced model needs no more. Each is called with token ids or
    # positions, or with what the one before it returned.
    embeddings: tuple[str, ...] = ("embeddings",)
    # What changes the lower half's numbers, with the value that stands for a field that a configuration lacks.
    # None for the whole configuration.
    numeric_config: Mapping[str, Any] | None = field(default_factory=lambda: dict(BERT_CONFIG))
    padding_shifts_positions: bool = False  # positions begin at ``pad_token_id + 1`` (the RoBERTa convention)
    tuple_arity: int | None = None  # None where a layer returns the bare tensor, else the length of its tuple
    first_position: int = 0  # of the first token, where the model's code fixes it
    positions_in_layers: bool = False  # layers take positions (rotary), which replay then counts along the mask
    shared: tuple[str, ...] = ()  # paths of what both halves use: part of the identity, and frozen when reduced
    # Path, within the first layer, of the attention that computes the position bias of all layers (T5). Its layer
    # returns that bias as the second of its tuple, and takes it as its third argument.
    relative_bias: str | None = None
    convolution: str | None = (
        None  # path of what adds to the first layer's output; takes (its own input, that output, mask)
    )
    # Names of task models' heads that read the word embeddings' matrix itself, not a parameter of their own that is
    # tied to it. Where there is one, a reduced model keeps the matrix, frozen.
    matrix_readers: tuple[str, ...] = ()
    stack: str = ""  # path of the transformers model whose forward runs the layers; empty for the base model itself
    # Of stored rows, by default. ``bfloat16`` where some members have activations beyond float16's 65,504.
    dtype: str = "float16"
    found: Stack | None = None  # where this family was not registered but found by running the model
    code: str | None = None  # digest of the source of a class that is not one of transformers
    first_layer_runs: bool = (
        False  # the first layer is kept, frozen, and run on anything for what it returns beside rows
    )
    equal_lengths: bool = False  # padding changes the numbers: batches hold documents of one length
    right_padding: bool = False  # padding on the left changes the numbers
    one_size: bool = False  # upper layers depend on the size of images or sounds: it has to be the native one
    input_shape: tuple[int, ...] | None = None  # of an image or sound that replay is proved with; None: as configured
    withheld: tuple[str, ...] = ()  # outputs of the model that a reduced model cannot give
    proved: bool = False  # replay was proved for the model at hand
    pads: bool = True  # whether ``pad_token_id`` may change the numbers of tokens

    def width_of(self, base_model: PreTrainedModel) -> int:
        """Return how many columns a row has."""
        return int(base_model.config.hidden_size) if self.found is None else self.found.width

    @property
    def layout(self) -> Layout:
        """How layers hold rows."""
        return Layout() if self.found is None else self.found.layout

    def layers_of(self, base_model: nn.Module) -> nn.ModuleList | nn.Sequential:
        """Return a base model's layers; raises ``UnsupportedModelError`` where they are no ``ModuleList``."""
        layers = self._find(base_model, self.layers + "?")
        if not isinstance(layers, nn.ModuleList) and not (self.found and isinstance(layers, nn.Sequential)):
            raise UnsupportedModelError(
                f"family {self.name!r} looks for the layers of a {type(base_model).__name__} at {self.layers!r}; there "
                "is no list of layers"
            )
        return layers

    def stack_of(self, base_model: nn.Module) -> nn.Module:
        """Return the module whose forward runs embeddings and layers, from ``input_ids`` and ``attention_mask``."""
        return base_model.get_submodule(self.stack)

    def embeddings_of(self, base_model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules before the layers by path; raises ``UnsupportedModelError`` where one is missing."""
        return self._existing(base_model, self.embeddings)

    def shared_of(self, base_model: nn.Module) -> dict[str, nn.Module]:
        """Return, by their paths, the modules that layers of both halves use and that are no part of a layer."""
        return self._existing(base_model, self.shared)

    def convolution_of(self, base_model: nn.Module) -> dict[str, nn.Module]:
        """Return the module that adds to the first layer's output by its path; empty where there is none."""
        return self._existing(base_model, (self.convolution,) if self.convolution else ())

    def beside_of(self, base_model: nn.Module) -> dict[str, nn.Module]:
        """Return, by their paths, all modules of the lower half that are no layers: they belong to the identity."""
        return self.embeddings_of(base_model) | self.shared_of(base_model) | self.convolution_of(base_model)

    def alias_of(self, base_model: nn.Module) -> dict[str, nn.Module]:
        """Return the input embeddings where they only lend their matrix to ``embeddings`` (``T5EncoderModel.shared``).

        Beside a decoder that has the same matrix they are none.
        """
        if isinstance(base_model, PreTrainedModel) and main_input_of(base_model) != "input_ids":
            return {}  # a decoder's, which no image or audio goes through
        try:
            words = base_model.get_input_embeddings() if isinstance(base_model, PreTrainedModel) else None
        except (NotImplementedError, AttributeError):  # of what takes no words
            return {}
        known = [*self.embeddings_of(base_model).values(), *self.shared_of(base_model).values()]
        lower = {id(module) for part in known for module in part.modules()}
        users = {
            path: module
            for path, module in base_model.named_modules()
            if id(module) not in lower and getattr(module, "weight", None) is getattr(words, "weight", module)
        }
        return users if list(users.values()) == [words] else {}

    def lower_of(self, base_model: nn.Module, layer: int) -> dict[str, nn.Module]:
        """Return the modules that the lower half runs by their paths: those beside the layers, and 1..``layer``."""
        layers = self.layers_of(base_model)
        beside = self.beside_of(base_model) | self.alias_of(base_model)
        return beside | {f"{self.layers}.{i}": layers[i] for i in range(layer)}

    def check_layer(self, base_model: nn.Module, layer: int | str) -> int:
        """Return a layer as Python's own number; raises ``LayerError`` where it is not in 1..N-1."""
        count = len(self.layers_of(base_model))
        if not is_whole(layer) or not 1 <= layer <= count - 1:
            raise LayerError(
                f"layer {layer!r} cannot be cut at: {type(base_model).__name__} has layers 1..{count}, and one of "
                f"1..{count - 1} leaves layers on both sides"
            )
        return int(layer)

    def check_alone(self, config: PreTrainedConfig) -> None:
        """Raise ``UnsupportedModelError`` where it is known that a document's rows depend on the others of its batch.

        What is not known here shows when canaries are made, alone and in a batch (``actcache.models.canary``).
        """
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = [rope.get("rope_type"), *(part.get("rope_type") for part in rope.values() if isinstance(part, dict))]
        if "longrope" in kinds:
            raise UnsupportedModelError(
                f"{type(config).__name__} asks for rope_type 'longrope', which computes each document by the longest "
                "of its batch: its rows cannot be stored"
            )
        attention = str(getattr(config, "_attn_implementation", None))
        if attention.startswith("paged"):
            raise UnsupportedModelError(
                f"attention implementation {attention!r} is for generation from a paged cache: load the model with "
                "attn_implementation='sdpa' or 'eager'"
            )
        if (getattr(config, "chunk_size_feed_forward", 0) or 0) > 1:
            raise UnsupportedModelError(
                f"{type(config).__name__} has chunk_size_feed_forward={config.chunk_size_feed_forward}, with which the "
                "model takes batches of multiples of so many tokens alone: load it with chunk_size_feed_forward=0, "
                "which computes the same numbers"
            )

    def numbers_of(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the configuration values that change the lower half's numbers, and the family's name."""
        if self.numeric_config is None:
            values = _without_cosmetics(json.loads(config.to_json_string(use_diff=False)))
            if not self.pads:
                values.pop("pad_token_id", None)
            return {"class": self.name, **values, **({} if self.code is None else {"code": self.code})}
        values = {name: getattr(config, name, absent) for name, absent in self.numeric_config.items()}
        return {"family": self.name, **values}

    def max_tokens(self, config: PreTrainedConfig) -> int | None:
        """Return how many tokens the model's positions allow; None where there is no limit."""
        positions = getattr(config, "max_position_embeddings", None)
        if self.found is not None:
            return positions_limit(self.found, config)
        if positions is None:
            return None
        first = int(config.pad_token_id or 0) + 1 if self.padding_shifts_positions else self.first_position
        return int(positions) - first

    def _existing(self, base_model: nn.Module, paths: tuple[str, ...]) -> dict[str, nn.Module]:
        found = ((path.removesuffix("?"), self._find(base_model, path)) for path in paths)
        return {path: module for path, module in found if module is not None}

    def _find(self, base_model: nn.Module, path: str) -> nn.Module | None:
        try:
            return base_model.get_submodule(path.removesuffix("?"))
        except AttributeError:  # nothing there, or None
            if path.endswith("?"):
                return None
            raise UnsupportedModelError(
                f"family {self.name!r} looks for a part of a {type(base_model).__name__} at {path!r}; there is none"
            ) from None


#: Fields that say how a model is replayed, which is for the proof to say.
_WAY = (
    *("embeddings", "shared", "first_layer_runs", "equal_lengths", "right_padding", "positions_in_layers", "one_size"),
    *("input_shape", "withheld"),
)


def way_in(family: Family) -> dict[str, Any]:
    """Return how a proved family is replayed, as JSON values; ``way_of`` is the inverse."""
    return {name: getattr(family, name) for name in _WAY}


def way_of(family: Family, way: dict[str, Any]) -> Family:
    """Return a family that is replayed in a way that was proved before."""
    values: dict[str, Any] = {
        name: tuple(way[name]) if isinstance(way[name], list) else way[name] for name in _WAY if name in way
    }
    return replace(family, proved=True, **values)


_FAMILIES: dict[str, Family] = {}
_REMOTE = "transformers_modules"  # the package of code that came with a model


def register_family(family: Family) -> None:
    """Add a family to the table; a later registration of a ``model_type`` replaces the earlier one.

    What to check for a new family: that a reduced model's outputs equal the full model's on padded batches, at every
    layer (``docs/models.md`` shows how), and that every configuration value that changes the numbers of the lower half
    is named in ``numeric_config``. Not thread-safe: register at import time.
    """
    for model_type in family.model_types:
        _FAMILIES[model_type] = family


def is_registered(model_type: str) -> bool:
    """Return whether the table has a family for a model type; others are found by running the model."""
    return model_type in _FAMILIES


def base_model_of(model: nn.Module) -> PreTrainedModel:
    """Return a task model's base model, or a base model itself; raises ``UnsupportedModelError`` for others."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"a {type(model).__name__} is no transformers model: give a PreTrainedModel, as from_pretrained returns it"
            + (
                " (of PEFT's, model.get_base_model(), which has the adapters in it)"
                if hasattr(model, "peft_config")
                else ""
            )
        )
    base = model.base_model
    if not isinstance(base, PreTrainedModel):
        return model
    # DINOv3's base model calls its stack of layers "model", as if that were one: it takes no pixels.
    kind = getattr(model, "actcache_task_class", type(model))
    main = main_input_of(kind)
    return model if main != "input_ids" and takes(kind, main) and not takes(base, main) else base


def family_of(base_model: PreTrainedModel) -> Family:
    """Return a base model's family: the registered one, else what running it for a few tokens finds.

    Raises:
        UnsupportedModelError: no list of layers was found, with what was looked at.
    """
    registered = _FAMILIES.get(base_model.config.model_type)
    remote = type(base_model).__module__.partition(".")[0] == _REMOTE
    if registered is not None and not (remote and registered in _OF_TRANSFORMERS):
        return registered
    known = _found.get(base_model)
    modules = sum(1 for _ in base_model.modules())
    if known is None or known[0] != modules:  # modules may be added
        known = modules, _discovered(base_model)
        _found[base_model] = known
    return known[1]


_found: weakref.WeakKeyDictionary[PreTrainedModel, tuple[int, Family]] = weakref.WeakKeyDictionary()


def _discovered(base_model: PreTrainedModel) -> Family:
    """Return the family of a model as running it shows; how it is replayed is for the proof to say."""
    stack = find_stack(base_model)
    runner = type(base_model.get_submodule(stack.runner))
    return Family(
        name=_name_of(runner),
        model_types=(base_model.config.model_type,),
        layers=stack.layers,
        embeddings=stack.fillable,
        shared=tuple(path for path in stack.before if path not in stack.fillable),
        tuple_arity=stack.arity,
        positions_in_layers=stack.takes_positions,
        numeric_config=None,
        stack=stack.path,
        dtype="bfloat16" if _is_wide(base_model) else "float16",
        found=stack,
        code=_code_of(type(base_model)),
        pads=_pads(base_model, stack),
    )


def _name_of(kind: type) -> str:
    """Return a class's name with its module's; of code that came with a model, without where that lies today."""
    package, *inside = kind.__module__.split(".")
    return ".".join([package, *(inside[-1:] if package == _REMOTE else inside), kind.__qualname__])


def _is_wide(base_model: PreTrainedModel) -> bool:
    """Return whether activations may be beyond float16's range: decoders, and what was trained in bfloat16."""
    config = base_model.config
    kind = getattr(config, "dtype", None)
    return str(kind).endswith("bfloat16") or hasattr(config, "rms_norm_eps") or hasattr(config, "rope_parameters")


def _pads(base_model: PreTrainedModel, stack: Stack) -> bool:
    """Return whether the padding id could be more to the lower half than the id of a row of a table.

    It is no more where the code that runs the layers does not name it, and plain tables are what has it.
    """
    running = (base_model.get_submodule(stack.path), base_model.get_submodule(stack.runner))
    try:
        if any("pad" in inspect.getsource(type(one).forward) for one in running):
            return True
    except (OSError, TypeError):
        return True
    names = ("padding_idx", "pad_token_id", "pad_index")
    return any(
        type(module) is not nn.Embedding and any(hasattr(module, name) for name in names)
        for path in stack.before
        for module in base_model.get_submodule(path).modules()
    )


def _code_of(kind: type) -> str | None:
    """Return a digest of the file that defines a class, and of those that came with it from a repository; None for what
    transformers itself defines.

    Its releases are told apart by canaries, where they give other numbers, so that no release costs anybody a cache.
    """
    package = kind.__module__.partition(".")[0]
    if package == "transformers":
        return None
    source = getattr(sys.modules.get(kind.__module__), "__file__", None)
    try:
        if source and package == _REMOTE:
            files = sorted({Path(one).name: one for one in [source, *get_relative_import_files(source)]}.items())
            data = b"".join(name.encode() + b"\0" + Path(one).read_bytes() + b"\0" for name, one in files)
        else:
            data = Path(source or "").read_bytes() if source else inspect.getsource(kind).encode()
    except (OSError, TypeError) as error:
        raise ModelError(
            f"the source of {kind.__module__}.{kind.__qualname__} cannot be read ({error}), and it is part of what "
            "tells a cache from another: define the class in a file, or register a Family for its model_type"
        ) from None
    return hashlib.blake2b(data, digest_size=16).hexdigest()


#: Fields of configurations that change no number of a lower half in eval mode, by their exact names: what else a
#: configuration has is part of the identity. A pattern would not do: ESM's ``token_dropout`` moves rows.
COSMETIC = frozenset(
    {
        # where it came from, how it is written down, and what its heads are for
        *("_name_or_path", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype"),
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
        *("tokenizer_class", "prefix", "tie_word_embeddings", "tie_encoder_decoder"),
        *("_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset"),
        # what is returned beside the rows, and kept for generation
        *("output_attentions", "output_hidden_states", "return_dict", "use_cache", "output_router_logits"),
        # dropout of training (eval mode has none), and the numbers that weights were drawn by
        *("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "dropout", "dropout_rate", "embd_pdrop"),
        *("embedding_dropout", "hidden_dropout", "hidden_dropout_prob", "mlp_dropout", "resid_pdrop"),
        *("activation_dropout", "classifier_dropout", "classifier_dropout_prob", "layerdrop", "encoder_layerdrop"),
        *("decoder_layerdrop", "initializer_cutoff_factor", "initializer_factor", "initializer_range", "init_std"),
        *("router_aux_loss_coef", "router_jitter_noise"),
    }
)


def _without_cosmetics(config: Any) -> Any:
    """Return a configuration's JSON without cosmetic names, at every depth."""
    if isinstance(config, dict):
        return {name: _without_cosmetics(value) for name, value in config.items() if name not in COSMETIC}
    if isinstance(config, list):
        return [_without_cosmetics(value) for value in config]
    return (
        config if not isinstance(config, float) or (config == config and abs(config) != float("inf")) else str(config)
    )


# The table of families: what differs between the transformers that can be split, read off the modeling code of
# transformers 5.23. ``tests/models/test_families.py`` watches for new configuration fields.

_DEBERTA_CONFIG = {
    **BERT_CONFIG,
    **numbers("embedding_size", "pos_att_type", relative_attention=False, max_relative_positions=-1),
    "position_biased_input": True,
}
_LLAMA_CONFIG = numbers(
    *("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act"),
    *("rms_norm_eps", "max_position_embeddings", "rope_parameters", "is_causal"),
    attention_bias=False,
)
_SLIDING_CONFIG = numbers("layer_types", "sliding_window")
_GEMMA_CONFIG = {**_LLAMA_CONFIG, "use_bidirectional_attention": None}
_GEMMA2_CONFIG = {
    **{name: absent for name, absent in _GEMMA_CONFIG.items() if name != "hidden_act"},
    **_SLIDING_CONFIG,
    **numbers("hidden_activation", "query_pre_attn_scalar", "attn_logit_softcapping"),
}

for _family in (
    Family("bert", ("bert",)),  # MiniLM and SciBERT, too
    Family(
        "roberta",
        ("roberta", "xlm-roberta", "camembert"),
        # pad_token_id: positions are counted from it, over the tokens that are not it
        numeric_config={**BERT_CONFIG, "pad_token_id": None},
        padding_shifts_positions=True,
    ),
    Family(
        "electra",
        ("electra",),
        embeddings=("embeddings", "embeddings_project?"),  # where embeddings are narrower than layers
        numeric_config={**BERT_CONFIG, "embedding_size": None},
    ),
    Family(
        "distilbert",
        ("distilbert",),
        layers="transformer.layer",
        numeric_config=numbers(
            *("dim", "n_heads", "hidden_dim", "activation", "max_position_embeddings", "is_causal"),
            sinusoidal_pos_embds=False,
        ),
    ),
    Family(
        "mpnet",
        ("mpnet",),
        numeric_config={**BERT_CONFIG, "relative_attention_num_buckets": None},
        first_position=2,  # after its padding_idx, which is 1 whatever the configuration says
        tuple_arity=2,
        shared=("encoder.relative_attention_bias",),
    ),
    Family(
        "deberta",
        ("deberta",),
        numeric_config={**_DEBERTA_CONFIG, "talking_head": False},
        tuple_arity=2,
        shared=("encoder.rel_embeddings?",),
        matrix_readers=("lm_predictions",),
    ),
    Family(
        "deberta-v2",
        ("deberta-v2",),
        numeric_config={
            **_DEBERTA_CONFIG,
            **numbers("attention_head_size", position_buckets=-1, share_att_key=False, norm_rel_ebd="none"),
            **numbers(conv_kernel_size=0, conv_groups=1, conv_act="tanh"),
        },
        tuple_arity=2,
        shared=("encoder.rel_embeddings?", "encoder.LayerNorm?"),
        convolution="encoder.conv?",
        matrix_readers=("lm_predictions",),
    ),
    Family(
        "modernbert",
        ("modernbert",),
        layers="layers",
        numeric_config=numbers(
            *("hidden_size", "num_attention_heads", "head_dim", "intermediate_size", "hidden_activation", "norm_eps"),
            *("max_position_embeddings", "layer_types", "local_attention", "rope_parameters", "is_causal"),
            norm_bias=False,
            attention_bias=False,
            mlp_bias=False,
        ),
        positions_in_layers=True,
    ),
    Family(
        "t5",
        ("t5", "mt5"),
        layers="encoder.block",
        embeddings=("encoder.embed_tokens",),
        numeric_config=numbers(
            *("d_model", "d_kv", "d_ff", "num_heads", "relative_attention_num_buckets", "layer_norm_epsilon"),
            *("dense_act_fn", "is_causal"),
            relative_attention_max_distance=128,
            is_gated_act=False,
            is_decoder=False,
        ),
        tuple_arity=3,
        relative_bias="layer.0.SelfAttention",
        stack="encoder",
        dtype="bfloat16",
    ),
    Family(
        "gpt2",
        ("gpt2",),
        layers="h",
        embeddings=("wte", "wpe"),
        numeric_config=numbers(
            *("n_embd", "n_head", "n_inner", "n_positions", "activation_function", "layer_norm_epsilon", "is_causal"),
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            reorder_and_upcast_attn=False,
            add_cross_attention=False,
        ),
    ),
    *(
        Family(
            name,
            (model_type,),
            layers="layers",
            embeddings=("embed_tokens",),
            numeric_config=config,
            positions_in_layers=True,
            dtype="bfloat16",
        )
        for name, model_type, config in (
            ("llama", "llama", {**_LLAMA_CONFIG, "mlp_bias": False}),
            ("qwen2", "qwen2", {**_LLAMA_CONFIG, **_SLIDING_CONFIG}),
            ("qwen3", "qwen3", {**_LLAMA_CONFIG, **_SLIDING_CONFIG}),
            ("gemma", "gemma", _GEMMA_CONFIG),
            ("gemma2", "gemma2", _GEMMA2_CONFIG),
            ("gemma3", "gemma3_text", _GEMMA2_CONFIG),
        )
    ),
):
    register_family(_family)

#: What is known of transformers' own classes, which a class that came with a model may have the type of.
_OF_TRANSFORMERS = tuple(_FAMILIES.values())

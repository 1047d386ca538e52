"""Cross-model recycling: a smaller model that reads the stored rows of a larger one beside its own input embeddings.

Appendix A.3 of the embedding recycling paper. The larger model F is the *source*: a recycler has stored its rows, in
the paper those of the final layer. The smaller model F' is the *consumer*: all of it runs, from token ids on, and a
*bridge* (a learned MLP of two layers with ReLU) makes of each token's stored row something that joins the token's
embedding. Both models must have the same token ids for every text; their tokenizers' digests say whether they do.

The consumer model keeps the task model's own code: its class is a subclass of the task class, and the bridge hangs on
its word embeddings by a forward hook.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actcache.errors import (
    FormatError,
    LayerError,
    ModelError,
    TokenizationMismatchError,
    UnsupportedModelError,
    UsageError,
)
from actcache.format.arguments import whole
from actcache.format.recipe import Recipe
from actcache.models import loading, saving
from actcache.models.canary import TEXTS
from actcache.models.families import base_model_of, family_of
from actcache.models.modes import evaluating
from actcache.models.partial_vocabulary import kept_of, some_ids, vocabulary_size
from actcache.models.processing import takes_features
from actcache.models.replay import ReducedModel, check_inputs, forward_from_rows
from actcache.models.saving import WEIGHTS_NAME
from actcache.models.stubs import InjectedRows
from actcache.models.tensors import dtype_name, unshared
from actcache.models.tokenizing import token_ids_digest

Model = TypeVar("Model", bound=PreTrainedModel)
How = Literal["add", "concat", "gate"]
Start = Literal["itself", "random"]

DESCRIPTION_NAME = "consumer.json"
VERSION = 1

#: The consumer's attribute, and so the beginning of the names of the bridge's weights.
_BRIDGE = "bridge"
_DROPPED = ("input_ids", "attention_mask", "inputs_embeds", "past_key_values", "use_cache", "encoder_outputs")
#: Texts that tell two tokenizers apart, for errors.
_PROBES = (*TEXTS, "The Quick brown fox", "  two  spaces\tand a tab\n", "e\u0301 and \u00e9", "<s> [CLS] <|endoftext|>")


class Bridge(nn.Module):
    """From a source's rows to what joins the consumer's input embeddings: an MLP of two layers with ReLU.

    Args:
        source: columns of the stored rows.
        width: of the hidden layer.
        own: columns of the consumer's input embeddings.
        how: ``"add"``: e + m of an embedding e and what the MLP makes of the row, m; ``"gate"``: e + g m, where each
            column's g is the sigmoid of a linear layer over (e, m); ``"concat"``: a linear layer over (e, m).
        start: ``"itself"``: training begins with what the consumer computes alone: m is 0, and of a concatenation e is
            handed on; ``"random"``: all layers begin as torch makes them.
        like: has the dtype and the device.
    """

    def __init__(self, source: int, width: int, own: int, how: How, start: Start, like: torch.Tensor) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.how = how
        first, last = nn.Linear(source, width, **kind), nn.Linear(width, own, **kind)
        self.mlp = nn.Sequential(first, nn.ReLU(), last)
        self.join = None if how == "add" else nn.Linear(2 * own, own, **kind)
        if start == "itself":
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            if how == "concat" and self.join is not None:
                with torch.no_grad():  # what is m's stays random: were it 0, too, neither layer would get a gradient
                    self.join.weight[:, :own] = torch.eye(own, **kind)
                    self.join.bias.zero_()

    def forward(self, embedded: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return ``[..., own]`` of embeddings ``[..., own]`` and rows ``[..., source]``."""
        made: torch.Tensor = self.mlp(rows.to(next(self.mlp.parameters()).dtype))
        if self.join is None:
            return embedded + made
        joined: torch.Tensor = self.join(torch.cat([embedded.to(made.dtype), made], -1))
        return joined if self.how == "concat" else embedded + joined.sigmoid() * made


class _OnEmbeddings:
    """Forward hook of the word embeddings: joins the rows that were injected; counts its calls for the proof."""

    def __init__(self, bridge: Bridge, injected: InjectedRows) -> None:
        self.bridge, self.injected, self.calls = bridge, injected, 0

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        rows = self.injected.get()[0]
        if rows is None:
            return None
        self.calls += 1
        if rows.shape[:-1] != output.shape[:-1]:
            raise UnsupportedModelError(
                f"rows {list(rows.shape)} do not fit what is embedded, {list(output.shape)}: the model embeds other "
                "tokens than those that it is given"
            )
        joined: torch.Tensor = self.bridge(embedded=output, rows=rows)
        return joined.to(output.dtype)


def make_consumer(
    task_model: Model,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    source_tokenizer: PreTrainedTokenizerBase,
    *,
    how: How = "add",
    width: int | None = None,
    start: Start = "itself",
) -> Model:
    """Return a copy of a task model that takes a source's rows beside its tokens; see ``Recycler.consumer``."""
    if how not in get_args(How) or start not in get_args(Start):
        ways, starts = ", ".join(get_args(How)), ", ".join(get_args(Start))
        raise UsageError(f"rows are joined by how= of {ways}, from start= of {starts}, not by {how!r} from {start!r}")
    base = _checked(task_model)
    check_same_token_ids(source_tokenizer, tokenizer)
    _check_sizes(base, recipe, source_tokenizer)
    own = _embedding_width(base)
    settings = {
        "how": how,
        "start": start,
        "width": own if width is None else whole("width", width, 1),
        "source": recipe.hidden_size,
        "token_ids": token_ids_digest(source_tokenizer),
    }
    consumer = _with_bridge(task_model, settings)
    consumer.__dict__["actcache_recipe"] = recipe
    _prove(consumer, task_model)
    return consumer


def check_same_token_ids(source: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> None:
    """Raise ``TokenizationMismatchError`` where two tokenizers do not give every text the same token ids.

    Names do not count, nor do type ids or where texts are cut: what is compared is the digest of all that decides ids.
    """
    if token_ids_digest(source) == token_ids_digest(own):
        return
    say = "a consumer model reads the rows of its source token by token, so both need the same token ids"
    for text in _PROBES:
        theirs, ours = source(text)["input_ids"], own(text)["input_ids"]
        if theirs != ours:
            at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), 0)
            raise TokenizationMismatchError(
                f"{say}, and {text[:40]!r} is {len(theirs)} tokens to the source and {len(ours)} to the consumer: from "
                f"token {at} on {theirs[at : at + 5]} and {ours[at : at + 5]}. Take a source and a consumer that were "
                "made with one tokenizer"
            )
    raise TokenizationMismatchError(
        f"{say}. The two tokenizers are defined differently, though a few texts come out alike: where they are meant "
        "to be one, give the consumer the source's tokenizer (recycler.agreement.encoder.tokenizer)"
    )


class ConsumerModel:
    """What a consumer model adds to its task class: rows, saving. As thread-safe as that class's forward."""

    main_input_name = "token_ids"

    def _consume(self: Any, forward: Any, activations: Any, token_ids: Any, attention_mask: Any, kwargs: Any) -> Any:
        check_inputs(activations, token_ids, attention_mask, self.actcache_bridge["source"])
        if unusable := [name for name in _DROPPED if kwargs.get(name) is not None and kwargs[name] is not False]:
            raise ModelError(f"a consumer model takes token_ids and activations, and no {', '.join(unusable)}")
        if attention_mask is not None and (padding := getattr(self.config, "pad_token_id", None)) is not None:
            token_ids = token_ids.masked_fill(attention_mask == 0, padding)  # positions, heads look for it
        injected: InjectedRows = self.actcache_injected
        # A multiple choice model flattens [batch, choices, tokens] to [batch * choices, tokens] before it embeds.
        before = injected.put(activations.flatten(0, -3), attention_mask)
        try:
            return forward(**kwargs, input_ids=token_ids, attention_mask=attention_mask)
        finally:
            injected.put(*before)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Save the whole consumer, its bridge, and the recipe of its source; ``recycler.load_consumer`` loads them.

        The ``Trainer`` saves its checkpoints by this, and goes on from them.

        Args:
            is_main_process: whether this process writes.
            state_dict: the weights, where they are not to be taken from the model.
            options: transformers' others; there is one file of weights, whatever its size.

        Raises:
            ModelError: PEFT's modules are in the model, its vocabulary is pruned, or a weight is no plain tensor.
            UsageError: an option asks for what this does not do.
        """
        asked = [name for name, value in options.items() if value and name not in saving.IGNORED_OPTIONS]
        if asked:
            raise UsageError(f"a consumer model is saved without {', '.join(asked)}: leave it out")
        _save(self, Path(save_directory), state_dict, write=is_main_process)

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> NoReturn:
        """Refuse: a consumer model is loaded by the recycler of its source."""
        raise ModelError("a consumer model is loaded with recycler.load_consumer(folder), which compares the recipes")

    def push_to_hub(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse: a consumer model is no repository of the hub."""
        raise ModelError(
            "a consumer model runs on its source's rows alone, so it is no model of the hub: save_pretrained"
        )

    def generate(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse: tokens that are being generated have no stored rows."""
        raise ModelError("a consumer model reads its source's rows, and tokens that are being generated have none")

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # the class has no importable name
        return _new_consumer, (self.actcache_task_class,), self.__dict__


def load_consumer(
    folder: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    task_class: type[PreTrainedModel] | None = None,
    allow: Collection[str] = (),
    **options: Any,
) -> PreTrainedModel:
    """Return a consumer model that ``save_pretrained`` (or the ``Trainer``) wrote, in eval mode, on the CPU.

    Args:
        recipe: of the space that it is to run on; None to compare nothing.
        task_class: the task model's class, where it is not one of transformers.
        allow: of ``dtype``, ``compute_dtype``, ``max_length`` and ``too_long``, fields in which the recipes may differ.
        options: of transformers' ``from_config``: ``attn_implementation``.

    Raises:
        LowerHalfMismatchError: it was trained on the rows of another source, layer or tokenizer than the recipe's.
        ModelError: the folder holds no consumer model, or its recipe is not known or differs otherwise.
    """
    path = Path(folder)
    if set(allow) - set(loading.STORED):
        raise UsageError(
            f"recipes may differ in {', '.join(loading.STORED)} at most, not in {', '.join(sorted(allow))}"
        )
    what, theirs = _read(path)
    if recipe is not None:
        loading.check_recipe(theirs, recipe, allow, path, kind="consumer model")
    kind = task_class or loading.class_named(what["task_class"], path)
    try:
        state = load_file(path / WEIGHTS_NAME)
        config = kind.config_class.from_dict(what["config"])  # type: ignore[union-attr]
        consumer: PreTrainedModel
        with torch.random.fork_rng(devices=[]):
            full: PreTrainedModel = kind._from_config(config, dtype=loading.main_dtype(state), **options)
            full.eval()
            consumer = _with_bridge(full, what["bridge"])
        computed = {name: getattr(torch, dtype) for name, dtype in what["buffers"].items()}
        saved = {**computed, **{name: tensor.dtype for name, tensor in state.items()}}
        for name, tensor in (*consumer.named_parameters(), *consumer.named_buffers()):
            if name in saved:
                tensor.data = tensor.data.to(saved[name])
        consumer.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"{path} cannot be loaded as a consumer {kind.__name__}: {error}") from error
    consumer.__dict__["actcache_recipe"] = theirs
    consumer.eval()
    return consumer


def _checked(task_model: PreTrainedModel) -> PreTrainedModel:
    """Return the base model of what may become a consumer."""
    name = type(task_model).__name__
    if isinstance(task_model, ConsumerModel | ReducedModel):
        raise ModelError(f"the {name} is a consumer or reduced model already: give the full task model")
    base = base_model_of(task_model)
    if takes_features(base) or getattr(base.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"a consumer embeds the tokens of its source and nothing else, and a {name} takes other inputs: give an "
            "encoder or a decoder of text"
        )
    return base


def _embedding_width(base: PreTrainedModel) -> int:
    words: Any = base.get_input_embeddings()
    if not isinstance(getattr(words, "weight", None), torch.Tensor) or words.weight.ndim != 2:
        raise UnsupportedModelError(f"a {type(base).__name__} has no embedding matrix that a bridge could join")
    return int(words.weight.shape[1])


def _check_sizes(base: PreTrainedModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a consumer that lacks rows of the vocabulary, or positions, which the source's documents may have."""
    highest = max(tokenizer.get_vocab().values())
    if (there := vocabulary_size(base)) <= highest:
        raise TokenizationMismatchError(
            f"the source's tokenizer has token ids up to {highest}, and the consumer embeds 0..{there - 1}: it was "
            "made for another tokenizer"
        )
    positions = family_of(base).max_tokens(base.config)
    if positions is not None and (recipe.max_length or 0) > positions:
        raise LayerError(
            f"documents of the source have up to {recipe.max_length} tokens, and the consumer takes {positions}: "
            f"record with Recycler(..., max_length={positions}, too_long='truncate')"
        )


def _with_bridge(task_model: Model, settings: Mapping[str, Any]) -> Model:
    consumer = copy.deepcopy(task_model)
    base = base_model_of(consumer)
    words: Any = base.get_input_embeddings()
    how, start = settings["how"], settings["start"]
    like = words.weight
    bridge = Bridge(int(settings["source"]), int(settings["width"]), _embedding_width(base), how, start, like)
    bridge.train(task_model.training)
    task_class: Any = type(task_model)
    consumer.__class__ = _consumer_class(task_class)
    consumer.add_module(_BRIDGE, bridge)
    injected = InjectedRows()
    on_embeddings = _OnEmbeddings(bridge, injected)
    words.register_forward_hook(on_embeddings)
    consumer.__dict__["actcache_injected"], consumer.__dict__["actcache_on_embeddings"] = injected, on_embeddings
    consumer.__dict__["actcache_bridge"] = dict(settings)
    for module in consumer.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module.config, "use_cache"):
            module.config.use_cache = False
    return consumer


@torch.no_grad()
def _prove(consumer: Any, task_model: PreTrainedModel) -> None:
    """Run the consumer once: the rows join the embeddings one time, and from ``"itself"`` nothing else has changed."""
    settings, device = consumer.actcache_bridge, consumer.bridge.mlp[0].weight.device
    ids = torch.from_numpy(some_ids(base_model_of(task_model), 6).reshape(1, -1)).to(device)
    rows = torch.randn(*ids.shape, settings["source"], generator=torch.Generator().manual_seed(0)).to(device)
    if consumer.actcache_task_class.__name__.endswith("ForMultipleChoice"):
        ids, rows = ids[None], rows[None]
    mask = torch.ones_like(ids)
    on_embeddings = consumer.actcache_on_embeddings
    name = type(task_model).__name__
    with evaluating(consumer), evaluating(task_model):
        given = consumer(activations=rows, token_ids=ids, attention_mask=mask)
        if on_embeddings.calls != 1:
            raise UnsupportedModelError(
                f"a {name} calls its embedding matrix {on_embeddings.calls} times for one text: a bridge joins the one "
                "call of a model that embeds its tokens once"
            )
        alone = task_model(input_ids=ids, attention_mask=mask)
    on_embeddings.calls = 0
    first, second = _first_of(given), _first_of(alone)
    if settings["start"] == "itself" and not torch.allclose(first.float(), second.float(), rtol=1e-3, atol=1e-3):
        raise UnsupportedModelError(
            f"a {name} gives other numbers when it is copied: a hook or a forward of its own stands in it"
        )


def _first_of(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else next(iter(output.values()))
    return tensor


@functools.cache
def _consumer_class(task_class: Any) -> Any:  # a class of models, and a subclass of it
    forward = forward_from_rows(task_class, "_consume", _DROPPED, "with a source's stored rows beside its token ids")
    consumer = type(
        f"Consumer{task_class.__name__}",
        (ConsumerModel, task_class),
        {"forward": forward, "actcache_task_class": task_class},
    )
    # transformers finds what a base model can record (output_hidden_states) by its class's qualified name
    consumer.__module__, consumer.__qualname__ = task_class.__module__, task_class.__qualname__
    return consumer


def _new_consumer(task_class: Any) -> PreTrainedModel:
    cls = _consumer_class(task_class)
    consumer: PreTrainedModel = cls.__new__(cls)
    return consumer


def _save(consumer: Any, path: Path, state_dict: Mapping[str, torch.Tensor] | None, *, write: bool) -> None:
    saving.refuse_peft(consumer)
    if kept_of(consumer) is not None:
        raise ModelError("the vocabulary of this consumer model is pruned: Pruned(model).restore() before it is saved")
    config = json.loads(consumer.config.to_json_string(use_diff=False))
    config["dtype"] = dtype_name(consumer.dtype)
    name = consumer.actcache_task_class.__name__
    what = {
        "actcache": "a consumer model: load it with actcache.Recycler(...).load_consumer(folder)",
        "version": VERSION,
        "task_class": name,
        "config": {**config, "architectures": [name]},
        "recipe": consumer.actcache_recipe.to_json(),
        "bridge": consumer.actcache_bridge,
        "buffers": saving.computed_buffers(consumer),
    }
    if not write:
        return
    path.mkdir(parents=True, exist_ok=True)
    state = consumer.state_dict() if state_dict is None else state_dict
    if packed := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise ModelError(f"{packed[0]} of this consumer model is no plain tensor: save it before it is quantized")
    save_file(unshared(state), path / WEIGHTS_NAME, metadata={"format": "pt"})
    (path / DESCRIPTION_NAME).write_text(json.dumps(what, indent=1), encoding="utf-8")


def _read(path: Path) -> tuple[dict[str, Any], Recipe]:
    """Return what a folder says of its consumer model, and the recipe of its source."""
    try:
        what = json.loads((path / DESCRIPTION_NAME).read_text(encoding="utf-8"))
        version = what["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} holds no consumer model: {DESCRIPTION_NAME} is not there or not one ({error})"
        ) from None
    if version != VERSION:
        raise ModelError(f"{path} was written by a newer release (version {version}): update actcache")
    wanted = {"task_class", "config", "recipe", "bridge", "buffers"}
    if not wanted <= what.keys():
        raise ModelError(f"{path / DESCRIPTION_NAME} lacks {', '.join(sorted(wanted - what.keys()))}")
    try:
        return what, Recipe.from_json(what["recipe"])
    except FormatError as error:
        raise ModelError(f"{path / DESCRIPTION_NAME}: {error}") from None

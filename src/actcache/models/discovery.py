"""Discovery: where a transformer has its layers, found by running it once on a few tokens (or a small image or sound).

Layers are modules of one list that are called one after another, each with rows of the same width as the one before
gave. What is found is only where to look: that a model can be cut there is proved (``actcache.models.proof``).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from actcache.errors import UnsupportedModelError
from actcache.models.layouts import Layout
from actcache.models.modes import LeftAsItWas, evaluating
from actcache.models.tensors import without_bytes

_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values")
_BINS = (
    "num_mel_bins",
    "feature_size",
    "input_feat_per_channel",
)  # what configurations call the bands of a spectrogram
_CHANNELS = ("num_channels", "in_channels", "in_chans")
_BATCH, _TOKENS = 2, 7  # two numbers that no model's width is, and that are not alike


@dataclass(frozen=True)
class Stack:
    """A model's list of layers, and what surrounds it. Immutable. Paths are dotted and start at the base model."""

    path: str  # of the model whose forward is run: the encoder of an encoder-decoder, else empty
    runner: str  # of the module whose forward calls the layers
    layers: str  # of the list of layers
    width: int  # columns of a row
    arity: int | None  # of the tuple that a layer returns; None where it returns the bare tensor
    layout: Layout  # how the layers hold rows
    before: tuple[str, ...]  # modules with weights that are called before the first layer, in order
    fillable: tuple[str, ...]  # of these, those that take ids, positions or rows and return ``[batch, tokens, width]``
    words: tuple[str, ...]  # of these, those that look the token ids up
    takes_positions: bool  # the model's forward takes ``position_ids``
    longest: int | None  # tokens that its table of positions has room for
    main_input: str  # the name of what it is given: ``input_ids``, ``pixel_values``, ...


@dataclass
class _Call:
    module: nn.Module
    caller: nn.Module | None
    given: list[torch.Tensor]
    tokens: bool = False  # it was given whole numbers
    result: Any = None
    ended: int = -1  # how many calls had begun when it returned


@dataclass
class _Trace:
    """What a forward called, in order."""

    calls: list[_Call] = field(default_factory=list)
    active: list[_Call] = field(default_factory=list)

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = list(tensors_in([args, kwargs]))
        caller = self.active[-1].module if self.active else None
        call = _Call(module, caller, given, any(not one.is_floating_point() for one in given))
        self.calls.append(call)
        self.active.append(call)

    def end(self, module: nn.Module, args: Any, result: Any) -> None:
        call = self.active.pop()
        call.result, call.ended = result, len(self.calls)


class _Lookups(TorchFunctionMode):
    """Notes which tables are looked up by positions: numbers that count on from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.longest: int | None = None
        self.by_ids: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.embedding:
            ids = args[0] if args else (kwargs or {})["input"]
            table = args[1] if len(args) > 1 else (kwargs or {})["weight"]
            row = ids.detach().reshape(-1, ids.shape[-1])[0] if ids.ndim else ids
            if row.numel() == _TOKENS and bool((row.diff() == 1).all()):
                room = table.shape[0] - int(row[0])
                self.longest = room if self.longest is None else min(self.longest, room)
            else:
                self.by_ids.add(id(table))
        return func(*args, **(kwargs or {}))


def tensors_in(value: Any, depth: int = 3) -> Iterator[torch.Tensor]:
    """Yield the tensors in arguments or results of a module."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif depth and isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, depth - 1)


def find_stack(base_model: PreTrainedModel) -> Stack:
    """Return where a model has its layers. It runs once, for two documents of seven tokens, in eval mode.

    Raises:
        UnsupportedModelError: it does not run so, or has no list of layers that take each other's rows.
    """
    path = encoder_path(base_model)
    run = base_model.get_submodule(path)
    inputs = small_inputs(run)
    trace, lookups = _Trace(), _Lookups()
    hooks = []
    for module in base_model.modules():
        hooks.append(module.register_forward_pre_hook(trace.begin, with_kwargs=True))
        hooks.append(module.register_forward_hook(trace.end))
    try:
        with (
            LeftAsItWas(base_model),
            evaluating(base_model),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            lookups,
        ):
            run(**inputs, **({"use_cache": False} if takes(run, "use_cache") else {}))
    except Exception as error:  # whatever a model's code raises
        if absent := [name for name, parameter in base_model.named_parameters() if parameter.is_meta]:
            raise without_bytes(absent[0]) from error
        what = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UnsupportedModelError(
            f"a {type(base_model).__name__} (model type {base_model.config.model_type!r}) does not run on "
            f"{', '.join(inputs)} alone, so its layers cannot be found: {type(error).__name__}: {what}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return _stack_of(base_model, path, run, trace, lookups, inputs)


def positions_limit(stack: Stack, config: Any) -> int | None:
    """Return how many tokens a model's positions allow, as its table of positions or its configuration says."""
    if stack.main_input != "input_ids":
        return None
    named = None
    for one in (*_text_configs(config), config):
        for name in ("max_position_embeddings", "max_source_positions", "n_positions", "max_seq_len", "n_ctx"):
            value: Any = getattr(one, name, None)
            if named is None and _is_int(value) and value > 0:
                named = int(value)
    known = [one for one in (stack.longest, named) if one is not None]
    return min(known) if known else None


def encoder_path(base_model: PreTrainedModel) -> str:
    """Return where an encoder-decoder has its encoder; empty for what is no encoder-decoder, or only an encoder."""
    if not getattr(base_model.config, "is_encoder_decoder", False):
        return ""
    try:
        encoder = base_model.get_encoder()
    except (AttributeError, NotImplementedError, TypeError):
        return ""
    return next((name for name, module in base_model.named_modules() if module is encoder), "")


def takes(model: Any, name: str) -> bool:
    """Return whether the forward of a module, or of a class of modules, names an argument."""
    return name in inspect.signature(model.forward).parameters


def some_tokens(base_model: Any, lengths: list[int], seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """Return documents of token ids without special meaning, for a model that takes text."""
    vocabulary = vocabulary_of(base_model.config)
    special = set(_special_ids(base_model.config))
    plain = np.array([i for i in range(min(vocabulary, 4096)) if i not in special] or [0])
    rng = np.random.default_rng(seed)
    return [rng.choice(plain, length).astype(np.int64) for length in lengths]


def vocabulary_of(config: Any) -> int:
    """Return how many token ids the model of a configuration (of several kinds of input, too) has."""
    for one in (config, *_text_configs(config)):
        for name in ("vocab_size", "num_embeddings"):
            size = getattr(one, name, None)
            if isinstance(size, int) and size > 0:
                return size
    return 64


def _text_configs(config: Any) -> Iterator[Any]:
    with contextlib.suppress(AttributeError, ValueError, TypeError):
        yield config.get_text_config()
    yield from (value for name, value in vars(config).items() if "text" in name and hasattr(value, "to_dict"))


def _special_ids(config: Any) -> Iterator[int]:
    """Yield the numbers that a configuration calls ids or indices of tokens."""
    for one in (config, *_text_configs(config)):
        for name, value in vars(one).items():
            if name.endswith(("_token_id", "_token_index", "_id", "_index")):
                yield from (number for number in (value if isinstance(value, list) else [value]) if _is_int(number))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def main_input_of(model: Any) -> str:
    """Return the name of what a model is given: token ids where it takes any, else pixels or sounds."""
    names = inspect.signature(model.forward).parameters
    main: str = getattr(model, "main_input_name", "input_ids")
    if main not in names:
        main = next((name for name in _INPUTS if name in names), main)
    return "input_ids" if "input_ids" in names and main not in ("input_values", "input_features") else main


def small_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Return a small batch of two of what a model (or the encoder of one) takes: tokens, pixels, or sounds."""
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    main = main_input_of(model)
    if main == "input_ids":
        ids = torch.from_numpy(np.stack(some_tokens(model, [_TOKENS] * _BATCH)))
        if len(ids.unique()) < 4:
            ids[:, 0] = 1
        return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    config = model.config
    if main == "pixel_values":
        return {main: noise(_BATCH, *image_shape(config))}
    if main == "input_values":
        if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
            return {main: noise(_BATCH, config.max_length, config.num_mel_bins)}
        return {main: noise(_BATCH, 4000)}
    if main == "input_features":
        bins = next(
            (
                getattr(config, n)
                for n in ("num_mel_bins", "feature_size", "input_feat_per_channel")
                if hasattr(config, n)
            ),
            80,
        )
        if hasattr(config, "max_source_positions") and config.model_type.startswith(
            ("whisper", "qwen2_audio", "voxtral")
        ):
            return {main: noise(_BATCH, bins, 2 * config.max_source_positions)}
        return {main: noise(_BATCH, 64, bins)}
    raise UnsupportedModelError(
        f"a {type(model).__name__} takes {main}; recording knows tokens, pixels, sound waves and their features"
    )


def image_shape(config: Any) -> tuple[int, ...]:
    """Return the shape of one image, ``[channels, height, width]``, or with frames first where it takes videos."""
    config = getattr(config, "vision_config", None) or config
    size = getattr(config, "image_size", None)
    if size is None:
        size = getattr(config, "input_size", None) or 64
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = next(
        (n for n in (getattr(config, name, None) for name in ("num_channels", "in_channels", "in_chans")) if n), 3
    )
    frames = getattr(config, "num_frames", None)
    return (*((int(frames),) if frames else ()), int(channels), int(height), int(width))


def _stack_of(
    base_model: PreTrainedModel,
    path: str,
    run: nn.Module,
    trace: _Trace,
    lookups: _Lookups,
    inputs: dict[str, torch.Tensor],
) -> Stack:
    main_input = next(iter(inputs))
    paths = {id(module): name for name, module in base_model.named_modules()}
    first_call: dict[int, int] = {}
    count: dict[int, int] = {}
    for i, call in enumerate(trace.calls):
        first_call.setdefault(id(call.module), i)
        count[id(call.module)] = count.get(id(call.module), 0) + 1
    best: tuple[int, int, nn.Module, list[_Call]] | None = None
    reasons = []
    for module in run.modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        children = list(module)
        if any(id(child) not in first_call for child in children):
            continue
        calls = [trace.calls[first_call[id(child)]] for child in children]
        counts, places = [count[id(child)] for child in children], [first_call[id(child)] for child in children]
        why = _not_a_chain(calls, counts, places, text=main_input == "input_ids")
        if why:
            reasons.append(f"{paths[id(module)]}: {why}")
            continue
        depth = paths[id(module)].count(".")
        weight = sum(p.numel() for p in module.parameters())
        if weight and (best is None or (weight, -depth) > best[:2]):
            best = weight, -depth, module, calls
    if best is None:
        shown = "; ".join(reasons[:3]) or "none is called"
        raise UnsupportedModelError(
            f"a {type(base_model).__name__} (model type {base_model.config.model_type!r}) has no list of layers that "
            f"take one another's rows ({shown}). If it has one, describe it with actcache.models.register_family: see "
            "docs/models.md"
        )
    _, _, layers, calls = best
    first = calls[0]
    layout = _layout_of(trace, calls, text=main_input == "input_ids")
    rows = _given_to(calls[1])
    start = trace.calls.index(first)
    active = _callers(trace, start)
    before = []
    for call in trace.calls[:start]:
        outside = call.caller is not None and id(call.caller) in active and id(call.module) not in active
        if outside and call.ended <= start and call.ended >= 0 and call.module not in before:
            before.append(call.module)
    weighted = [module for module in before if _has_tensors(module)]
    fillable, words = [], []
    for module in weighted:
        call = trace.calls[first_call[id(module)]]
        result = call.result
        if (
            next(module.parameters(), None) is not None
            and isinstance(result, torch.Tensor)
            and result.ndim == 3
            and (result.shape[:2] == rows.shape[:2] or sorted(result.shape[:2]) == [1, max(rows.shape[:2])])
            and any(given.ndim >= 2 for given in call.given)
        ):
            fillable.append(paths[id(module)])
        if any(id(p) in lookups.by_ids for p in module.parameters()) and call.tokens:
            words.append(paths[id(module)])
    result = calls[0].result
    return Stack(
        path=path,
        runner=paths.get(id(first.caller), ""),
        layers=paths[id(layers)],
        width=int(layout.rows_of(rows).shape[-1]),
        arity=len(result) if isinstance(result, tuple | list) else None,
        layout=layout,
        before=tuple(paths[id(module)] for module in weighted),
        fillable=tuple(fillable),
        words=tuple(words),
        takes_positions=takes(run, "position_ids"),
        longest=lookups.longest,
        main_input=main_input,
    )


def _callers(trace: _Trace, start: int) -> set[int]:
    """Return the ids of the modules that were running when a call began."""
    return {id(call.module) for call in trace.calls[:start] if call.ended > start} | {
        id(call.module) for call in trace.calls[:start] if call.ended < 0
    }


def _has_tensors(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _given_to(call: _Call) -> torch.Tensor:
    """Return the rows that a layer was given: the first floating point tensor that may be some."""
    rows = _first_of(call.given)
    assert rows is not None  # or the layers are none
    return rows


def _first_of(given: list[torch.Tensor]) -> torch.Tensor | None:
    floating = [one for one in given if one.is_floating_point()]
    return next((one for dimensions in (3, 4) for one in floating if one.ndim == dimensions), None)


def _result_of(call: _Call) -> Any:
    return call.result[0] if isinstance(call.result, tuple | list) and call.result else call.result


def _not_a_chain(calls: list[_Call], counts: list[int], places: list[int], *, text: bool) -> str | None:
    """Return why some modules are no layers that follow one another; None where they are.

    Of images and sounds the first may take other rows than all give: it halves the grid, or makes it wider.
    """
    if any(count != 1 for count in counts):
        return f"each is called {max(counts)} times"
    if places != sorted(places):
        return "they are not called in their order"
    shapes = set()
    for i, call in enumerate(calls):
        result, given = _result_of(call), _first_of(call.given)
        if given is None or not isinstance(result, torch.Tensor) or (text and given.ndim != 3):
            return f"a {type(call.module).__name__} does not take and return rows [batch, tokens, hidden]"
        shapes |= {tuple(result.shape)} if i == 0 and not text else {tuple(given.shape), tuple(result.shape)}
    if len(shapes) != 1:
        return f"rows change their shape on the way ({', '.join(map(str, sorted(shapes)[:3]))})"
    shape = next(iter(shapes))
    if shape[0] != _BATCH and (shape[1] != _BATCH or len(shape) != 3):
        return f"rows {shape} of {_BATCH} documents are packed"
    if len(shape) not in (3, 4):
        return f"a {type(calls[0].module).__name__} returns {shape}"
    if any(call.ended > later for call, later in zip(calls, places[1:], strict=False)):
        return "they call one another"
    if not text and any(map(_two_streams, calls, calls[1:])):
        return f"a {type(calls[0].module).__name__} changes more than one stream of rows"
    return None


def _two_streams(layer: _Call, following: _Call) -> bool:
    """Return whether a layer hands on more than rows, and the layer after it gives something else in its place."""
    if not isinstance(layer.result, tuple | list) or not isinstance(following.result, tuple | list):
        return False
    pairs = zip(layer.result[1:], following.result[1:], strict=False)
    return any(one is given and one is not other for one, other in pairs for given in following.given)


def _layout_of(trace: _Trace, calls: list[_Call], *, text: bool) -> Layout:
    """Return how layers that follow one another hold rows."""
    rows, given = _given_to(calls[1]), _given_to(calls[0])
    differs = given.shape != rows.shape
    if rows.ndim == 3:
        time_first = text and rows.shape[0] == _TOKENS and rows.shape[1] == _BATCH
        return Layout("time_first" if time_first else "batch_first", first_differs=differs)
    return Layout("channels_first" if _channels_first(trace, calls[1], rows) else "channels_last", None, differs)


def _channels_first(trace: _Trace, layer: _Call, rows: torch.Tensor) -> bool:
    """Return whether the width of a grid's rows comes before its height: by the first weights that a layer applies."""
    start = trace.calls.index(layer)
    for call in trace.calls[start + 1 : max(start + 1, layer.ended)]:
        module, given = call.module, _first_of(call.given)
        if given is None or given.shape != rows.shape:
            continue
        if isinstance(module, nn.Linear):
            return False
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.GroupNorm):
            return True
        if isinstance(module, nn.LayerNorm):
            return module.normalized_shape[-1] != rows.shape[-1]
    return True

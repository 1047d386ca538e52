"""What a forward can read before it comes to a site, wherever it hangs: what its digest has to cover.

The parts that come before are looked through: parameters, buffers of both kinds, tensors that are plain attributes,
packed parameters, extra state. What is read elsewhere (rotary frequencies beside the layers, a steering vector at the
base model) is found by running the model once. Python numbers and hooks are in no digest; canaries are there for them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from actcache.errors import ModelError
from actcache.format.recipe import canonical_json
from actcache.models.families import Family
from actcache.models.lower_half import LowerHalf
from actcache.models.modes import evaluating
from actcache.models.partial_vocabulary import some_ids, whole_state
from actcache.models.processing import Made, sample_features, takes_features
from actcache.models.sites import Site
from actcache.models.tensors import without_bytes
from actcache.models.tokenizing import Encoded

_PROBE_TOKENS = 8
_ROUNDING = 2.0**-21  # four units in the last place of float32: what another processor's pow() differs by


def lower_states(
    base_model: PreTrainedModel, family: Family, sites: Sequence[Site]
) -> dict[Site, list[tuple[str, Any]]]:
    """Return what comes before each of some sites and what that reads elsewhere hold, by unique names.

    The values are what ``weights.leaves`` takes. The model is run once, as far as the last of the sites. A tensor that
    is in no checkpoint and has the value that its module gives it for the model's configuration is left out, for the
    configuration is part of the identity; so processors whose rounding differs find each other's cache.

    Before the output of one of the layers 1..N-1 come the embeddings and those layers, whatever of them runs. Before
    any other site comes what has run to its end when the site is reached; of modules that are still running, what hangs
    at them themselves.

    Raises:
        ModelError: the model cannot be run to see what it reads, or holds what changes when it is saved.
    """
    layers = family.layers_of(base_model)
    parts = {}
    for site in sites:
        if site.layer is not None and 0 < site.layer < len(layers):
            parts[site] = {f"embeddings/{path}": part for path, part in family.beside_of(base_model).items()}
            parts[site] |= {f"layers/{i + 1}": layers[i] for i in range(site.layer)}
            _check_in_place(parts[site])
    # The run comes before what is held is looked at: some modules bring their weights into their final form when they
    # are first used.
    run = _Run(base_model, family, sites)
    for site in sites:
        if site not in parts:
            parts[site] = _ended(base_model, run.before(site))
            _check_in_place(parts[site])
    return {site: list(_state(base_model, family, parts[site], run.before(site))) for site in sites}


def _ended(base_model: PreTrainedModel, before: _Before) -> dict[str, nn.Module]:
    """Return the modules that have run to their end, without those that are parts of others of them."""
    parts: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for path, module in base_model.named_modules():
        if id(module) not in seen and before.ended(module):
            parts[f"modules/{path}"] = module
            seen.update(map(id, module.modules()))
    return parts


def _state(
    base_model: PreTrainedModel, family: Family, parts: Mapping[str, nn.Module], read: _Before
) -> Iterator[tuple[str, Any]]:
    own = {id(module) for part in parts.values() for module in part.modules()}
    own_tensors = {id(tensor) for part in parts.values() for module in part.modules() for tensor in _tensors(module)}
    for prefix, part in parts.items():
        for name, value in whole_state(part):
            yield f"{_plain(prefix)}/{_plain(name)}", value
        for path, module in part.named_modules():
            for name, value in _unsaved(module, base_model, family, read):
                yield f"{_plain(prefix)}/{_plain(f'{path}.{name}' if path else name)}", value
    for path, module in base_model.named_modules():
        if id(module) in own:
            continue
        if read.began(module) or any(read.has(tensor) for tensor in _tensors(module)):
            saved: dict[str, Any] = {}
            module._save_to_state_dict(saved, "", keep_vars=False)
            others = {name: value for name, value in saved.items() if not _is_one_of(module, name, own_tensors)}
            for name, value in [*others.items(), *_unsaved(module, base_model, family, read)]:
                yield f"beside/{_plain(path)}/{name}", value


def covered(base_model: PreTrainedModel, family: Family, site: Site) -> set[int]:
    """Return the ids of the tensors that ``lower_states`` looks at for a site, or that the configuration stands for."""
    read = _Run(base_model, family, [site]).before(site)
    layers = family.layers_of(base_model)
    parts: list[nn.Module] = []
    if site.layer is not None and 0 < site.layer < len(layers):
        parts = [*family.beside_of(base_model).values(), *(layers[i] for i in range(site.layer))]
    own = {id(module) for part in parts for module in part.modules()}
    return {
        id(tensor)
        for module in base_model.modules()
        if id(module) in own or read.began(module) or any(read.has(tensor) for tensor in _tensors(module))
        for tensor in _tensors(module)
    }


def _plain(path: str) -> str:
    """Return a path as it is without ``torch.compile`` around a module."""
    return path.replace("_orig_mod.", "")


def _check_in_place(parts: Mapping[str, nn.Module]) -> None:
    """Refuse weights that are not in memory, and those that change when they are looked at."""
    for path, part in parts.items():
        for name, tensor in itertools.chain(part.named_parameters(), part.named_buffers()):
            if tensor.is_meta:
                raise without_bytes(f"{path}/{name}")
            if type(tensor).__name__ == "Params4bit" and tensor.device.type == "cpu":
                # Measured with bitsandbytes 0.50: a state dict after a forward, and the next forward is another one.
                raise ModelError(
                    f"{path}/{name} of the lower half is a 4-bit weight of bitsandbytes on the CPU, where its "
                    "state_dict() changes the numbers that the layer computes: put the model on a GPU, or "
                    "model.dequantize() it"
                )


class _Run(TorchFunctionMode):
    """What happens when some tokens are computed: when modules (by id) begin and end, when tensors that were there
    before are read, and when each site is reached. Times are whole numbers."""

    def __init__(self, base_model: PreTrainedModel, family: Family, sites: Sequence[Site]) -> None:
        super().__init__()
        self.now = 0
        self.began: dict[int, int] = {}
        self.ended: dict[int, int] = {}
        self.reached: dict[Site, int] = {}
        self.ids: dict[int, int] = {}
        self.memory: dict[tuple[int, int], tuple[int, bool]] = {}  # and whether what lies there was there before
        self._alive: list[torch.Tensor] = []  # so that neither id nor memory is used twice
        lower = LowerHalf(base_model, family, sites[0])
        some: Sequence[Made]
        if takes_features(base_model):
            some = [sample_features(base_model)]
        else:
            ids = some_ids(base_model, _PROBE_TOKENS)[: family.max_tokens(base_model.config)].astype(np.int32)
            some = [Encoded(ids, np.zeros(len(ids), np.int8))]
        try:
            with (
                contextlib.ExitStack() as hooks,
                evaluating(base_model),
                torch.compiler.set_stance("force_eager"),
                self,
            ):
                for module in base_model.modules():
                    hooks.callback(module.register_forward_pre_hook(self._begins).remove)
                    hooks.callback(module.register_forward_hook(self._ends).remove)
                for site in sites:
                    hooks.callback(lower.hook(site, functools.partial(self._reaches, site)).remove)
                lower.run_encoded(some, sites)
        except NotImplementedError as error:  # torch's word for what is done with a tensor without memory
            for path, module in base_model.named_modules():
                for name, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
                    if id(module) in self.began and tensor is not None and tensor.is_meta:
                        raise without_bytes(f"{path}.{name}") from error
            raise

    def before(self, site: Site) -> _Before:
        return _Before(self, self.reached.get(site, self.now + 1))  # the run ended where the last one was reached

    def _tick(self) -> int:
        self.now += 1
        return self.now

    def _begins(self, module: nn.Module, args: Any) -> None:
        self.began.setdefault(id(module), self._tick())

    def _ends(self, module: nn.Module, args: Any, output: Any) -> None:
        self.ended.setdefault(id(module), self._tick())

    def _reaches(self, site: Site, hidden: Any) -> None:
        self.reached.setdefault(site, self._tick())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.now:  # the model does not run yet: somebody asks on which device it is
            return func(*args, **(kwargs or {}))
        self._note([args, kwargs or {}], there_before=True)
        result = func(*args, **(kwargs or {}))
        self._note(result, there_before=False)
        return result

    def _note(self, values: Any, *, there_before: bool) -> None:
        for tensor in _in_containers(values):
            if id(tensor) in self.ids:
                continue
            self.ids[id(tensor)] = self.now
            self._alive.append(tensor)
            if (memory := _memory(tensor)) is not None:
                self.memory.setdefault(memory, (self.now, there_before))


class _Before:
    """What a run had done when it came to a site."""

    def __init__(self, run: _Run, time: int) -> None:
        self._run, self._time = run, time
        self._read = [memory for memory, (when, before) in run.memory.items() if before and when < time]

    def began(self, module: nn.Module) -> bool:
        return self._run.began.get(id(module), self._time) < self._time

    def ended(self, module: nn.Module) -> bool:
        return self._run.ended.get(id(module), self._time) < self._time

    def has(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor, or a part of its memory, was read and had been there before the run."""
        if (here := _memory(tensor)) is None:
            return self._run.ids.get(id(tensor), self._time) < self._time
        return any(first < here[1] and here[0] < last for first, last in self._read)


def _memory(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Return the addresses from the first element of a tensor to behind its last; None where it has no memory."""
    with torch._C.DisableTorchFunction():
        try:
            if tensor.layout != torch.strided or not tensor.numel() or not (first := tensor.data_ptr()):
                return None
            elements = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            return first, first + elements * tensor.element_size()
        except (NotImplementedError, RuntimeError):  # a wrapper has none
            return None


def _in_containers(value: Any, depth: int = 4) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _in_containers(item, depth - 1)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the tensors that hang at a module itself."""
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    yield from (buffer for buffer in module._buffers.values() if buffer is not None)
    for _, value in _attributes(module):
        yield from _in_containers(value)


def _is_one_of(module: nn.Module, name: str, ids: set[int]) -> bool:
    tensor = module._parameters.get(name)
    return id(module._buffers.get(name) if tensor is None else tensor) in ids


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield a module's plain attributes that are tensors, or lists, tuples or dicts that hold some, or packed."""
    # A class that says how it is saved has put what is packed into the state dict.
    says_how = any(
        getattr(type(module), name) is not getattr(nn.Module, name)
        for name in ("_save_to_state_dict", "get_extra_state")
    )
    for name, value in vars(module).items():
        packed = isinstance(value, torch.ScriptObject) and not says_how
        own = name not in ("_parameters", "_buffers", "_modules")  # which are seen for themselves
        may_hold = isinstance(value, torch.Tensor | list | tuple | dict)  # most are numbers
        if own and (packed or (may_hold and next(_in_containers(value), None) is not None)):
            yield name, value


def _unsaved(
    module: nn.Module, base_model: PreTrainedModel, family: Family, read: _Before
) -> Iterable[tuple[str, Any]]:
    """Return what hangs at a module itself and is in no checkpoint, but for what its class makes of configurations.

    Attributes count where they are read: a hook may keep there what it saw, a task model what its loss needs.
    """
    state = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
    found: dict[str, Any] = {name: value for name, value in state.items() if value is not None}
    found |= {
        name: value
        for name, value in _attributes(module)
        if isinstance(value, torch.ScriptObject) or any(read.has(tensor) for tensor in _in_containers(value))
    }
    if not any(isinstance(value, torch.Tensor) for value in found.values()):
        return found.items()
    if (fresh := _fresh(module, base_model.config)) is None:
        return found.items()
    as_made = {name for name, value in found.items() if _equal(value, fresh._buffers.get(name, vars(fresh).get(name)))}
    named = family.numeric_config
    if (
        named is not None
        and "rope_parameters" not in named
        and any(found[name].is_floating_point() for name in as_made)
    ):
        found["rope_parameters"] = canonical_json(getattr(base_model.config, "rope_parameters", None))
    return [(name, value) for name, value in found.items() if name not in as_made]


def _fresh(module: nn.Module, config: Any) -> nn.Module | None:
    """Return a module as its class makes it from a configuration; None where it wants more than that."""
    if type(module).__module__.partition(".")[0] == "torch":
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), no_init_weights():
            fresh = type(module)(config)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, NotImplementedError):
        return None
    return fresh if isinstance(fresh, nn.Module) else None


def _equal(value: Any, made: Any) -> bool:
    if not (isinstance(value, torch.Tensor) and isinstance(made, torch.Tensor)):
        return False
    if type(value) is not torch.Tensor or value.dtype != made.dtype or value.shape != made.shape or value.is_meta:
        return False
    here = value.detach().cpu()
    if value.dtype == torch.float32:
        return bool(torch.isclose(here, made, rtol=_ROUNDING, atol=0.0).all())
    return torch.equal(here, made)

"""The stubs of a reduced model whose documents are images or audio: what stands for its patches, filters and positions.

What comes before the layers of such models is not always one module that returns rows: Whisper has two convolutions
whose results are turned round, wav2vec2 returns a pair. So a stub returns NaN of the shape that its module returned
when the model was run on samples, with the sizes of the batch at hand, and the last pass-through puts in the rows. What
a model makes of NaN elsewhere is seen: by the proof, which then keeps the module, or withholds the output.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from actcache.errors import ModelError, ShapeError, UnsupportedModelError
from actcache.models.families import Family
from actcache.models.lower_half import LowerHalf, first_tensor
from actcache.models.modes import evaluating
from actcache.models.processing import Features, larger, sample_features
from actcache.models.stubs import InjectedRows

_BATCH, _ROWS = "batch", "rows"


@dataclass(frozen=True)
class _Number:
    """What is no tensor, and the same for all batches: the height of a grid."""

    value: int | float | str


#: The shape of a result: sizes, of which some are the batch's; of several, a tuple; None where there was none.
Shape = list[Any] | tuple[Any, ...] | _Number | None


#: What parts returned, by path, and how many rows went into the first layer.
_Results = tuple[dict[str, Any], int]


class FeatureStub(nn.Module):
    """Returns NaN of the shapes that a module returned, for the batch whose rows are injected.

    What a base model reads of the module (a stride, the dtype of a weight) it reads of a copy without numbers.
    """

    nothing: torch.Tensor

    def __init__(self, module: nn.Module, shape: Shape, like: torch.Tensor, injected: InjectedRows) -> None:
        super().__init__()
        self.shape, self.injected = shape, injected
        self.shell = _hollow(module)
        nothing = torch.full((), math.nan, dtype=like.dtype, device=like.device)
        self.register_buffer("nothing", nothing, persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = self.injected.get()[0]
        if rows is None:
            raise ModelError("a reduced model needs activations: call it with **batch.model_inputs()")
        return self._nothing(self.shape, {_BATCH: rows.shape[0], _ROWS: rows.shape[1]})

    def _nothing(self, shape: Shape, sizes: Mapping[str, int]) -> Any:
        if shape is None:
            return None
        if isinstance(shape, tuple):
            return tuple(self._nothing(one, sizes) for one in shape)
        if isinstance(shape, _Number):
            return shape.value
        return self.nothing.expand([sizes.get(size, size) for size in shape])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            shell = self.__dict__.get("_modules", {}).get("shell")
            if shell is None:
                raise
            return getattr(shell, name)


def _hollow(module: nn.Module) -> nn.Module:
    """Return a copy of a module whose tensors have no elements, and are in no state dict."""
    tensors = [*module.parameters(), *module.buffers()]
    hollow = copy.deepcopy(module, {id(tensor): tensor.detach().new_empty(0) for tensor in tensors})
    for part in hollow.modules():
        for name, value in [*part._parameters.items(), *part._buffers.items()]:
            part._parameters.pop(name, None)
            part._buffers.pop(name, None)
            part.register_buffer(name, value, persistent=False)
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        part.__dict__["_load_from_state_dict"] = _loads_nothing  # a BatchNorm asks for a count of batches
    return hollow


def _loads_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands where a module loaded its weights from a state dict that has none of them."""


@dataclass(frozen=True)
class FeatureReplay:
    """How a reduced model's own forward is entered, though there is nothing that it could be given.

    ``rows`` is how many it takes; None for any number. Of rows in a grid it takes one grid: rows tell no shape.
    """

    name: str  # of the model's argument
    shape: tuple[int, ...]  # of one document's features
    rows: int | None
    grid: tuple[int, int] | None = None  # height and width of the grid in which the upper layers take the rows

    def inputs(self, activations: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what stands for a batch's features; it takes no memory."""
        zero = torch.zeros((), dtype=activations.dtype, device=activations.device)
        return {self.name: zero.expand(activations.shape[0], *self.shape)}


def feature_stubs(
    base: PreTrainedModel, family: Family, layer: int, like: torch.Tensor, injected: InjectedRows
) -> tuple[dict[int, nn.Module], FeatureReplay]:
    """Return the stubs for what comes before the layers, by its id, and how the reduced model is entered.

    The model is run twice, as far as its first layer, to see what its parts return.

    Raises:
        UnsupportedModelError: a part returns what rows alone do not tell the shape of.
        ModelError: the model does not run on features of the shape that its configuration names.
    """
    lower = LowerHalf(base, family, layer)
    sample = sample_features(base, family.input_shape)
    parts = family.embeddings_of(base)
    one_size = family.one_size or family.layout.is_grid or family.layout.first_differs
    with evaluating(base):
        first = _results(lower, parts, [sample] * 2)
        try:
            shapes = None if one_size else _shapes(first, _results(lower, parts, [larger(sample)] * 3), base)
        except (ModelError, UnsupportedModelError):  # it takes features of one shape, or rows alone do not tell theirs
            shapes = None
        one_size = shapes is None
        if shapes is None:
            shapes = _shapes(first, _results(lower, parts, [sample] * 3), base)
        grid = _grid(lower, sample) if family.layout.is_grid else None
    stubs: dict[int, nn.Module] = {
        id(parts[path]): FeatureStub(parts[path], shapes[path], like, injected) for path in parts
    }
    return stubs, FeatureReplay(sample.name, sample.values.shape, first[1] if one_size else None, grid)


def _shapes(first: _Results, second: _Results, base: PreTrainedModel) -> dict[str, Shape]:
    """Return the shapes of what parts returned for two documents, and for three of another size perhaps."""
    return {path: _shape_of(first[0][path], second[0][path], first[1], second[1], path, base) for path in first[0]}


def _grid(lower: LowerHalf, sample: Features) -> tuple[int, int]:
    """Return the height and width of the grid of rows that the last layer of the lower half gives."""
    found: list[torch.Tensor] = []
    assert lower.site.layer is not None
    last = lower.family.layers_of(lower.base_model)[lower.site.layer - 1]
    handle = last.register_forward_hook(lambda module, args, result: found.append(first_tensor(result)))
    try:
        lower.rows_of(lower.feature_inputs(sample))
    finally:
        handle.remove()
    height, width = found[0].shape[2:] if lower.family.layout.order == "channels_first" else found[0].shape[1:3]
    return int(height), int(width)


def check_lengths(activations: torch.Tensor, attention_mask: torch.Tensor | None, features: FeatureReplay) -> None:
    """Refuse rows that the model was not proved to take: these models have no padding."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ShapeError(
            "the batch holds documents of several lengths, and a model of images or audio takes one length at a time: "
            "make the reader with equal_lengths=True, as recycler.reader does"
        )
    if features.rows not in (None, activations.shape[-2]):
        raise ShapeError(
            f"the model takes {features.rows} rows of a document, not {activations.shape[-2]}: its upper layers depend "
            "on the size of what the lower ones read"
        )


def _results(lower: LowerHalf, parts: Mapping[str, nn.Module], samples: list[Features]) -> _Results:
    """Return what some parts returned for a batch, by path, and how many rows went into the first layer."""
    found: dict[str, Any] = {}
    hooks = [
        part.register_forward_hook(lambda module, args, result, path=path: found.setdefault(path, result))
        for path, part in parts.items()
    ]
    try:
        rows = lower.count_rows(*samples)
    finally:
        for hook in hooks:
            hook.remove()
    return found, rows


def _shape_of(first: Any, second: Any, rows: int, other_rows: int, path: str, base: PreTrainedModel) -> Shape:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor) and first.ndim == second.ndim:
        return [_size(*sizes, rows, other_rows, path, base) for sizes in zip(first.shape, second.shape, strict=True)]
    if isinstance(first, tuple | list) and isinstance(second, tuple | list) and len(first) == len(second):
        pairs = zip(first, second, strict=True)
        return tuple(_shape_of(one, two, rows, other_rows, path, base) for one, two in pairs)
    if first is None and second is None:
        return None
    if isinstance(first, int | float | str) and first == second:
        return _Number(first)
    raise _unknown(base, path, f"a {type(first).__name__}")


def _size(first: int, second: int, rows: int, other_rows: int, path: str, base: PreTrainedModel) -> Any:
    if first == second:
        return first
    if (first, second) == (2, 3):
        return _BATCH
    if (first, second) == (rows, other_rows):
        return _ROWS
    raise _unknown(base, path, f"something whose size is neither the batch's nor that of the rows ({first}, {second})")


def _unknown(base: PreTrainedModel, path: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the part {path!r} of a {type(base).__name__} returns {what}, which cannot be made of rows: its activations "
        "can be stored and read, but it has no reduced model"
    )

"""Recording: run the lower half of a model and take the rows that go into layer k+1."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from actcache.errors import ModelError, UsageError
from actcache.format.arguments import is_whole
from actcache.models.families import Family
from actcache.models.partial_vocabulary import vocabulary_size
from actcache.models.processing import Features, Made
from actcache.models.stubs import rows_in
from actcache.models.tensors import dtype_name, first_parameter, padded
from actcache.models.tokenizing import Encoded

TOKEN_BUDGET = 8192  # padded tokens of a batch, where the caller says nothing else


class _Reached(Exception):
    """Ends the forward pass at layer k+1, whose input it carries."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class LowerHalf:
    """Layers 1..``layer`` of a base model in eval mode, as a function from token ids to rows.

    It uses the model as it is, with its own forward: weights that change later change the numbers. Not thread-safe.

    Args:
        compute_dtype: ``float32``, ``float16``, ``bfloat16`` or ``float64``; None for the dtype of the parameters.
            Where it differs from that, the lower half runs under autocast.

    Raises:
        LayerError: ``layer`` is not in 1..N-1.
        ModelError: autocast cannot compute in ``compute_dtype``.
        UnsupportedModelError: a document's rows would depend on the others of its batch.
    """

    def __init__(
        self, base_model: PreTrainedModel, family: Family, layer: int, compute_dtype: str | None = None
    ) -> None:
        layer = family.check_layer(base_model, layer)
        family.check_alone(base_model.config)
        self.base_model, self.family, self.layer = base_model, family, layer
        self._stack = family.stack_of(base_model)
        self._takes = set(inspect.signature(self._stack.forward).parameters)
        self.parameter_dtype = dtype_name(first_parameter(family.layers_of(base_model)[0]).dtype)
        self.compute_dtype = compute_dtype or self.parameter_dtype
        known = self.parameter_dtype, "bfloat16", "float16"
        if not isinstance(self.compute_dtype, str) or self.compute_dtype not in known:  # NumPy's dtypes equal names
            raise ModelError(
                f"the weights are {self.parameter_dtype}, and autocast cannot compute in {self.compute_dtype}: load "
                f"the model with dtype=torch.{self.compute_dtype}"
            )

    @property
    def hidden_size(self) -> int:
        return self.family.width_of(self.base_model)

    @property
    def device(self) -> torch.device:
        return first_parameter(self.family.layers_of(self.base_model)[0]).device

    def marks(self) -> tuple[tuple[int, ...], ...]:
        """Return what changes when weights or hooks of the lower half do, cheap to compare.

        What is written past autograd's eyes (``parameter.data``, memory shared with NumPy) does not show.
        """
        parts = self.family.lower_of(self.base_model, self.layer).values()
        modules = [self.base_model, *(module for part in parts for module in part.modules())]
        return tuple(
            (
                id(module),
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                *(
                    number
                    for tensor in itertools.chain(module._parameters.values(), module._buffers.values())
                    if tensor is not None
                    for number in (id(tensor), 0 if tensor.is_inference() else tensor._version)
                ),
            )
            for module in modules
        )

    def run(
        self, token_ids: Sequence[NDArray[np.integer]], type_ids: Sequence[NDArray[np.integer]] | None = None
    ) -> list[NDArray[np.generic]]:
        """Return the rows of some documents, computed as one padded batch but as if each were alone.

        Args:
            token_ids: one ``[tokens]`` array per document, special tokens included, none empty.
            type_ids: token type ids of the same lengths; None where they are all 0.

        Returns:
            One ``[tokens, hidden]`` array per document, float32, or float16 or float64 where it computes in that. They
            are views of one array, in the caller's order.

        Raises:
            ModelError: the lower half is in train mode, so its dropout would be stored.
        """
        return self.run_at((), token_ids, type_ids)[self.layer]

    def run_at(
        self,
        layers: Iterable[int],
        token_ids: Sequence[NDArray[np.integer]],
        type_ids: Sequence[NDArray[np.integer]] | None = None,
    ) -> dict[int, list[NDArray[np.generic]]]:
        """Return the rows of ``layer`` and of layers below it, by layer, from one forward; else as ``run``."""
        self._check_evaluating()
        if not token_ids:
            return {layer: [] for layer in (*layers, self.layer)}
        if self.family.equal_lengths and len({len(ids) for ids in token_ids}) > 1:
            return self._run_by_length(list(layers), token_ids, type_ids)
        lengths = torch.tensor([len(ids) for ids in token_ids], device="cpu")
        padding = getattr(self.base_model.config, "pad_token_id", None) or 0
        if not 0 <= padding < vocabulary_size(self.base_model):
            padding = 0
        # Padding comes after the tokens, so that positions (RoBERTa counts them over ids that are not the padding id,
        # in a lone document too) are what they are without it.
        inputs = {
            "input_ids": padded(token_ids, padding),
            "attention_mask": (torch.arange(int(lengths.max()), device="cpu") < lengths[:, None]).long(),
        }
        if "token_type_ids" in self._takes and type_ids is not None and any(ids.any() for ids in type_ids):
            inputs["token_type_ids"] = padded(type_ids, 0)
        device = self.device
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        tokens = inputs["attention_mask"].bool()
        found: dict[int, torch.Tensor] = {}
        with self._taking({layer for layer in layers if layer != self.layer}, tokens, found):
            found[self.layer] = self._forward(inputs)[tokens]
        ends = np.cumsum(lengths.numpy())[:-1]
        return {layer: list(np.split(_to_numpy(rows), ends)) for layer, rows in found.items()}

    def run_encoded(self, entries: Sequence[Made], layers: Iterable[int] = ()) -> dict[int, list[NDArray[np.generic]]]:
        """Return the rows of some entries, as an encoder made them: by ``run_at`` or ``run_features``."""
        if entries and isinstance(entries[0], Features):
            return self.run_features([one for one in entries if isinstance(one, Features)], layers)
        texts = [one for one in entries if isinstance(one, Encoded)]
        ids, types = [one.token_ids for one in texts], [one.type_ids for one in texts]
        others = set(layers) - {self.layer}
        return self.run_at(others, ids, types) if others else {self.layer: self.run(ids, types)}

    def run_features(
        self, features: Sequence[Features], layers: Iterable[int] = ()
    ) -> dict[int, list[NDArray[np.generic]]]:
        """Return the rows of images or audio at ``layer`` and at layers below it, by layer, from one forward.

        Args:
            features: all of one shape, so that nothing is padded. Rows are patches or frames.

        Raises:
            ModelError: see ``run``; or the model does not take such features, or makes fewer or more rows of them.
        """
        self._check_evaluating()
        if not features:
            return {layer: [] for layer in (*layers, self.layer)}
        inputs = self.feature_inputs(*features)
        found: dict[int, torch.Tensor] = {}
        with self._taking({layer for layer in layers if layer != self.layer}, None, found):
            found[self.layer] = self._forward(inputs)
        expected = (len(features), features[0].length)
        for rows in found.values():
            if expected[1] and tuple(rows.shape[:2]) != expected:
                raise ModelError(
                    f"{type(self.base_model).__name__} makes {list(rows.shape[:2])} rows of {expected[0]} documents of "
                    f"{expected[1]} rows: what goes into a layer is not [batch, rows, hidden]"
                )
        return {layer: list(_to_numpy(rows)) for layer, rows in found.items()}

    def count_rows(self, *features: Features) -> int:
        """Return how many rows a document with such features puts into the layers; their values do not matter.

        Raises:
            ModelError: the model does not take features of that shape.
        """
        self._check_evaluating()
        try:
            hidden = self._forward(self.feature_inputs(*features), 0)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            given = f"{features[0].name} {list(features[0].values.shape)}"
            said = str(error).strip().partition("\n")[0]
            raise ModelError(f"{type(self.base_model).__name__} does not take {given}: {said}") from None
        return int(hidden.shape[1])

    def feature_inputs(self, *features: Features) -> dict[str, Any]:
        """Return what the model is called with, of features of one shape."""
        name, values = features[0].name, np.stack([one.values for one in features])
        inputs: dict[str, Any] = {name: torch.from_numpy(values).to(self.device, getattr(torch, self.parameter_dtype))}
        if "interpolate_pos_encoding" in self._takes:
            size = getattr(self.base_model.config, "image_size", None)
            native = tuple(size) if isinstance(size, list | tuple) else (size, size)
            inputs["interpolate_pos_encoding"] = values.shape[-2:] != native
        return inputs

    def _check_evaluating(self) -> None:
        lower = self.family.lower_of(self.base_model, self.layer)
        training = [path for path, part in lower.items() if any(module.training for module in part.modules())]
        if self.base_model.training or training:
            where = training[0] if training else "the base model"
            raise ModelError(
                f"{where} of {type(self.base_model).__name__} is in train mode, so dropout would be recorded: call "
                "model.eval() first"
            )

    def _run_by_length(
        self,
        layers: list[int],
        token_ids: Sequence[NDArray[np.integer]],
        type_ids: Sequence[NDArray[np.integer]] | None,
    ) -> dict[int, list[NDArray[np.generic]]]:
        """Return the rows of a model whose numbers padding changes: documents of one length at a time."""
        found: dict[int, list[Any]] = {layer: [None] * len(token_ids) for layer in (*layers, self.layer)}
        for length in {len(ids): None for ids in token_ids}:
            places = [i for i, ids in enumerate(token_ids) if len(ids) == length]
            types = None if type_ids is None else [type_ids[i] for i in places]
            for layer, arrays in self.run_at(layers, [token_ids[i] for i in places], types).items():
                for i, rows in zip(places, arrays, strict=True):
                    found[layer][i] = rows
        return found

    @contextlib.contextmanager
    def _taking(self, layers: set[int], tokens: torch.Tensor | None, found: dict[int, torch.Tensor]) -> Iterator[None]:
        """Put copies of the rows of some layers into ``found`` when a forward comes to them; of ``tokens`` alone."""

        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, layer: int) -> None:
            hidden = self._input_of(args, kwargs)
            found[layer] = hidden.clone() if tokens is None else hidden[tokens]

        with contextlib.ExitStack() as hooks:
            for layer in layers:
                self.family.check_layer(self.base_model, layer)
                following = self.family.layers_of(self.base_model)[layer]
                hook = functools.partial(take, layer=layer)
                hooks.callback(following.register_forward_pre_hook(hook, prepend=True, with_kwargs=True).remove)
            yield

    def rows_of(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the rows ``[batch, tokens, hidden]`` of a batch of whatever the model takes, by its names."""
        return self._forward(inputs)

    def _forward(self, inputs: dict[str, Any], layer: int | None = None) -> torch.Tensor:
        """Return what goes into the layer after ``layer``, by default this half's own."""

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(self._input_of(args, kwargs))

        next_layer = self.family.layers_of(self.base_model)[self.layer if layer is None else layer]
        # Before the model's own hooks there, which replay will run.
        handle = next_layer.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
        try:
            # Autocast is always entered: an ambient one would otherwise decide the numbers.
            with torch.inference_mode(), self._autocast():
                self._stack(**inputs, **({"use_cache": False} if "use_cache" in self._takes else {}))
        except _Reached as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise ModelError(f"the forward pass of {type(self.base_model).__name__} never reached layer {self.layer + 1}")

    def _input_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """Return the rows ``[batch, tokens, hidden]`` that a layer is called with."""
        rows = rows_in(args, kwargs)
        return rows.transpose(0, 1) if self.family.time_first else rows

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        kind = self.device.type
        if self.compute_dtype == self.parameter_dtype:
            return torch.autocast(kind, enabled=False)
        return torch.autocast(kind, dtype=getattr(torch, self.compute_dtype))


def plan_batches(lengths: Sequence[int] | NDArray[np.integer], token_budget: int) -> list[NDArray[np.int64]]:
    """Cut documents into batches that compute little padding.

    Documents are taken in descending order of length (ties in the caller's order), so that what needs the most memory
    comes first. A batch holds ``count * longest <= token_budget`` padded tokens; a document above the budget is alone.

    Returns:
        Arrays of positions in ``lengths``, each position in exactly one.

    Raises:
        UsageError: the budget is no whole number of 1 or more.
    """
    check_token_budget(token_budget)
    tokens = np.asarray(lengths, np.int64)
    order = np.argsort(-tokens, kind="stable")
    batches, start = [], 0
    while start < len(order):
        count = max(1, token_budget // max(1, int(tokens[order[start]])))
        batches.append(order[start : start + count])
        start += count
    return batches


def plan_encoded(entries: Sequence[Made], token_budget: int) -> list[NDArray[np.int64]]:
    """Cut entries into batches as ``plan_batches`` does; features of one shape alone share a batch."""
    shapes: dict[tuple[int, ...] | None, list[int]] = {}
    for i, entry in enumerate(entries):
        shapes.setdefault(entry.values.shape if isinstance(entry, Features) else None, []).append(i)
    batches = []
    for members in shapes.values():
        positions = np.array(members, np.int64)
        lengths = [entries[i].length for i in members]
        batches += [positions[batch] for batch in plan_batches(lengths, token_budget)]
    return batches


def check_token_budget(token_budget: Any) -> int:
    """Return the padded tokens of a batch as Python's own number; raises ``UsageError``."""
    if not is_whole(token_budget) or token_budget < 1:
        raise UsageError(f"a token budget of {token_budget!r} computes nothing; it is a whole number, by default 8192")
    return int(token_budget)


def _to_numpy(rows: torch.Tensor) -> NDArray[np.generic]:
    rows = rows.cpu()
    if rows.dtype == torch.bfloat16:  # NumPy has none; float32 holds it exactly
        rows = rows.float()
    array: NDArray[np.generic] = rows.numpy()
    return array

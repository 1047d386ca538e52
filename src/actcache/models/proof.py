"""Proof: that a model can be cut where it is about to be cut, shown on the caller's own instance before it is done.

Rows are proved before anything is stored: the same batch twice, documents alone and in company, a document at full
length beside a tiny one, and weights that the digest does not cover made unusable. Replay is proved before a model is
reduced: without its lower weights, from rows of documents that were computed alone, with anything at padding, it has
the full model's outputs, rows and gradients. What is not proved is refused, with what failed and by how much.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from actcache.errors import ActcacheError, UnsupportedModelError
from actcache.models.discovery import small_inputs, some_tokens, takes
from actcache.models.families import Family, base_model_of
from actcache.models.lower_half import LowerHalf
from actcache.models.modes import evaluating
from actcache.models.processing import larger, sample_features

logger = logging.getLogger(__name__)

#: The largest relative error that another batch shape explains, by compute dtype (L2, of all numbers of a document).
TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "float16": 5e-3, "bfloat16": 2e-2}
_LENGTHS = (5, 11, 3, 8)
_EQUAL = (6, 6, 6)
_DECODED = 3  # tokens that an encoder-decoder's decoder is given
_GRADIENT_NUMBERS = 1 << 20  # of a parameter whose gradients are compared

#: What a model's code, or a stub in it, raises where something is missing.
_RAISED = (ActcacheError, RuntimeError, AttributeError, TypeError, ValueError, LookupError, AssertionError, ImportError)

#: Makes a reduced model that uses a task model's own weights.
Build = Callable[[PreTrainedModel, Family, int], PreTrainedModel]


class _NotProved(Exception):
    """One way to cut does not give the model's numbers; says what failed."""


def of_rows(lower: LowerHalf, longest: int | None = None) -> Family:
    """Return the family with what recording has to observe, once the rows of a lower half are proved.

    Args:
        longest: tokens of the longest document that may be recorded.

    Raises:
        UnsupportedModelError: its rows are no function of a document alone.
    """
    family = lower.family
    if family.found is None or family.found.main_input != "input_ids":
        return family
    start = time.monotonic()
    base = lower.base_model
    tolerance = TOLERANCE[lower.compute_dtype]
    with evaluating(base), _Unchanged(base):
        documents = some_tokens(base, _fitting(_LENGTHS, family, base))
        alone = [lower.run([one])[0] for one in documents]
        _compare("a document computed twice", alone, [lower.run([one])[0] for one in documents], 0.0, base)
        error = _largest(alone, lower.run(documents))
        if not error <= tolerance:
            equal = some_tokens(base, _fitting(_EQUAL, family, base), seed=1)
            rows = [lower.run([one])[0] for one in equal]
            _compare("documents of one length alone and in a batch", rows, lower.run(equal), tolerance, base)
            logger.info(
                "padding changes the rows of %s (%.2g): documents of one length are computed together",
                type(base).__name__,
                error,
            )
            family = replace(family, equal_lengths=True)
    logger.info("rows of %s at %s are proved in %.2f s", type(base).__name__, lower.site, time.monotonic() - start)
    return family


def of_replay(task_model: PreTrainedModel, family: Family, layer: int, build: Build) -> Family:
    """Return the family with what of the lower half a reduced model has to keep, once its replay is proved.

    Args:
        build: makes a reduced model that uses the task model's own weights.

    Raises:
        UnsupportedModelError: no way of replaying gives the full model's numbers.
    """
    if family.found is None:
        return family
    base = base_model_of(task_model)
    layer = family.check_layer(base, layer)
    start = time.monotonic()
    with evaluating(task_model), _Unchanged(task_model):
        proof = _Replay(task_model, family, layer, build)
        found = proof.proved()
    logger.info(
        "replay of %s from layer %d is proved in %.2f s (%s)",
        type(task_model).__name__,
        layer + 1,
        time.monotonic() - start,
        _described(found),
    )
    return replace(found, proved=True)


def ways(family: Family) -> Iterator[Family]:
    """Yield how a model may be replayed, what keeps least of its lower half first."""
    found = family.found
    assert found is not None
    before = found.before
    # What stands for images or sounds can return anything of a known shape; ids are embedded in one step.
    all_before = () if found.main_input == "input_ids" else (found.before,)
    stubs = [*all_before, found.fillable, tuple(path for path in found.fillable if path in found.words), ()]
    for first_layer_runs in (False, True):
        for stubbed in dict.fromkeys(stubs):
            if first_layer_runs and (found.arity or 1) < 2:
                continue
            shared = tuple(path for path in before if path not in stubbed)
            yield replace(family, embeddings=stubbed, shared=shared, first_layer_runs=first_layer_runs)


class _Replay:
    """The proof of one task model's replay from one layer."""

    def __init__(self, task_model: PreTrainedModel, family: Family, layer: int, build: Build) -> None:
        self.model, self.family, self.layer, self.build = task_model, family, layer, build
        self.base = base_model_of(task_model)
        self.lower = LowerHalf(self.base, family, layer)
        self.tolerance = 4 * TOLERANCE[self.lower.compute_dtype]
        self.last = family.layers_of(self.base)[-1]
        self.text = family.found is not None and family.found.main_input == "input_ids"

    def proved(self) -> Family:
        reasons: list[str] = []
        for equal in (False, True) if self.text else (True,):
            if self.family.equal_lengths and not equal:
                continue
            reference = self._reference(equal)
            for way in ways(self.family):
                way = replace(way, equal_lengths=equal and self.text)
                try:
                    self._try(way, reference, "right")
                except _NotProved as error:
                    if str(error) not in reasons:
                        reasons.append(str(error))
                    continue
                if not self.text:
                    return self._of_sizes(way)
                if equal:
                    return way
                try:
                    self._try(way, reference, "left")
                except _NotProved:
                    if way.positions_in_layers:
                        try:
                            way = replace(way, positions_in_layers=False)
                            self._try(way, reference, "right")
                            self._try(way, reference, "left")
                            return way
                        except _NotProved:
                            pass
                    return replace(way, positions_in_layers=self.family.positions_in_layers, right_padding=True)
                return way
        raise UnsupportedModelError(
            f"a {type(self.model).__name__} (model type {self.base.config.model_type!r}) cannot be replayed after "
            f"layer {self.layer}: without its lower half it does not give its own numbers. What was tried: "
            f"{'; '.join(reasons[:4])}. Another layer, or attn_implementation='eager', may do"
        )

    def _reference(self, equal: bool) -> list[_Alone]:
        """Compute what each document is alone."""
        if not self.text:
            return [self._of_other_input(small_inputs(self.lower._stack))]
        lengths = _fitting(_EQUAL if equal else _LENGTHS, self.family, self.base)
        return [self._alone(ids) for ids in some_tokens(self.base, lengths, seed=2)]

    def _of_sizes(self, way: Family) -> Family:
        """Return a way with whether it holds for images or sounds of another size, too."""
        other = larger(sample_features(self.base))
        try:
            reference = [self._of_other_input(self.lower.feature_inputs(other, other))]
            self._try(way, reference, "right")
        except (_NotProved, *_RAISED):  # by the full model, which takes one size
            return replace(way, one_size=True)
        return way

    def _of_other_input(self, inputs: dict[str, Any]) -> _Alone:
        rows = self.lower.rows_of(inputs).clone()
        outputs, last = self._outputs(self.model, inputs)
        return _Alone(np.zeros(0, np.int64), rows, outputs, last, inputs)

    def _alone(self, ids: NDArray[np.int64]) -> _Alone:
        rows = torch.from_numpy(np.array(self.lower.run([ids])[0])).to(self.lower.device)
        inputs = self._inputs([ids], "right")
        outputs, last = self._outputs(self.model, inputs)
        return _Alone(ids, rows, outputs, last, {})

    def _inputs(self, documents: Sequence[NDArray[np.int64]], side: str) -> dict[str, Any]:
        longest = max(map(len, documents))
        ids = torch.zeros((len(documents), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, one in enumerate(documents):
            place = slice(None, len(one)) if side == "right" else slice(longest - len(one), None)
            ids[i, place], mask[i, place] = torch.from_numpy(one), 1
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if getattr(self.model.config, "is_encoder_decoder", False) and takes(self.model, "decoder_input_ids"):
            inputs["decoder_input_ids"] = torch.full((len(documents), _DECODED), 3, dtype=torch.long)
        return {name: value.to(self.lower.device) for name, value in inputs.items()}

    def _outputs(
        self, model: PreTrainedModel, inputs: dict[str, Any], gradients: bool = False
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Run a full or reduced model; return its outputs by name, and the rows that its last layer returned."""
        seen: list[torch.Tensor] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            rows = output[0] if isinstance(output, tuple | list) else output
            seen.append(rows.transpose(0, 1) if self.family.time_first else rows)

        last = self.family.layers_of(base_model_of(model))[-1]
        handle = last.register_forward_hook(note)
        extra = {"use_cache": False} if model is self.model and takes(model, "use_cache") else {}
        try:
            with torch.set_grad_enabled(gradients):
                output = model(**inputs, **extra)
        finally:
            handle.remove()
        if not seen:
            raise _NotProved("the last layer was never reached")
        return named_outputs(output), seen[-1]

    def _try(self, way: Family, reference: list[_Alone], side: str) -> None:
        """Compare a reduced model of one kind with the full one; raises ``_NotProved``."""
        try:
            reduced = self.build(self.model, way, self.layer)
            inputs, mask = self._batch(reference, side)
            outputs, last = self._outputs(reduced, inputs)
        except (
            ActcacheError,
            RuntimeError,
            AttributeError,
            TypeError,
            ValueError,
            LookupError,
            NotImplementedError,
        ) as error:
            raise _NotProved(f"{_described(way)}: {type(error).__name__}: {_line(error)}") from error
        what = f"{_described(way)}, padded on the {side}"
        for i, one in enumerate(reference):
            if not self.text:
                self._same(what, last, one.last)
                for name in one.outputs.keys() & outputs.keys():
                    self._same(f"{what}: {name}", outputs[name], one.outputs[name])
                continue
            there = mask[i].bool()
            self._same(what, last[i][there], one.last[0])
            for name in one.outputs.keys() & outputs.keys():
                got, want = outputs[name], one.outputs[name]
                per_token = want.ndim > 1 and want.shape[1] == len(one.ids) and got.shape[:2] == mask.shape
                if got.shape[0] != len(reference) or want.shape[0] != 1:
                    continue
                if per_token:
                    self._same(f"{what}: {name}", got[i][there], want[0])
                elif side == "right" and got.shape[1:] == want.shape[1:]:
                    self._same(f"{what}: {name}", got[i], want[0])

    def _batch(self, reference: list[_Alone], side: str) -> tuple[dict[str, Any], torch.Tensor]:
        """Return a reduced model's inputs: rows of documents that were computed alone, and anything at padding."""
        if not self.text:
            one = reference[0]
            return {"activations": one.rows, **one.inputs}, torch.zeros(0)
        inputs = self._inputs([one.ids for one in reference], side)
        mask = inputs["attention_mask"]
        generator = torch.Generator().manual_seed(4)
        noise = torch.randn((*mask.shape, reference[0].rows.shape[-1]), generator=generator)
        rows = noise.to(mask.device, reference[0].rows.dtype)
        for i, one in enumerate(reference):
            rows[i][mask[i].bool()] = one.rows
        inputs["activations"], inputs["token_ids"] = rows, inputs.pop("input_ids")
        return inputs, mask

    def _same(self, what: str, got: torch.Tensor, want: torch.Tensor) -> None:
        if got.shape != want.shape:
            raise _NotProved(f"{what}: {list(got.shape)} instead of {list(want.shape)}")
        error = relative(want, got)
        if not error <= self.tolerance:
            raise _NotProved(f"{what}: relative error {error:.2g}")


class _Alone:
    """What one document is by itself."""

    def __init__(
        self,
        ids: NDArray[np.int64],
        rows: torch.Tensor,
        outputs: dict[str, torch.Tensor],
        last: torch.Tensor,
        inputs: dict[str, torch.Tensor],
    ) -> None:
        self.ids, self.rows, self.outputs, self.last, self.inputs = ids, rows, outputs, last, inputs


def named_outputs(output: Any) -> dict[str, torch.Tensor]:
    """Return the floating point tensors of a model's outputs by name."""
    items = output.items() if hasattr(output, "items") else ((str(i), one) for i, one in enumerate(output))
    return {str(name): value for name, value in items if isinstance(value, torch.Tensor) and value.is_floating_point()}


def relative(want: torch.Tensor, got: torch.Tensor) -> float:
    """Return the relative error of some numbers (L2)."""
    there, here = want.detach().double(), got.detach().double()
    error = float((here - there).norm()) / (float(there.norm()) or 1.0)
    return math.inf if math.isnan(error) else error


def _largest(want: Sequence[NDArray[Any]], got: Sequence[NDArray[Any]]) -> float:
    return max(relative(torch.tensor(a), torch.tensor(b)) for a, b in zip(want, got, strict=True))


def _compare(what: str, want: Sequence[Any], got: Sequence[Any], tolerance: float, base: PreTrainedModel) -> None:
    error = _largest(want, got)
    if not error <= tolerance:
        raise UnsupportedModelError(
            f"the rows of a {type(base).__name__} (model type {base.config.model_type!r}) are no function of a "
            f"document: {what} has rows {error:.2g} apart. They cannot be stored"
        )


def _fitting(lengths: Sequence[int], family: Family, base: PreTrainedModel) -> list[int]:
    longest = family.max_tokens(base.config) or max(lengths)
    return [min(length, longest) for length in lengths]


class _Unchanged:
    """Puts back what running a model changes on it, and refuses a model that running changes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.before = {id(module): (module, _scalars(module)) for module in self.model.modules()}

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        changed = []
        for module, values in self.before.values():
            for name, value in _scalars(module).items():
                if name in values and values[name] != value:
                    changed.append(f"{type(module).__name__}.{name} from {values[name]!r} to {value!r}")
                    setattr(module, name, values[name])
        if changed and kind is None:
            raise UnsupportedModelError(
                f"running this {type(self.model).__name__} changes it, so that its numbers depend on what it ran on "
                f"before: {'; '.join(changed[:3])}"
            )


def _scalars(module: nn.Module) -> dict[str, Any]:
    return {n: v for n, v in vars(module).items() if isinstance(v, bool | int | float | str) and n != "training"}


def _described(way: Family) -> str:
    kept = [*way.shared, *(("layer 1 for what it returns beside rows",) if way.first_layer_runs else ())]
    return f"keeping {', '.join(kept)}" if kept else "without any lower weights"


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:160]

"""Proof: that a model can be cut where it is about to be cut, shown on the caller's own instance before it is done.

Rows are proved before anything is stored: the same batch twice, documents alone and in company, a document at full
length beside a tiny one, and weights that the digest does not cover made unusable. Replay is proved before a model is
reduced: without its lower weights, from rows of documents that were computed alone, with anything at padding, it has
the full model's outputs, rows and gradients. What is not proved is refused, with what failed and by how much.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from actcache.errors import ActcacheError, UnsupportedModelError
from actcache.format.recipe import canonical_json
from actcache.io.cached import cached_property
from actcache.models import memo
from actcache.models.canary import TOLERANCE as CANARY_TOLERANCE
from actcache.models.canary import relative_error
from actcache.models.discovery import some_tokens, takes
from actcache.models.families import Family, base_model_of, way_in, way_of
from actcache.models.lower_half import LowerHalf
from actcache.models.lower_state import covered
from actcache.models.modes import LeftAsItWas, evaluating
from actcache.models.processing import Made, larger, sample_features
from actcache.models.sites import Site

logger = logging.getLogger(__name__)

#: The largest relative error that another batch shape explains, by compute dtype (L2, of all numbers of a document).
TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "float16": 5e-3, "bfloat16": 2e-2}
_LENGTHS = (5, 11, 3, 8)
_EQUAL = (6, 6, 6)
_MANY = 96  # documents of eight tokens in one batch
_LONGEST = 1024  # tokens of the long document where nothing says how long documents may be
_OPERATIONS = 2 * 10**11  # tokens times weights that a long document may cost on a CPU: a few seconds
_MEMO, _VERSION = "proofs", 2
_proofs: dict[str, Any] = {}  # what was proved in this process
_DECODED = 3  # tokens that an encoder-decoder's decoder is given
_GRADIENT_NUMBERS = 1 << 20  # of a parameter whose gradients are compared
_GRADIENT_TOLERANCE = 10  # times that of outputs: a gradient is the sum of what all tokens give

#: What a model's code, or a stub in it, raises where something is missing.
_RAISED = (ActcacheError, RuntimeError, AttributeError, TypeError, ValueError, LookupError, AssertionError, ImportError)

#: Makes a reduced model that uses a task model's own weights.
Build = Callable[[PreTrainedModel, Family, int], PreTrainedModel]


class _NotProved(Exception):
    """One way to cut does not give the model's numbers; says what failed."""


def of_rows(lower: LowerHalf, longest: int | None = None, sites: Collection[Site] = ()) -> Family:
    """Return the family with what recording has to observe, once the rows of a lower half are proved.

    Args:
        longest: tokens of the longest document that may be recorded.
        sites: of the model that are recorded together with this one: they are proved by the same runs, once.

    Raises:
        UnsupportedModelError: its rows are no function of a document alone, or of more weights than the digest covers.
    """
    family = lower.family
    if family.found is None:
        return family
    sites = list(dict.fromkeys([lower.site, *sites]))
    keys = {site: _key("rows", lower.base_model, str(site), [lower.compute_dtype, longest]) for site in sites}
    known = _remembered(keys[lower.site])
    if known is not None:
        return replace(family, equal_lengths=known["equal_lengths"])
    sites = [site for site in sites if keys[site] is None or _remembered(keys[site]) is None]
    start = time.monotonic()
    base = lower.base_model
    with evaluating(base), LeftAsItWas(base) as left:
        try:
            if family.found.main_input == "input_ids":
                family = _rows_proved(lower, longest, sites)
            else:
                _features_proved(lower, sites)
        except (ActcacheError, torch.OutOfMemoryError):
            raise
        except _RAISED as error:  # by the model's own code
            raise UnsupportedModelError(
                f"a {type(base).__name__} (model type {base.config.model_type!r}) does not run on documents alone and "
                f"in padded batches, as its proof and a fill run it: {type(error).__name__}: {_line(error)}"
            ) from error
    if left.changed:
        raise UnsupportedModelError(
            f"running this {type(base).__name__} on a few tokens changes it, so that what it computes depends on what "
            f"it ran on before: {'; '.join(left.changed[:3])} (it was put back). Configure the model so that it has "
            "one way of computing"
        )
    where, seconds = ", ".join(map(str, sites)), time.monotonic() - start
    logger.info("the rows of %s at %s are proved in %.2f s", type(base).__name__, where, seconds)
    for site in sites:
        _remember(keys[site], {"equal_lengths": family.equal_lengths})
    return family


def _rows_proved(lower: LowerHalf, longest: int | None, sites: Sequence[Site]) -> Family:
    base, family, tolerance = lower.base_model, lower.family, TOLERANCE[lower.compute_dtype]

    def rows_of(documents: Sequence[NDArray[np.int64]]) -> list[list[NDArray[Any]]]:
        """Compute documents together; return of each its rows at the sites."""
        found = lower.run_at(sites, documents)
        return [list(of_one) for of_one in zip(*(found[site] for site in sites), strict=True)]

    documents = some_tokens(base, _fitting(_LENGTHS, family, base))
    long = _long_lengths(lower, longest)
    # These come first: some models take another way for good once they have met a short document.
    apart = [some_tokens(base, [length], seed=length)[0] for length in long]
    apart_alone = [rows_of([one])[0] for one in apart]
    alone = [rows_of([one])[0] for one in documents]
    _compare("a document computed twice", alone, [rows_of([one])[0] for one in documents], 0.0, base)
    error = _largest(alone, rows_of(documents))
    if not error <= tolerance:
        equal = some_tokens(base, _fitting(_EQUAL, family, base), seed=1)
        rows = [rows_of([one])[0] for one in equal]
        _compare("documents of one length alone and in a batch", rows, rows_of(equal), tolerance, base)
        logger.info(
            "padding changes the rows of %s (%.2g): documents of one length are computed together",
            type(base).__name__,
            error,
        )
        family = lower.family = replace(family, equal_lengths=True)
    for one, of_one in zip(apart, apart_alone, strict=True):
        together = rows_of([one, documents[0]])
        what = f"a document of {len(one)} tokens beside one of {len(documents[0])}"
        _compare(what, [of_one, alone[0]], together, tolerance, base, "max_length= may keep documents below that")
    many = some_tokens(base, _fitting([8] * _MANY, family, base), seed=3)
    some = [0, _MANY // 2, _MANY - 1]
    together = rows_of(many)
    _compare(
        f"a document among {_MANY}",
        [rows_of([many[i]])[0] for i in some],
        [together[i] for i in some],
        tolerance,
        base,
        "has its attention or its experts room for so many tokens a batch?",
    )
    for i, site in enumerate(sites):
        with _unusable(base, covered(base, family, site)):
            rows = [lower.run_at([site], documents[:1])[site]]
        _compare("a document without the weights that are in no digest", [[alone[0][i]]], rows, 0.0, base)
    return family


def _features_proved(lower: LowerHalf, sites: Sequence[Site]) -> None:
    """Prove the rows of images or sounds: twice, alone and in company, and without what no digest covers."""
    base, family, tolerance = lower.base_model, lower.family, TOLERANCE[lower.compute_dtype]
    sample = sample_features(base)
    generator = np.random.default_rng(5)
    documents = [replace(sample, values=generator.standard_normal(sample.values.shape, np.float32)) for _ in range(3)]
    for site in sites:  # which may have other numbers of rows than one another
        alone = [lower.run_features([one], [site])[site] for one in documents]
        again = [lower.run_features([one], [site])[site] for one in documents]
        _compare("a document computed twice", alone, again, 0.0, base)
        together = [[rows] for rows in lower.run_features(documents, [site])[site]]
        _compare("documents alone and in a batch", alone, together, 4 * tolerance, base)  # convolutions add up more
        with _unusable(base, covered(base, family, site)):
            rows = [lower.run_features(documents[:1], [site])[site]]
        _compare("a document without the weights that are in no digest", alone[:1], rows, 0.0, base)


def in_company(lower: LowerHalf, entries: Sequence[Made], computed: Sequence[Any], seed: int) -> None:
    """Compare a document of a batch that was computed, chosen at random, with what it is alone.

    Raises:
        UnsupportedModelError: they differ by more than other kernels explain.
    """
    if len(entries) < 2:
        return
    shortest = min(range(len(entries)), key=lambda i: entries[i].length)
    for i in {shortest, int(np.random.default_rng(seed).integers(len(entries)))}:
        alone = lower.run_encoded([entries[i]])[lower.site][0]
        error = relative_error(alone, computed[i])
        if not error <= CANARY_TOLERANCE[lower.compute_dtype]:
            raise UnsupportedModelError(
                f"a document of {entries[i].length} rows has others alone than in a batch with {len(entries) - 1} more "
                f"(relative error {error:.2g}): this {type(lower.base_model).__name__} looks at its batch, so its "
                "rows cannot be stored. token_budget=1 computes each document alone, max_length= may keep documents "
                "below the length where another way of computing begins"
            )


def of_replay(task_model: PreTrainedModel, family: Family, layer: int, build: Build) -> Family:
    """Return the family with what of the lower half a reduced model has to keep, once its replay is proved.

    Args:
        build: makes a reduced model that uses the task model's own weights.

    Raises:
        UnsupportedModelError: no way of replaying gives the full model's numbers.
    """
    if family.found is None:
        return family
    layer = family.check_layer(base_model_of(task_model), layer)
    if "MultipleChoice" in type(task_model).__name__:  # which computes each choice by its base model, and scores it
        task_model = base_model_of(task_model)
    key = _key("replay", task_model, layer, [family.input_shape])
    known = _remembered(key)
    if known is not None:
        return way_of(family, known)
    start = time.monotonic()
    with evaluating(task_model), LeftAsItWas(task_model):
        found = replace(_Replay(task_model, family, layer, build).proved(), proved=True)
    logger.info(
        "replay of %s from layer %d is proved in %.2f s (%s)",
        type(task_model).__name__,
        layer + 1,
        time.monotonic() - start,
        _described(found),
    )
    _remember(key, way_in(found))
    return found


def _key(what: str, model: PreTrainedModel, where: int | str, more: list[Any]) -> str | None:
    """Return the name under which a proof is remembered; None where it is of this very model only."""
    modules = list(model.modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    if any(getattr(module, name) for module in modules for name in hooks):
        return None
    if any("forward" in vars(module) for module in modules):  # somebody has put another in its place
        return None
    kinds = [f"{type(module).__module__}.{type(module).__qualname__}" for module in modules]
    text = canonical_json(
        [
            [
                what,
                _VERSION,
                transformers.__version__,
                torch.__version__,
                where,
                str(model.dtype),
                str(model.device.type),
            ],
            str(getattr(model.config, "_attn_implementation", None)),
            model.config.to_json_string(use_diff=False),
            kinds,
            [list(parameter.shape) for parameter in model.parameters()],
            more,
        ]
    )
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _remembered(key: str | None) -> Any:
    if key is None:
        return None
    if key not in _proofs and (known := memo.read(_MEMO).get(key)) is not None:
        _proofs[key] = known
    return _proofs.get(key)


def _remember(key: str | None, value: Any) -> None:
    if key is not None:
        _proofs[key] = value
        memo.write(_MEMO, memo.read(_MEMO) | {key: value})


def _long_lengths(lower: LowerHalf, longest: int | None) -> list[int]:
    """Return lengths at which a model may compute otherwise: the longest, and what its configuration names."""
    longest = min(longest or _LONGEST, lower.family.max_tokens(lower.base_model.config) or _LONGEST)
    numbers = sum(parameter.numel() for parameter in lower.base_model.parameters())
    affordable = (_OPERATIONS if lower.device.type == "cpu" else 300 * _OPERATIONS) // max(1, numbers)
    config = lower.base_model.config
    thresholds = [
        value + 1
        for values in (vars(config), getattr(config, "rope_parameters", None) or {})
        for name, value in values.items()
        if isinstance(value, int) and any(word in name for word in ("position", "window", "block", "chunk", "length"))
    ]
    wanted = {min(longest, affordable), *(n for n in thresholds if n <= min(longest, affordable))}
    return sorted((n for n in wanted if n > max(_LENGTHS)), reverse=True)[:3]


@contextlib.contextmanager
def _unusable(model: nn.Module, kept: set[int]) -> Iterator[None]:
    """Let a model's floating point tensors be NaN that are not kept. Takes no memory; they come back at the end."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    plain = tensor is not None and type(tensor) in (torch.Tensor, nn.Parameter)
                    if tensor is None or not plain or id(tensor) in kept or not tensor.is_floating_point():
                        continue
                    before.append((tensors, name, tensor))
                    nan = torch.full((), math.nan, dtype=tensor.dtype, device=tensor.device)
                    nothing: Any = nan.expand(tensor.shape)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(nothing, requires_grad=False) if is_parameter else nothing
        yield
    finally:
        for tensors, name, tensor in before:
            tensors[name] = tensor


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
        self._absent: set[str] = set()  # outputs of the lower half that the way at hand does not give

    def proved(self) -> Family:
        reasons: list[str] = []
        for equal in (False, True) if self.text else (True,):
            if self.family.equal_lengths and not equal:
                continue
            try:
                reference = self._reference(equal)
            except ActcacheError:
                raise
            except _RAISED as error:
                raise UnsupportedModelError(
                    f"a {type(self.model).__name__} (model type {self.base.config.model_type!r}) does not run on its "
                    f"main input alone, so its replay cannot be proved: {type(error).__name__}: {_line(error)}"
                ) from error
            for way in ways(self.family):
                way = replace(way, equal_lengths=equal and self.text)
                try:
                    self._try(way, reference, "right")
                    self._learns(way, reference)
                except _NotProved as error:
                    if str(error) not in reasons:
                        reasons.append(str(error))
                    continue
                if not self.text:
                    return self._of_sizes(replace(way, withheld=tuple(self._withheld(way, reference[0]))))
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
            sample = sample_features(self.base, self.family.input_shape)
            other = replace(sample, values=np.ascontiguousarray(sample.values[..., ::-1]))
            return [self._of_other_input(self.lower.feature_inputs(sample, other))]
        lengths = _fitting(_EQUAL if equal else _LENGTHS, self.family, self.base)
        return [self._alone(ids) for ids in some_tokens(self.base, lengths, seed=2)]

    def _of_sizes(self, way: Family) -> Family:
        """Return a way with whether it holds for images or sounds of another size, too."""
        other = larger(sample_features(self.base, self.family.input_shape))
        try:
            reference = [self._of_other_input(self.lower.feature_inputs(other, other))]
            self._try(way, reference, "right")
        except (_NotProved, *_RAISED):  # by the full model, which takes one size
            return replace(way, one_size=True)
        return way

    @cached_property
    def _of_the_lower_half(self) -> set[str]:
        """Names of the full model's outputs that stay what they are, bit for bit, whatever goes into layer k+1."""
        inputs = self._reference(equal=True)[0].inputs
        outputs, _ = self._outputs(self.model, inputs)

        def reverse(layer: Any, args: Any, output: Any) -> Any:
            rows = output[0] if isinstance(output, tuple | list) else output
            other = rows.flip(0) + rows.abs().mean()
            return other if rows is output else type(output)([other, *output[1:]])

        handle = self.family.layers_of(self.base)[self.layer - 1].register_forward_hook(reverse)
        try:
            others, _ = self._outputs(self.model, inputs)
        finally:
            handle.remove()
        return {name for name in outputs.keys() & others.keys() if torch.equal(outputs[name], others[name])}

    def _withheld(self, way: Family, one: _Alone) -> Iterator[str]:
        """Yield the outputs that a reduced model of some kind cannot give: those of the lower half, as wav2vec2's
        ``extract_features``, and hidden states and attentions of stages that it does not run."""
        yield from sorted({name.partition(".")[0] for name in self._absent})
        for option in ("hidden_states", "attentions"):
            asked = {f"output_{option}": True}
            try:
                with torch.no_grad():
                    want = self.model(**one.inputs, **asked).get(option)
            except _RAISED:
                continue
            if want is None:
                continue
            try:
                with torch.no_grad():
                    got = self.build(self.model, way, self.layer)(**self._batch([one], "right")[0], **asked)[option]
                for i, (here, there) in enumerate(zip(got, want, strict=True)):
                    if here.numel():
                        self._same(f"{option} {i}", here, there)
            except (_NotProved, *_RAISED) as error:
                logger.info("a reduced %s gives no %s (%s)", type(self.model).__name__, option, _line(error))
                yield option

    def _of_other_input(self, inputs: dict[str, Any]) -> _Alone:
        rows = self.lower.rows_of(inputs).clone()
        inputs = inputs | self._decoded(len(rows))
        outputs, last = self._outputs(self.model, inputs)
        return _Alone(np.zeros(0, np.int64), rows, outputs, last, inputs)

    def _decoded(self, documents: int) -> dict[str, torch.Tensor]:
        """Return what the decoder of an encoder-decoder is given."""
        if not getattr(self.model.config, "is_encoder_decoder", False) or not takes(self.model, "decoder_input_ids"):
            return {}
        return {"decoder_input_ids": torch.full((documents, _DECODED), 3, device=self.lower.device)}

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
        return {name: value.to(self.lower.device) for name, value in inputs.items()} | self._decoded(len(documents))

    def _outputs(self, model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Run a full or reduced model; return its outputs by name, and the rows that its last layer returned."""
        seen: list[torch.Tensor] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            rows = output[0] if isinstance(output, tuple | list) else output
            seen.append(self.family.layout.rows_of(rows))

        last = self.family.layers_of(base_model_of(model))[-1]
        handle = last.register_forward_hook(note)
        extra = {"use_cache": False} if model is self.model and takes(model, "use_cache") else {}
        try:
            with torch.no_grad():
                output = model(**inputs, **extra)
        finally:
            handle.remove()
        if not seen:
            raise _NotProved("the last layer was never reached")
        return named_outputs(output, in_tuples=not self.text), seen[-1]

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
                self._absent = set()
                for name in one.outputs:
                    try:
                        self._same(f"{what}: {name}", outputs.get(name), one.outputs[name])
                    except _NotProved:
                        if name not in self._of_the_lower_half:
                            raise
                        self._absent.add(name)
                if self._absent and self._absent == one.outputs.keys():
                    raise _NotProved(f"{what}: all outputs are of the lower half")
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

    def _learns(self, way: Family, reference: list[_Alone]) -> None:
        """Compare the loss of a task head, and what it does to the upper layers; raises ``_NotProved``.

        Of a head whose loss needs more than labels by a usual name, outputs alone are compared.
        """
        one = reference[0]
        full = self._inputs([one.ids], "right") if self.text else one.inputs
        labels = next(self._labels(one, full), None)
        if labels is None:
            return
        what = f"{_described(way)}: the loss"
        try:
            reduced = self.build(self.model, way, self.layer)
            upper = self._compared(reduced)
            start = {"activations": one.rows, **one.inputs}
            if self.text:
                start = self._batch([one], "right")[0]
            got = self._loss(reduced, {**start, **labels}, upper)
        except _RAISED as error:
            raise _NotProved(f"{what}: {type(error).__name__}: {_line(error)}") from error
        want = self._loss(self.model, {**full, **labels}, upper)
        self._same(what, got[0], want[0])
        size = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in want[1].values()))
        for name, gradient in want[1].items():
            # Of what hardly moves (the bias of keys does not at all), all is rounding.
            apart = float((got[1].get(name, torch.zeros_like(gradient)) - gradient).double().norm())
            if not apart <= _GRADIENT_TOLERANCE * self.tolerance * max(float(gradient.double().norm()), 1e-2 * size):
                raise _NotProved(f"{what}'s gradient of {name}: {apart / (size or 1.0):.2g} of all gradients")

    def _labels(self, one: _Alone, full: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
        """Yield labels of which the full model makes a loss."""
        places = torch.ones(1, dtype=torch.long, device=self.lower.device)
        wanted: list[dict[str, torch.Tensor]] = []
        if takes(self.model, "start_positions"):
            wanted.append({"start_positions": places, "end_positions": places})
        elif takes(self.model, "labels"):
            logits = next((value for value in one.outputs.values() if value.ndim >= 2), places[None])
            known = places * int(logits.shape[-1] > 1)
            wanted += [{"labels": known}, {"labels": known.float()}]
            if logits.ndim >= 3:
                wanted[:0] = [{"labels": known.expand(1, logits.shape[1])}, {"labels": known[None]}]
        for labels in wanted:
            try:
                loss, gradients = self._loss(self.model, {**full, **labels}, self._compared(self.model))
            except _RAISED:
                continue
            if bool(torch.isfinite(loss)) and gradients:
                yield labels

    def _compared(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Return the parameters of upper layers and head whose gradients are compared, by name: none that is large."""
        lower = self.family.lower_of(self.base, self.layer).values()
        below = {id(parameter) for part in lower for parameter in part.parameters()}
        return {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and id(parameter) not in below and parameter.numel() <= _GRADIENT_NUMBERS
        }

    def _loss(
        self, model: PreTrainedModel, inputs: dict[str, Any], parameters: dict[str, nn.Parameter]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return a model's loss, and its gradients of parameters by name; no ``.grad`` is touched."""
        extra = {"use_cache": False} if model is self.model and takes(model, "use_cache") else {}
        with torch.enable_grad():
            loss = model(**inputs, **extra).loss
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return loss.detach(), {name: one for name, one in zip(parameters, found, strict=True) if one is not None}

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

    def _same(self, what: str, got: torch.Tensor | None, want: torch.Tensor) -> None:
        if got is None:
            raise _NotProved(f"{what}: it is not there")
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


def named_outputs(output: Any, *, in_tuples: bool = False) -> dict[str, torch.Tensor]:
    """Return the floating point tensors of a model's outputs by name; of tuples of them as ``name.0``, ..."""
    items = list(output.items() if hasattr(output, "items") else ((str(i), one) for i, one in enumerate(output)))
    if in_tuples:
        tuples = [(name, value) for name, value in items if isinstance(value, tuple)]
        items += [(f"{name}.{i}", one) for name, value in tuples for i, one in enumerate(value)]
    return {str(name): value for name, value in items if isinstance(value, torch.Tensor) and value.is_floating_point()}


def relative(want: torch.Tensor, got: torch.Tensor) -> float:
    """Return the relative error of some numbers (L2)."""
    there, here = want.detach().double(), got.detach().double()
    error = float((here - there).norm()) / (float(there.norm()) or 1.0)
    return math.inf if math.isnan(error) else error


def _largest(want: Sequence[Sequence[NDArray[Any]]], got: Sequence[Sequence[NDArray[Any]]]) -> float:
    """Return the largest relative error of documents' rows, each at some sites."""
    pairs = [pair for of_one in zip(want, got, strict=True) for pair in zip(*of_one, strict=True)]
    return max(relative(torch.tensor(a), torch.tensor(b)) for a, b in pairs)


def _compare(
    what: str, want: Sequence[Any], got: Sequence[Any], tolerance: float, base: PreTrainedModel, hint: str = ""
) -> None:
    error = _largest(want, got)
    if not error <= tolerance:
        raise UnsupportedModelError(
            f"the rows of a {type(base).__name__} (model type {base.config.model_type!r}) are no function of a "
            f"document: {what} has rows {error:.2g} apart. They cannot be stored"
            f"{'; ' + hint if hint else ''}"
        )


def _fitting(lengths: Sequence[int], family: Family, base: PreTrainedModel) -> list[int]:
    longest = family.max_tokens(base.config) or max(lengths)
    return [min(length, longest) for length in lengths]


def _described(way: Family) -> str:
    kept = [*way.shared, *(("layer 1 for what it returns beside rows",) if way.first_layer_runs else ())]
    return f"keeping {', '.join(kept)}" if kept else "without any lower weights"


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:160]

"""Recording: run a model as far as a site and take the rows there."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from actcache.errors import ModelError, UnsupportedModelError, UsageError
from actcache.format import arguments
from actcache.format.arguments import is_whole
from actcache.io.cached import cached_property
from actcache.models.families import Family
from actcache.models.modes import evaluating
from actcache.models.partial_vocabulary import some_ids, vocabulary_size
from actcache.models.processing import Features, Made, sample_features, takes_features
from actcache.models.sites import Site, Where, site_of
from actcache.models.stubs import rows_in
from actcache.models.tensors import dtype_name, first_parameter, padded, without_bytes
from actcache.models.tokenizing import Encoded

TOKEN_BUDGET = 8192  # padded tokens of a batch, where the caller says nothing else


class _Reached(Exception):
    """Ends the forward pass where the last of some sites is reached."""


class LowerHalf:
    """What comes before a site of a base model, in eval mode, as a function from token ids to rows.

    It uses the model as it is, with its own forward: weights that change later change the numbers. Not thread-safe.

    Args:
        where: the number of a layer, ``"last"``, the path of a module, or a ``Site``; see ``actcache.models.sites``.
        compute_dtype: ``float32``, ``float16``, ``bfloat16`` or ``float64``; None for the dtype of the parameters.
            Where it differs from that, the lower half runs under autocast.

    Attributes:
        site: where rows are taken. ``"last"`` is the module that gives what the model gives, where there is one.

    Raises:
        LayerError: the model has no such layer or module.
        ModelError: autocast cannot compute in ``compute_dtype``.
        UnsupportedModelError: a document's rows would depend on the others of its batch.
    """

    def __init__(
        self, base_model: PreTrainedModel, family: Family, where: Where, compute_dtype: str | None = None
    ) -> None:
        site = site_of(base_model, family, where)
        family.check_alone(base_model.config)
        self.base_model, self.family = base_model, family
        self._stack = family.stack_of(base_model)
        self._takes = set(inspect.signature(self._stack.forward).parameters)
        self.parameter_dtype = dtype_name(first_parameter(family.layers_of(base_model)[0]).dtype)
        self.compute_dtype = arguments.dtype_name(compute_dtype) if compute_dtype else self.parameter_dtype
        known = self.parameter_dtype, "bfloat16", "float16"
        if not isinstance(self.compute_dtype, str) or self.compute_dtype not in known:  # NumPy's dtypes equal names
            raise ModelError(
                f"the weights are {self.parameter_dtype}, of which autocast computes in float16 and bfloat16, not in "
                f"{self.compute_dtype}: for another, load the model with dtype=torch.{self.compute_dtype}"
            )
        if site == Site(""):
            site = self._last()
        self.site = site
        self._company: _Company | None = None  # while it computes together with others of the model

    @property
    def device(self) -> torch.device:
        first = first_parameter(self.family.layers_of(self.base_model)[0])
        if first.is_meta:
            raise without_bytes(next(name for name, one in self.base_model.named_parameters() if one is first))
        return first.device

    def marks(self) -> tuple[tuple[int, ...], ...]:
        """Return what changes when weights or hooks of the lower half do, cheap to compare.

        What is written past autograd's eyes (``parameter.data``, memory shared with NumPy) does not show.
        """
        modules = [self.base_model, *(module for part in self._parts(self.site).values() for module in part.modules())]
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
        return self.run_at([self.site], token_ids, type_ids)[self.site]

    def run_last(
        self, rows: int, token_ids: Sequence[NDArray[np.integer]], type_ids: Sequence[NDArray[np.integer]]
    ) -> list[NDArray[np.generic]]:
        """Return so many rows of each document at most, the last ones; else as ``run``, or see ``together``."""
        if self._company is not None:
            return self._company.last(self, rows, token_ids, type_ids)
        return [array[-rows:] for array in self.run(token_ids, type_ids)]

    def run_at(
        self,
        sites: Iterable[Site],
        token_ids: Sequence[NDArray[np.integer]],
        type_ids: Sequence[NDArray[np.integer]] | None = None,
    ) -> dict[Site, list[NDArray[np.generic]]]:
        """Return the rows at some sites of the model, of one forward that ends at the last of them; else as ``run``."""
        sites = list(sites)
        for site in sites:
            self._check_evaluating(site)
        if not token_ids:
            return {site: [] for site in sites}
        if self.family.equal_lengths and len({len(ids) for ids in token_ids}) > 1:
            return self._run_by_length(sites, token_ids, type_ids)
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
        found = self._forward(inputs, sites, inputs["attention_mask"].bool().to(self.device))
        ends = np.cumsum(lengths.numpy())[:-1]
        return {site: list(np.split(_to_numpy(found[site]), ends)) for site in sites}

    def _run_by_length(
        self,
        sites: list[Site],
        token_ids: Sequence[NDArray[np.integer]],
        type_ids: Sequence[NDArray[np.integer]] | None,
    ) -> dict[Site, list[NDArray[np.generic]]]:
        """Return the rows of a model whose numbers padding changes: documents of one length at a time."""
        found: dict[Site, list[Any]] = {site: [None] * len(token_ids) for site in sites}
        for length in {len(ids): None for ids in token_ids}:
            places = [i for i, ids in enumerate(token_ids) if len(ids) == length]
            types = None if type_ids is None else [type_ids[i] for i in places]
            for site, arrays in self.run_at(sites, [token_ids[i] for i in places], types).items():
                for i, rows in zip(places, arrays, strict=True):
                    found[site][i] = rows
        return found

    def rows_of(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the rows ``[batch, tokens, hidden]`` of a batch of whatever the model takes, by its names."""
        return self._forward(inputs, [self.site], None)[self.site]

    def run_encoded(
        self, entries: Sequence[Made], sites: Collection[Site] = ()
    ) -> dict[Site, list[NDArray[np.generic]]]:
        """Return the rows of some entries, as an encoder made them, at some sites, by default this one's: by ``run``,
        ``run_at`` or ``run_features``."""
        if entries and isinstance(entries[0], Features):
            return self.run_features([one for one in entries if isinstance(one, Features)], sites)
        texts = [one for one in entries if isinstance(one, Encoded)]
        ids, types = [one.token_ids for one in texts], [one.type_ids for one in texts]
        if list(sites) in ([], [self.site]):
            return {self.site: self.run(ids, types)}
        return self.run_at(sites, ids, types)

    def run_features(
        self, features: Sequence[Features], sites: Collection[Site] = ()
    ) -> dict[Site, list[NDArray[np.generic]]]:
        """Return the rows of images or audio at some sites, by default this one's, from one forward.

        Args:
            features: all of one shape, so that nothing is padded. Rows are patches or frames.

        Raises:
            ModelError: see ``run``; or the model makes fewer or more rows of them than they say.
        """
        sites = sites or [self.site]
        for site in sites:
            self._check_evaluating(site)
        if not features:
            return {site: [] for site in sites}
        found = self._forward(self.feature_inputs(*features), sites, None)
        expected = (len(features), features[0].length)
        for site, rows in found.items():
            if expected[1] and tuple(rows.shape[:2]) != expected:
                raise ModelError(
                    f"{site} of {type(self.base_model).__name__} has {rows.shape[1]} rows of a document, and others "
                    f"that are recorded with it have {expected[1]}: record it by itself"
                )
        return {site: list(_to_numpy(rows)) for site, rows in found.items()}

    def count_rows(self, *features: Features) -> int:
        """Return how many rows a document with such features makes at this site; their values do not matter.

        Raises:
            ModelError: the model does not take features of that shape.
        """
        # As many go into the first layer as come out of any, or else into the second.
        first = min(self.site.layer or 0, int(self.family.layout.first_differs))
        site = self.site if self.site.layer is None else site_of(self.base_model, self.family, first)
        self._check_evaluating(site)
        try:
            rows = self._forward(self.feature_inputs(*features), [site], None)[site]
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            given = f"{features[0].name} {list(features[0].values.shape)}"
            said = str(error).strip().partition("\n")[0]
            raise ModelError(f"{type(self.base_model).__name__} does not take {given}: {said}") from None
        return int(rows.shape[1])

    def feature_inputs(self, *features: Features) -> dict[str, Any]:
        """Return what the model is called with, of features of one shape."""
        name, values = features[0].name, np.stack([one.values for one in features])
        inputs: dict[str, Any] = {name: torch.from_numpy(values).to(self.device, getattr(torch, self.parameter_dtype))}
        if "interpolate_pos_encoding" in self._takes:
            size = getattr(self.base_model.config, "image_size", None)
            native = tuple(size) if isinstance(size, list | tuple) else (size, size)
            inputs["interpolate_pos_encoding"] = values.shape[-2:] != native
        return inputs

    def _parts(self, site: Site) -> dict[str, nn.Module]:
        """Return the modules that run before a site, or more, by path."""
        if site.layer is None:
            return {self.family.stack: self._stack}
        return self.family.lower_of(self.base_model, site.layer)

    def _check_evaluating(self, site: Site) -> None:
        parts = self._parts(site)
        training = [path for path, part in parts.items() if any(module.training for module in part.modules())]
        if self.base_model.training or training:
            where = training[0] if training and training[0] else "the base model"
            raise ModelError(
                f"{where} of {type(self.base_model).__name__} is in train mode, so dropout would be recorded: call "
                "model.eval() first"
            )

    def _forward(
        self, inputs: dict[str, Any], sites: Collection[Site], tokens: torch.Tensor | None
    ) -> dict[Site, torch.Tensor]:
        """Run the model as far as the last of some sites; return the rows ``[all tokens, width]`` at each.

        ``tokens`` ``[batch, tokens]`` is False where there is padding; with None they are ``[batch, rows, width]``.
        """
        inputs = {name: one.to(self.device) if isinstance(one, torch.Tensor) else one for name, one in inputs.items()}
        found: dict[Site, torch.Tensor] = {}

        def reached(site: Site, hidden: Any) -> None:
            if site not in found:
                self._check_rows(site, hidden, None if tokens is None else tokens.shape)
                found[site] = hidden.clone() if tokens is None else hidden[tokens]  # the model may go on in place
            if len(found) == len(sites):
                raise _Reached

        with contextlib.ExitStack() as stack:
            for site in sites:
                stack.callback(self.hook(site, functools.partial(reached, site)).remove)
            if any(site.layer is None for site in sites):  # within what was compiled no hook is called
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            with contextlib.suppress(_Reached):
                self._run_stack(inputs)
        missed = [str(site.name) for site in sites if site not in found]
        if missed:
            raise UnsupportedModelError(
                f"the forward pass of {type(self.base_model).__name__} never reached {', '.join(missed)}: rows are "
                "taken where all tokens come by"
            )
        return found

    def _run_stack(self, inputs: dict[str, Any]) -> Any:
        # Autocast is always entered: an ambient one would otherwise decide the numbers.
        with torch.inference_mode(), self._autocast():
            return self._stack(**inputs, **({"use_cache": False} if "use_cache" in self._takes else {}))

    def hook(self, site: Site, take: Callable[[Any], object]) -> RemovableHandle:
        """Have a function called with what a site holds whenever the model comes there."""
        module = self.base_model.get_submodule(site.module)

        def given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            take(self._oriented(site, _input_of(args, kwargs)))

        def gives(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            take(self._oriented(site, first_tensor(output)))

        if site.side == "input":
            # Before the model's own hooks there, which replay will run.
            return module.register_forward_pre_hook(given, prepend=True, with_kwargs=True)
        return module.register_forward_hook(gives)

    def _oriented(self, site: Site, hidden: Any) -> Any:
        """Return rows as ``[batch, tokens, width]`` where a model has the tokens first, or layers hold grids.

        Within the layers of such a grid, other modules may hold it otherwise.
        """
        layout = self.family.layout
        known = isinstance(hidden, torch.Tensor) and not (layout.is_grid and site.layer is None)
        return layout.rows_of(hidden) if known else hidden

    def _check_rows(self, site: Site, hidden: Any, tokens: Sequence[int] | None) -> None:
        """Raise where what a site holds is not ``[batch, tokens, width]``; None for any number of rows."""
        three = isinstance(hidden, torch.Tensor) and hidden.ndim == 3
        if three and (tokens is None or list(hidden.shape[:2]) == list(tokens)):
            return
        is_there = f"a tensor {list(hidden.shape)}" if isinstance(hidden, torch.Tensor) else "no tensor"
        verb = "is given" if site.side == "input" else "gives"
        raise UnsupportedModelError(
            f"{site} of {type(self.base_model).__name__} cannot be recorded: it {verb} {is_there}, and not one row a "
            f"token, {['documents', 'rows'] if tokens is None else list(tokens)} and a width"
        )

    def _some_inputs(self) -> dict[str, Any]:
        """Return two documents of three tokens, which any model takes, or of what else the model takes."""
        for name, parameter in self.base_model.named_parameters():
            if parameter.is_meta:
                raise without_bytes(name)
        if takes_features(self.base_model):
            return self.feature_inputs(*[sample_features(self.base_model)] * 2)
        ids = torch.from_numpy(some_ids(self.base_model, 3))[None].repeat(2, 1)
        return {"input_ids": ids.to(self.device), "attention_mask": torch.ones_like(ids, device=self.device)}

    @cached_property
    def hidden_size(self) -> int:
        """The width of a row; where that may be another than the layers', the model is run once for a few tokens.

        Raises:
            UnsupportedModelError: the module is not called once for all tokens, or has no row for each of them.
        """
        if self.site.layer is not None and not (self.site.layer == 0 and self.family.layout.first_differs):
            return self.family.width_of(self.base_model)
        inputs = self._some_inputs()
        held: list[Any] = []
        with (
            contextlib.ExitStack() as stack,
            torch.compiler.set_stance("force_eager"),
            evaluating(self.base_model),
        ):
            stack.callback(self.hook(self.site, held.append).remove)
            self._run_stack(inputs)
        if len(held) != 1:
            often = f"{len(held)} times" if held else "not at all"
            raise UnsupportedModelError(
                f"{self.site} of {type(self.base_model).__name__} cannot be recorded: a forward pass calls it {often}, "
                "and rows are taken where all tokens come by once"
            )
        self._check_rows(self.site, held[0], inputs["input_ids"].shape if "input_ids" in inputs else None)
        return int(held[0].shape[-1])

    def _last(self) -> Site:
        """Return the site of what the model gives: that of the first module whose output it is, else the model's own.

        It is the final norm's, or the last layer's where there is none.
        """
        inside = f"{self.family.layers}."
        given: list[tuple[str, torch.Tensor, torch.Tensor]] = []

        def note(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(hidden := first_tensor(output), torch.Tensor):
                given.append((path, hidden, hidden.clone()))

        with (
            contextlib.ExitStack() as stack,
            torch.compiler.set_stance("force_eager"),
            evaluating(self.base_model),
        ):
            for path, module in self.base_model.named_modules():
                within = path.startswith(inside) and "." in path.removeprefix(inside).replace("._orig_mod", "")
                if not within and not inside.startswith(f"{path}." if path else ""):
                    stack.callback(module.register_forward_hook(functools.partial(note, path)).remove)
            last = first_tensor(self._run_stack(self._some_inputs()))
        for path, hidden, before in given:
            same = isinstance(last, torch.Tensor) and hidden.data_ptr() == last.data_ptr()
            if same and before.numel() == last.numel() and torch.equal(before.reshape(last.shape), last):
                return site_of(self.base_model, self.family, path)
        return Site(self.family.stack)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        kind = self.device.type
        if self.compute_dtype == self.parameter_dtype:
            return torch.autocast(kind, enabled=False)
        return torch.autocast(kind, dtype=getattr(torch, self.compute_dtype))


class _Company:
    """Lower halves of one model, and what was computed for all of them at once."""

    def __init__(self, halves: Sequence[LowerHalf]) -> None:
        self._sites = list(dict.fromkeys(half.site for half in halves))
        self._known: dict[object, dict[Site, list[NDArray[np.generic]]]] = {}

    def last(
        self, half: LowerHalf, rows: int, token_ids: Sequence[NDArray[Any]], type_ids: Sequence[NDArray[Any]]
    ) -> list[NDArray[np.generic]]:
        key = rows, *((ids.tobytes(), types.tobytes()) for ids, types in zip(token_ids, type_ids, strict=True))
        if key not in self._known:
            found = half.run_at(self._sites, token_ids, type_ids)
            # Copies, or all of the rows would stay in memory.
            self._known[key] = {site: [array[-rows:].copy() for array in found[site]] for site in self._sites}
        return self._known[key][half.site]


@contextlib.contextmanager
def together(halves: Sequence[LowerHalf]) -> Iterator[None]:
    """Have lower halves of one model share forward passes: what ``run_last`` computes for one it computes for all.

    What was computed is kept until the end, so the model must not change meanwhile.
    """
    company = _Company(halves)
    try:
        for half in halves:
            half._company = company
        yield
    finally:
        for half in halves:
            half._company = None


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


def first_tensor(value: Any) -> Any:
    """Return the first tensor of what a module gives, a tuple or a model's output perhaps; None where there is none."""
    if isinstance(value, torch.Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((one for one in parts if isinstance(one, torch.Tensor)), None)


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return rows_in(args, kwargs)
    except StopIteration:  # nothing that looks like rows
        return first_tensor(args) if args else first_tensor(kwargs)


def _to_numpy(rows: torch.Tensor) -> NDArray[np.generic]:
    rows = rows.cpu()
    if rows.dtype == torch.bfloat16:  # NumPy has none; float32 holds it exactly
        rows = rows.float()
    array: NDArray[np.generic] = rows.numpy()
    return array

"""Early exit above stored rows: a document leaves a reduced model as soon as one of its upper layers is sure of it.

Behind each upper layer but the last hangs an off-ramp (DeeBERT, Xin et al., 2020): a small classifier over the mean of
the layer's rows. All of them, and the model's own head, train together; in evaluation a document leaves at the first
off-ramp whose highest probability reaches the threshold, and the layers above run for those that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from actcache.errors import ModelError, ShapeError, UnsupportedModelError, UsageError
from actcache.models.families import Family, base_model_of
from actcache.models.modes import evaluating
from actcache.models.partial_vocabulary import some_ids
from actcache.models.sites import LAST
from actcache.models.stubs import rows_in
from actcache.models.tensors import first_parameter

#: Where a tensor stands among what a layer is called with: an argument's number or name, and on within tuples.
_Place = tuple[int | str, ...]


class _AllLeft(Exception):
    """Ends the forward pass where no document is left."""


@dataclass
class EarlyExitOutput(ModelOutput):
    """What an ``EarlyExit`` returns."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None  # [batch, classes], of each document's own exit
    exits: torch.Tensor | None = None  # [batch] int64, the layer behind which each document left; N without an exit


class EarlyExit(nn.Module):
    """A reduced classifier whose documents may leave behind each of its upper layers. Not thread-safe.

    In train mode all off-ramps and the model's own head see all documents, and the loss is the mean of their cross
    entropies. In eval mode documents leave. ``forward`` is called as the reduced model's is.

    Args:
        reduced: a reduced model with one label a document; used as it is, and trained with the off-ramps.
        threshold: the highest probability from which on a document leaves; more than 1 for none to leave early.

    Attributes:
        layers: the numbers of the layers behind which there is an off-ramp; empty where there is one upper layer.
        ramps: one off-ramp for each.

    Raises:
        ModelError: the model is no reduced one, or does not start at a layer.
        UnsupportedModelError: it classifies no documents, or documents that leave change others' numbers.
        UsageError: the threshold is no positive number.
    """

    def __init__(self, reduced: PreTrainedModel, threshold: float = 0.9) -> None:
        super().__init__()
        start: Any = getattr(reduced, "actcache_layer", None)
        if start is None or start == LAST:
            raise ModelError(
                f"a {type(reduced).__name__} is no reduced model that starts at a layer: recycler.reduce makes it"
            )
        self.threshold = threshold
        self._check_threshold()
        family: Family = reduced.actcache_family  # type: ignore[assignment]
        base = base_model_of(reduced)
        count = len(family.layers_of(base))
        self.reduced = reduced
        self.layers = list(range(start + 1, count))
        width, like = family.width_of(base), first_parameter(family.layers_of(base)[start])
        classes = int(reduced.config.num_labels or 0)
        kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}

        def ramp() -> nn.Module:
            return nn.Sequential(nn.Linear(width, width, **kind), nn.Tanh(), nn.Linear(width, classes, **kind))

        self.ramps = nn.ModuleList(ramp() for _ in self.layers)
        self._places: set[_Place] = set()
        self._prove(width, classes)

    def forward(
        self,
        activations: torch.Tensor,
        token_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> EarlyExitOutput:
        """Return the loss, where there are labels, the logits, and where each document left.

        Args:
            activations, token_ids, attention_mask: as of the reduced model.
            labels: [batch] int64.
        """
        if activations.ndim != 3:
            raise ShapeError(f"activations are [batch, tokens, hidden], not {list(activations.shape)}")
        if attention_mask is None:
            attention_mask = torch.ones(activations.shape[:2], dtype=torch.int64, device=activations.device)
        given = {"activations": activations, "token_ids": token_ids, "attention_mask": attention_mask}
        logits, exits, losses_of = self._all(given) if self.training else self._leaving(given, self._sure)
        loss = None
        if labels is not None:
            loss = torch.stack([nn.functional.cross_entropy(one, labels) for one in losses_of]).mean()
        return EarlyExitOutput(loss=loss, logits=logits, exits=exits)

    def _all(self, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Run all layers for all documents; the logits of every exit."""
        taken: list[torch.Tensor] = []

        def take(number: int, hidden: torch.Tensor, args: Any, kwargs: Any) -> None:
            taken.append(self.ramps[number](_mean(hidden, given["attention_mask"])))

        with self._before_layers(take):
            logits: torch.Tensor = self.reduced(**given).logits
        return logits, _numbers(logits, self._last), [*taken, logits]

    def _leaving(
        self, given: dict[str, Any], sure: Callable[[int, torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Run the layers for the documents that are left: those of whose logits [left, classes] nobody was sure."""
        self._check_threshold()
        mask = given["attention_mask"]
        count = len(mask)
        left = torch.arange(count, device=mask.device)  # documents that are still there
        logits: torch.Tensor | None = None
        exits = torch.full((count,), self._last, device=mask.device)

        def leave(number: int, hidden: torch.Tensor, args: Any, kwargs: Any) -> Any:
            nonlocal left, logits
            found = self.ramps[number](_mean(hidden, mask[left]))
            gone = sure(number, found)
            if logits is None:
                logits = found.new_zeros(count, found.shape[-1])
            logits[left[gone]] = found[gone]
            exits[left[gone]] = self.layers[number]
            if not bool(gone.any()) and len(left) == count:
                return None
            stay = ~gone
            left = left[stay]
            if not len(left):
                raise _AllLeft
            return self._shrunk(args, kwargs, hidden, stay, left, count)

        try:
            with self._before_layers(leave):
                last = self.reduced(**given).logits
        except _AllLeft:
            assert logits is not None
            return logits, exits, [logits]
        if logits is None:
            logits = last
        else:
            logits[left] = last.to(logits.dtype)
        return logits, exits, [logits]

    @property
    def _last(self) -> int:
        family: Family = self.reduced.actcache_family  # type: ignore[assignment]
        return len(family.layers_of(base_model_of(self.reduced)))

    def _before_layers(self, then: Callable[[int, torch.Tensor, Any, Any], Any]) -> ExitStack:
        """Have something called with the number of an off-ramp and its rows, before the layer above it runs."""
        family: Family = self.reduced.actcache_family  # type: ignore[assignment]
        layers = family.layers_of(base_model_of(self.reduced))
        stack = ExitStack()
        for number, layer in enumerate(self.layers):

            def before(module: nn.Module, args: Any, kwargs: Any, number: int = number) -> Any:
                return then(number, rows_in(args, kwargs), args, kwargs)

            stack.callback(layers[layer].register_forward_pre_hook(before, with_kwargs=True).remove)
        return stack

    def _shrunk(
        self, args: Any, kwargs: Any, hidden: torch.Tensor, stay: torch.Tensor, left: torch.Tensor, count: int
    ) -> tuple[Any, Any]:
        """Return a layer's arguments for the documents that stay: its rows, and whatever has one part a document."""

        def of(place: _Place, value: Any) -> Any:
            if value is hidden:
                return hidden[stay]
            if isinstance(value, tuple | list):
                return type(value)(of((*place, i), one) for i, one in enumerate(value))
            if isinstance(value, torch.Tensor) and place in self._places and len(value) == count:
                return value[left]
            return value

        named = {name: of((name,), one) for name, one in kwargs.items()}
        return tuple(of((i,), one) for i, one in enumerate(args)), named

    @torch.no_grad()
    def _prove(self, width: int, classes: int) -> None:
        """Find which arguments of layers have a part a document; see that who leaves changes nobody else's numbers."""
        name, like = type(self.reduced).__name__, first_parameter(self.reduced)
        ids = torch.from_numpy(some_ids(base_model_of(self.reduced), 6)).expand(3, -1)
        rows = torch.randn(3, 6, width, generator=torch.Generator().manual_seed(0)).to(like.dtype)
        mask = (torch.arange(6) < torch.tensor([[6], [4], [5]])).long()
        whole = {"activations": rows, "token_ids": ids, "attention_mask": mask}
        whole = {key: tensor.to(like.device) for key, tensor in whole.items()}
        sizes: list[dict[_Place, int]] = [{}, {}]
        with evaluating(self):
            for seen, batch in zip(sizes, (2, 3), strict=True):

                def note(number: int, hidden: Any, args: Any, kwargs: Any, seen: dict[_Place, int] = seen) -> None:
                    seen.update(_sizes(args, kwargs))

                with self._before_layers(note):
                    logits = self.reduced(**{key: tensor[:batch] for key, tensor in whole.items()}).logits
            kind = self.reduced.config.problem_type
            if logits.shape != (3, classes) or kind not in (None, "single_label_classification"):
                raise UnsupportedModelError(f"early exit is for models with one label a document, not a {name}")
            self._places = {place for place, size in sizes[0].items() if size == 2 and sizes[1].get(place) == 3}
            if not self.layers:
                return

            def the_second(number: int, found: torch.Tensor) -> torch.Tensor:
                return torch.arange(len(found), device=found.device) == (1 if number == 0 else -1)

            try:
                found, _, _ = self._leaving(whole, the_second)
            except (RuntimeError, IndexError, ValueError) as error:
                raise UnsupportedModelError(f"documents cannot leave a {name} early: {error}") from error
        if not torch.allclose(found[[0, 2]], logits[[0, 2]], rtol=1e-3, atol=1e-4):
            raise UnsupportedModelError(f"a document that leaves a {name} early changes the numbers of others")

    def _sure(self, number: int, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(-1).amax(-1) >= self.threshold

    def _check_threshold(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float) or not self.threshold > 0:
            raise UsageError(f"the threshold is a probability (more than 1: no early exit), not {self.threshold!r:.80}")


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over each document's tokens, ``[batch, hidden]``."""
    weights = mask.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)


def _numbers(logits: torch.Tensor, number: int) -> torch.Tensor:
    return torch.full((len(logits),), number, device=logits.device)


def _sizes(args: Any, kwargs: Any) -> Iterator[tuple[_Place, int]]:
    """Yield where tensors of two or more dimensions stand in a call, and how long they are."""

    def of(place: _Place, value: Any) -> Iterator[tuple[_Place, int]]:
        if isinstance(value, tuple | list):
            for i, one in enumerate(value):
                yield from of((*place, i), one)
        elif isinstance(value, torch.Tensor) and value.ndim >= 2:
            yield place, len(value)

    for name, one in (*enumerate(args), *kwargs.items()):
        yield from of((name,), one)

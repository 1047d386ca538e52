"""The stubs of a reduced model: what stands where its lower half stood, and takes the rows that are injected."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from actcache.errors import ShapeError
from actcache.models.layouts import Layout

RowsAndMask = tuple[torch.Tensor | None, torch.Tensor | None]


class InjectedRows:
    """The rows of one forward of a reduced model, and their mask: from its beginning to where they are taken.

    Threads may run one model at once, so each has its own. Dynamo knows no such thing: what it compiles reads what was
    injected last, by whatever thread.
    """

    def __init__(self) -> None:
        self.last: RowsAndMask = (None, None)

    def get(self) -> RowsAndMask:
        """Return rows ``[batch, tokens, hidden]`` and mask ``[batch, tokens]``, or what of them there is."""
        if torch.compiler.is_compiling():
            return self.last
        return _threads.injected.get(id(self), (None, None))

    def put(self, rows: torch.Tensor | None, mask: torch.Tensor | None) -> RowsAndMask:
        """Inject, and return what was injected before."""
        before = self.get()
        self.last = (rows, mask)
        if not torch.compiler.is_compiling():
            if rows is None:
                _threads.injected.pop(id(self), None)
            else:
                _threads.injected[id(self)] = (rows, mask)
        return before

    def __getstate__(self) -> dict[str, Any]:
        return {"last": (None, None)}


class _Threads(threading.local):
    def __init__(self) -> None:  # in each thread
        self.injected: dict[int, RowsAndMask] = {}
        self.beside: dict[int, tuple[Any, ...]] = {}  # what the first layer returned beside rows


_threads = _Threads()


def rows_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return the rows ``[batch, tokens, hidden]`` that a layer was called with, by whatever name."""
    rows: torch.Tensor
    if args and isinstance(args[0], torch.Tensor):
        return args[0]
    if isinstance(rows := kwargs.get("hidden_states"), torch.Tensor):  # type: ignore[assignment]
        return rows
    floating = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor) and one.is_floating_point()]
    return next(one for dimensions in (3, 4) for one in floating if one.ndim == dimensions)


class EmbeddingStub(nn.Module):
    """Returns zeros ``[batch, tokens, hidden]`` for ids ``[batch, tokens]``; what is embedded already it returns as is.

    The zeros have the dtype and device of ``like``; ``matrix`` is the word embeddings by name, where heads read it.
    With ``injected``, for models of other inputs than ids, the zeros have the shape of the rows that are injected.
    """

    zero: torch.Tensor

    def __init__(
        self,
        hidden_size: int,
        like: torch.Tensor,
        matrix: tuple[str, nn.Module] | None = None,
        injected: InjectedRows | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.injected = hidden_size, injected
        self.register_buffer("zero", torch.zeros((), dtype=like.dtype, device=like.device), persistent=False)
        if matrix is not None:
            name, module = matrix
            self._modules[name] = module

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.injected is not None and (rows := self.injected.get()[0]) is not None:
            return self.zero.expand(rows.shape)
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        if given.is_floating_point():
            return given
        if given.ndim != 2:
            raise ShapeError(
                f"token_ids do not fit the model, which takes [batch, tokens]: {list(given.shape)}. Items of a "
                "reader's dataset() become a batch by its collate: give the loader collate_fn=dataset.collate (the "
                "Trainer: data_collator=dataset.collate)"
            )
        return self.zero.expand(*given.shape, self.hidden_size)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("word_embeddings", "tok_embeddings"):  # where get_input_embeddings() looks
                return self
            if name == "weight":  # of which models ask the device and the dtype
                return self.zero
            raise


_AS_STORED = Layout()

#: Attributes of a layer that are not its stand-in's.
_OWN = ("training", "gradient_checkpointing", "tuple_arity", "injected", "layout", "beside")


class PassThrough(nn.Module):
    """Stands where a layer of the lower half stood: returns its input, or the rows that were injected.

    It returns a tuple of the length of the layer's (None for the bare tensor), and has the layer's plain attributes,
    which base models look at (``attention_type``). ``injected`` is given to the last pass-through; ``layout`` says how
    the layer holds rows. ``beside`` is what the first layer keeps what it returns
    beside rows under, where that runs.
    """

    def __init__(
        self,
        layer: nn.Module,
        tuple_arity: int | None,
        injected: InjectedRows | None = None,
        layout: Layout = _AS_STORED,
        beside: InjectedRows | None = None,
    ) -> None:
        super().__init__()
        self.tuple_arity, self.injected, self.layout, self.beside = tuple_arity, injected, layout, beside
        for name, value in vars(layer).items():
            plain = isinstance(value, str | int | float | list | tuple | dict | None) or hasattr(value, "to_dict")
            if plain and not name.startswith("_") and name not in _OWN:
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self._rows(rows_in(args, kwargs))
        if self.tuple_arity is None:
            return hidden
        others = () if self.beside is None else _threads.beside.get(id(self.beside), ())
        return (hidden, *(others or [None] * (self.tuple_arity - 1)))

    def _rows(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.injected is None else injected_instead(self.injected, hidden, self.layout)


def injected_instead(injected: InjectedRows, hidden: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return the rows that were injected as a layer would have returned them; ``hidden`` where there are none."""
    rows = injected.get()[0]
    return hidden if rows is None else layout.hidden_of(rows, hidden)


class FirstLayerRuns:
    """Forward hook of a first layer that is kept: what it returns beside rows is handed on, its rows are not.

    Position biases that the first layer computes for all (T5's kin) do not depend on rows.
    """

    def __init__(self, beside: InjectedRows, injected: InjectedRows | None, layout: Layout) -> None:
        self.beside, self.injected, self.layout = beside, injected, layout

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> Any:
        hidden, *others = output
        _threads.beside[id(self.beside)] = tuple(others)
        if self.injected is not None:
            hidden = injected_instead(self.injected, hidden, self.layout)
        return (hidden, *others)


class BiasPassThrough(PassThrough):
    """A pass-through of T5: hands on the position bias of the layer before; the first one computes it for all.

    ``bias`` is the path, within the first layer, of the attention that computes it; None for others. Of that attention
    the bias's weights are kept, frozen, under their own names.
    """

    def __init__(self, layer: nn.Module, tuple_arity: int, injected: InjectedRows | None, bias: str | None) -> None:
        super().__init__(layer, tuple_arity, injected)
        self.bias = bias
        if bias is None:
            return
        attention = layer.get_submodule(bias)
        dropped = {id(part): nn.Identity() for name, part in attention.named_children() if not name.startswith("rel")}
        parent: nn.Module = self
        *containers, last = bias.split(".")
        for name in containers:
            parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, copy.deepcopy(attention, dropped).requires_grad_(False))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self._rows(args[0] if args else kwargs["hidden_states"])
        bias = args[2] if len(args) > 2 else kwargs.get("position_bias")
        if bias is None and self.bias is not None:
            tokens = hidden.shape[1]
            attention: Any = self.get_submodule(self.bias)
            bias = attention.compute_bias(tokens, tokens, device=hidden.device)
        return (hidden, bias, *[None] * ((self.tuple_arity or 2) - 2))


class ConvolutionStub(nn.Module):
    """Stands where a convolution added to the first layer's output, which the stored rows hold already."""

    def forward(self, hidden_states: torch.Tensor, residual_states: torch.Tensor, *args: Any) -> torch.Tensor:
        return residual_states


class NoAnswersAtPadding:
    """Forward hook of a question answering head, whose loss is a softmax over all positions of a batch.

    In the full model that includes what padding's rows became, so that a document's loss depends on the others of its
    batch. Padding has no stored rows: with logits ``[batch, tokens, 2]`` of the least number there, a document's loss
    is what it is alone.
    """

    def __init__(self, injected: InjectedRows) -> None:
        self.injected = injected

    def __call__(self, head: nn.Module, args: Any, logits: torch.Tensor) -> torch.Tensor | None:
        mask = self.injected.get()[1]
        if mask is None or mask.shape != logits.shape[:-1]:
            return None
        return logits.masked_fill(mask[..., None] == 0, torch.finfo(logits.dtype).min)

"""Training samples of draft models (EAGLE-3): some layers' rows of one conversation, each layer in a space of its own.

A sample is found by its token ids, so it does not matter in which order a data set holds them, nor which process stored
them. Each layer's entry is read with its checksum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actcache.errors import ShapeError, SpaceNotFoundError, UsageError
from actcache.format.arguments import is_whole
from actcache.format.keys import document_key
from actcache.format.recipe import Recipe
from actcache.models.tensors import dtype_name
from actcache.store.space import Space
from actcache.store.store import Store

#: A layer by its number (its output; the last one's is before the final norm), or a module's output by its path in the
#: base model (``"norm"``: after the final norm).
Layer = int | str

#: Under which name the last layer's space keeps what a sample is trained on, token by token.
LOSS_MASK = "loss_mask"

_LOOKED_AT = 1000  # keys, to see whether spaces have documents in common


class DraftSamples:
    """The spaces of some layers of one model, read and written sample by sample. As thread-safe as its spaces.

    Args:
        spaces: of the layers, in the order of a sample's second axis; the last one is what the model's head reads.

    Raises:
        UsageError: there are fewer than two spaces.
        ShapeError: they have rows of other sizes, or documents that no other has.
    """

    def __init__(self, spaces: Sequence[Space]) -> None:
        self.spaces = list(spaces)
        if len(self.spaces) < 2:
            raise UsageError(
                "a sample has rows of at least one inner layer and of the last one: give two spaces or more"
            )
        sizes = {space.recipe.hidden_size for space in self.spaces}
        if len(sizes) > 1:
            raise ShapeError(f"these spaces have rows of {sorted(sizes)} numbers: they are not of one model")
        first = self.spaces[0].key_array()[:_LOOKED_AT]
        for space in self.spaces[1:]:
            if len(first) and len(space) and not space.contains(first).any():
                raise ShapeError(
                    f"{space} and {self.spaces[0]} hold other documents: record all layers of the same samples"
                )

    @property
    def prenorm(self) -> bool:
        """Whether the last rows are those before the model's final norm."""
        return self.spaces[-1].recipe.site is None

    @classmethod
    def find(
        cls, store: Store, layers: Sequence[Layer], *, model: str | None = None, spaces: Sequence[str] = ()
    ) -> DraftSamples:
        """Return the samples of a store.

        Args:
            layers: in the order of a sample's second axis.
            model: the recipes' model, where the store has several.
            spaces: fingerprints, in the place of ``layers``.

        Raises:
            SpaceNotFoundError: a layer has no space.
            UsageError: a layer has several.
        """
        recipes = store.recipes()
        if spaces:
            found = [[recipe for recipe in recipes if recipe.fingerprint == name] for name in spaces]
        else:
            mine = [recipe for recipe in recipes if model is None or recipe.model == model]
            found = [[recipe for recipe in mine if is_at(recipe, layer)] for layer in layers]
        for name, some in zip(spaces or layers, found, strict=True):
            if not some:
                there = sorted({f"{one.model} at {one.site_name}" for one in recipes})
                raise SpaceNotFoundError(f"{store.url} has no space for {name!r}; it has {', '.join(there) or 'none'}")
            if len(some) > 1:
                names = ", ".join(f"{one.fingerprint} ({one.model}, {one.stored_as})" for one in some)
                raise UsageError(f"{store.url} has several spaces for {name!r}: name those that are meant: {names}")
        return cls._opened(store, [some[0] for some in found])

    @classmethod
    def create(
        cls, store: Store, layers: Sequence[Layer], *, model: str, hidden_size: int, dtype: str, source: str
    ) -> DraftSamples:
        """Open the spaces of samples that another program computed with a model, creating what is absent.

        Their identity says the model's name and ``source``, for nothing is known of its weights: a recycler's own
        samples never share a space with them.
        """
        common: dict[str, Any] = {"model": model, "hidden_size": hidden_size, "dtype": dtype}
        common |= {"compute_dtype": dtype, "config": {"recorded_by": source}, "provenance": {"recorded_by": source}}
        return cls._opened(store, [Recipe(**common, **_place(layer)) for layer in layers])

    @classmethod
    def _opened(cls, store: Store, recipes: Sequence[Recipe]) -> DraftSamples:
        with ExitStack() as stack:
            made = cls([stack.enter_context(store.space(recipe)) for recipe in recipes])
            stack.pop_all()
        return made

    def get(self, token_ids: Any, *, refresh: bool = True) -> torch.Tensor | None:
        """Return a sample's rows, ``[tokens, layers, hidden]`` in the stored dtype; None where a layer lacks it.

        Args:
            token_ids: ``[tokens]`` whole numbers.
            refresh: whether to look for what other processes have stored meanwhile.

        Raises:
            CorruptEntryError: a layer's entry fails its checksum.
        """
        ids = np.asarray(token_ids)
        key = [document_key(ids)]
        if not all(space.contains(key)[0] for space in self.spaces):
            if refresh:
                for space in self.spaces:
                    space.refresh()
            if not refresh or not all(space.contains(key)[0] for space in self.spaces):
                return None
        layers = []
        for space in self.spaces:
            (entry,) = space.get(key)
            if entry is None or entry.token_ids is None or not np.array_equal(entry.token_ids, ids):
                return None  # deleted just now, or recorded of other tokens than its document
            rows = torch.from_numpy(entry.activations)
            layers.append(rows.bfloat16() if space.recipe.dtype == "bfloat16" else rows)
        return torch.stack(layers, dim=1)

    def loss_mask(self, token_ids: Any) -> NDArray[np.bool_] | None:
        """Return which of a sample's tokens are trained on, ``[tokens]``; None where that was not stored.

        ``CorruptEntryError``: it fails its checksum.
        """
        read = self.spaces[-1].read_columns([document_key(np.asarray(token_ids))])
        there = read.lengths[0] > 0 and LOSS_MASK in read.arrays
        return read.arrays[LOSS_MASK].astype(bool) if there else None

    def put(
        self,
        token_ids: Sequence[Any],
        hidden_states: Sequence[Any],
        *,
        loss_masks: Sequence[Any] | None = None,
        overwrite: bool = False,
    ) -> int:
        """Store samples: ``[tokens]`` whole numbers and ``[tokens, layers, hidden]`` rows of each, on any device.

        ``loss_masks`` are truth values of the tokens, ``[tokens]`` each, and a column of the last layer's space.
        Returns how many samples were new in any layer; they are durable after ``flush``.

        Raises:
            ShapeError, NonFiniteError, StoreError: as ``Space.put``. A layer may then have samples that others lack;
                putting again mends that.
        """
        ids = [np.asarray(one) for one in token_ids]
        rows = [torch.as_tensor(one) for one in hidden_states]
        for one, states in zip(ids, rows, strict=True):
            if states.ndim != 3 or tuple(states.shape[:2]) != (len(one), len(self.spaces)):
                raise ShapeError(
                    f"a sample of {len(one)} tokens has rows [{len(one)}, {len(self.spaces)}, hidden], not "
                    f"{list(states.shape)}"
                )
        which = {document_key(one): i for i, one in enumerate(ids)}  # a data set may hold a sample twice
        new = 0
        for number, space in enumerate(self.spaces):
            layer = [rows[i][:, number] for i in which.values()]
            columns = None
            if loss_masks is not None and space is self.spaces[-1]:
                columns = {LOSS_MASK: [np.asarray(loss_masks[i]).astype(bool) for i in which.values()]}
            kept = [ids[i] for i in which.values()]
            new = max(new, space.put([*which], layer, kept, columns=columns, overwrite=overwrite))
        return new

    def flush(self) -> None:
        """Make everything that was put durable, and visible to others."""
        for space in self.spaces:
            space.flush()

    def close(self) -> None:
        """Flush and release all spaces. Does nothing the second time."""
        with ExitStack() as stack:
            for space in self.spaces:
                stack.callback(space.close)

    def __enter__(self) -> DraftSamples:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def layers_of(text: str) -> list[Layer]:
    """Return layers as they are written on a command line: ``2,16,29,32`` or ``2,16,29,norm``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"layers are numbers or modules, separated by commas, such as 2,16,29,32, not {text!r}")
    return [int(part) if part.isdecimal() else part for part in parts]


def is_at(recipe: Recipe, layer: Layer) -> bool:
    """Return whether a recipe's rows are those of a layer or module."""
    return recipe.site == layer if isinstance(layer, str) else recipe.layer == layer


def stored_dtype(tensor: torch.Tensor) -> str:
    """Return the dtype in which rows of a tensor are stored; ``ShapeError`` where they are no rows."""
    name = dtype_name(tensor.dtype)
    if name not in ("float32", "float16", "bfloat16"):
        raise ShapeError(f"rows are floating point, not {name}")
    return name


def _place(layer: Layer) -> Mapping[str, Any]:
    if isinstance(layer, str):
        return {"site": layer}
    if not is_whole(layer):
        raise UsageError(f"a layer is a number, or a module's path, not {layer!r}")
    return {"layer": int(layer)}

"""What fills by other processes have in common: how recyclers are made there, and how errors come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from actcache.errors import (
    ActcacheError,
    LowerHalfMismatchError,
    StorageIOError,
    StoreError,
    UsageError,
    WorkerError,
)
from actcache.format.keys import Document
from actcache.models.filling import Filler
from actcache.models.late_store import LateStore
from actcache.store.store import Store


class Filling(Protocol):
    """A ``Recycler``, or ``Recyclers``."""

    @property
    def filler(self) -> Filler: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Blueprint:
    """What makes recyclers in another process: some hundred bytes when pickled, for it names the model, which is loaded
    there. Made by ``recycler.blueprint()``.

    Attributes:
        make_from: ``Recycler.from_pretrained``, or that of ``Recyclers``; pickled as its name.
        model: id on the hub, or a folder that is seen there.
        store: a URL, a path, or a ``Store``, of which only that same one is opened.
        options: the other arguments.
        fingerprints: of the spaces that the recyclers have to be of; none for any.
    """

    make_from: Callable[..., Filling]
    model: str
    store: Store | str | Path
    options: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: tuple[str, ...] = ()

    def make(self, device: str | torch.device | None = None, first: Sequence[Document] = ()) -> Filling:
        """Load the model and return its recyclers, whose spaces stand from then on.

        Args:
            device: as of ``Recycler.from_pretrained``.
            first: documents that must be such as can be stored, or else neither store nor spaces are made.

        Raises:
            LowerHalfMismatchError: the model of that name is another one here.
            ActcacheError: see ``Recycler.from_pretrained``.
        """
        made = self.make_from(self.model, store=LateStore(self.store, first), device=device, **self.options)
        found = made.filler.fingerprints
        if self.fingerprints and set(found) != set(self.fingerprints):
            made.close()
            raise LowerHalfMismatchError(
                f"{self.model} makes the spaces {', '.join(found)} in the worker, and {', '.join(self.fingerprints)} "
                "are to be filled: it has other weights, another tokenizer or dtype than the recycler's model. Save "
                "that (save_pretrained) where all workers see it, and make the recycler from there"
            )
        for space in made.filler.spaces:
            space.make()
        return made


def folder_or_id(name: str) -> str:
    """Return a model's name as it means the same from every working directory."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def blueprint_of(
    make_from: Callable[..., Filling],
    base: PreTrainedModel,
    store: Store,
    options: Mapping[str, Any],
    filler: Filler,
) -> Blueprint:
    """Return the blueprint of recyclers whose model is called by its name, or folder.

    Raises:
        UsageError: it has none.
    """
    name = str(base.config.name_or_path or "")
    if not name:
        raise UsageError(
            "this model was made in memory: save it (save_pretrained) where all workers see it, and make the recycler "
            "by from_pretrained"
        )
    given = {key: value for key, value in options.items() if value is not None}
    return Blueprint(make_from, folder_or_id(name), store, given, filler.fingerprints)


@dataclass(frozen=True)
class Failed:
    """A process ends with an error."""

    kind: type[ActcacheError]
    message: str
    lost: int = 0  # see ``StoreError``

    @classmethod
    def by(cls, error: Exception, who: str) -> Failed:
        """Return what is to be said of an error: one of this package's as it is, of others' in words."""
        if isinstance(error, ActcacheError):
            return cls(type(error), str(error), error.lost if isinstance(error, StoreError) else 0)
        if isinstance(error, OSError):
            return cls(StorageIOError, str(error))
        return cls(WorkerError, f"{who} failed: {type(error).__name__}: {error}")  # of torch, mostly

    def error(self) -> ActcacheError:
        error = self.kind(self.message)
        if isinstance(error, StoreError):
            error.lost = self.lost
        return error

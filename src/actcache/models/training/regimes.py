"""The four ways to train that the paper compares, behind one interface: a model, and batches of its inputs.

No recycling (NR) trains the whole model; frozen (F) computes the lower half anew in every epoch but does not train it;
save-and-recycle (SR) computes and stores it in the first epoch; recycling (R) finds it stored. With the same options
all four go through the same documents in the same order, and F, SR and R see the same numbers.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from actcache.errors import ShapeError, UsageError
from actcache.format.arguments import whole
from actcache.models.answers import with_the_heads_names
from actcache.models.families import Family, base_model_of
from actcache.models.lower_half import LowerHalf
from actcache.models.processing import Features, Made
from actcache.models.tensors import padded
from actcache.models.tokenizing import Encoded
from actcache.reader.checks import ranks_of
from actcache.reader.dataset import EntryDataset
from actcache.reader.labels import labels_of
from actcache.reader.order import Order
from actcache.reader.reader import Reader

Inputs = dict[str, torch.Tensor]


class Regime(enum.StrEnum):
    """How much of the lower half's work is done again."""

    NO_RECYCLING = "NR"
    FROZEN = "F"
    SAVE_AND_RECYCLE = "SR"
    RECYCLE = "R"

    @classmethod
    def named(cls, name: str) -> Regime:
        """Return a regime by its letters; raises ``UsageError`` where there is none of that name."""
        try:
            return cls(name)
        except ValueError:
            raise UsageError(f"there is no regime {name!r}; there are {', '.join(cls)}") from None


def freeze_lower_half(model: PreTrainedModel, family: Family, layer: int | str) -> None:
    """Have a task model's lower half compute without gradients and, as when it is recorded, without dropout."""
    base = base_model_of(model)
    parts = [family.stack_of(base)] if isinstance(layer, str) else family.lower_of(base, layer).values()
    for part in parts:
        part.requires_grad_(False)
        part.register_forward_pre_hook(_stay_evaluating)


def _stay_evaluating(module: nn.Module, args: Any) -> None:
    if module.training:  # model.train() has been there
        module.eval()


class TokenItem(Mapping[str, Any]):
    """One document of a ``TokenDataset``: its token ids (``input_ids``) and their mask, unpadded, as plain lists.

    No ``dict``, for the ``Trainer`` copies those, and the position would be lost.
    """

    def __init__(self, position: int, token_ids: NDArray[np.integer]) -> None:
        self.position, self.token_ids = position, token_ids

    def __getitem__(self, name: str) -> Any:
        if name not in ("input_ids", "attention_mask"):
            raise KeyError(name)
        return self.token_ids.tolist() if name == "input_ids" else [1] * len(self.token_ids)

    def __iter__(self) -> Iterator[str]:
        return iter(("input_ids", "attention_mask"))

    def __len__(self) -> int:
        return 2


class TokenDataset(Dataset[TokenItem]):
    """Token ids of documents, for a full model. ``collate`` looks up what belongs to its items. Immutable.

    Args:
        labels: as a reader takes them, one an entry, or None; a ``ShapeError`` where they do not fit.
        padding: the token id that fills up a batch, on the right.
        task_class: of the model, which names the labels.
    """

    def __init__(
        self, encoded: Sequence[Encoded], labels: Any, padding: int, task_class: type[PreTrainedModel]
    ) -> None:
        self._encoded, self._padding, self._task_class = list(encoded), padding, task_class
        self.lengths: NDArray[np.int64] = np.array([len(entry.token_ids) for entry in self._encoded], np.int64)
        self._labels = None if labels is None else labels_of(labels, self.lengths)
        self._typed = any(entry.type_ids.any() for entry in self._encoded)

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, position: int) -> TokenItem:
        position = range(len(self))[operator.index(position)]
        return TokenItem(position, self._encoded[position].token_ids)

    def collate(self, items: Sequence[TokenItem]) -> Inputs:
        """Return a full model's inputs: ``input_ids``, ``attention_mask``, ... [batch, tokens], and labels."""
        return self.inputs([item.position for item in items])

    def inputs(self, positions: Sequence[int]) -> Inputs:
        """Return a full model's inputs for the documents at some positions."""
        which = np.asarray(positions, np.int64)
        entries, lengths = [self._encoded[i] for i in which], self.lengths[which]
        width = int(lengths.max())
        inputs = {
            "input_ids": padded([entry.token_ids for entry in entries], self._padding),
            "attention_mask": torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64)),
        }
        if self._typed:
            inputs["token_type_ids"] = padded([entry.type_ids for entry in entries], 0)
        if self._labels is not None:
            inputs["labels"] = torch.from_numpy(self._labels.of_batch(which, lengths, width))
        return with_the_heads_names(inputs, self._task_class)


class FeatureItem(Mapping[str, Any]):
    """One document of a ``FeatureDataset``: its features, under the name of the model's argument."""

    def __init__(self, position: int, features: Features) -> None:
        self.position, self._features = position, features

    def __getitem__(self, name: str) -> Any:
        if name != self._features.name:
            raise KeyError(name)
        return torch.from_numpy(self._features.values)

    def __iter__(self) -> Iterator[str]:
        return iter((self._features.name,))

    def __len__(self) -> int:
        return 1


class FeatureDataset(Dataset[FeatureItem]):
    """Features of images or audio, for a full model, else as ``TokenDataset``; ``make`` puts those of one shape into a
    batch."""

    def __init__(
        self,
        features: Sequence[Features],
        labels: Any,
        make: Callable[..., dict[str, Any]],
        task_class: type[PreTrainedModel],
    ) -> None:
        self._features, self._make, self._task_class = list(features), make, task_class
        self.lengths: NDArray[np.int64] = np.array([one.length for one in self._features], np.int64)
        self._labels = None if labels is None else labels_of(labels, self.lengths)

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, position: int) -> FeatureItem:
        position = range(len(self))[operator.index(position)]
        return FeatureItem(position, self._features[position])

    def collate(self, items: Sequence[FeatureItem]) -> Inputs:
        """Return a full model's inputs, of items of one shape."""
        return self.inputs([item.position for item in items])

    def inputs(self, positions: Sequence[int]) -> Inputs:
        """Return a full model's inputs for the documents at some positions, of one shape."""
        which = np.asarray(positions, np.int64)
        shapes = {self._features[i].values.shape for i in which}
        if len(shapes) > 1:
            raise ShapeError(
                f"documents of {len(shapes)} shapes are in one batch, which no model takes: sort them by it"
            )
        inputs = self._make(*(self._features[i] for i in which))
        if self._labels is not None:
            inputs["labels"] = torch.from_numpy(self._labels.of_batch(which, self.lengths[which], None))
        return with_the_heads_names(inputs, self._task_class)


def full_inputs(
    entries: Sequence[Made], labels: Any, lower: LowerHalf, task_class: type[PreTrainedModel]
) -> TokenDataset | FeatureDataset:
    """Return the data set of a full model's inputs."""
    features = [one for one in entries if isinstance(one, Features)]
    if features:
        return FeatureDataset(features, labels, lower.feature_inputs, task_class)
    padding = int(getattr(lower.base_model.config, "pad_token_id", None) or 0)
    texts = [one for one in entries if isinstance(one, Encoded)]
    return TokenDataset(texts, labels, padding, task_class)


class TextBatches:
    """Batches for a full model, in the order of a reader's. Not thread-safe."""

    def __init__(self, documents: TokenDataset | FeatureDataset, order: Order, device: Any) -> None:
        self._documents, self._order, self._device = documents, order, device
        self._rank, self._world = ranks_of(None, repr(order))
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is."""
        self._epoch = whole("epoch", epoch, 0)

    def __len__(self) -> int:
        return len(self._positions())

    def __iter__(self) -> Iterator[Inputs]:
        batches = (self._documents.inputs(which.tolist()) for which in self._positions())
        self._epoch += 1
        return ({name: _moved(value, self._device) for name, value in inputs.items()} for inputs in batches)

    def dataset(self) -> TokenDataset | FeatureDataset:
        """Return the same documents as a map-style data set."""
        return self._documents

    def _positions(self) -> list[NDArray[np.int64]]:
        """Return the positions of the documents of each of this rank's batches."""
        plan = self._order.of_epoch(self._documents.lengths, self._epoch)
        return [plan.sequence[slice(*batches[self._rank])] for batches in plan.rounds(self._world)]


def _moved(value: Any, device: Any) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


class StoredBatches:
    """Batches for a reduced model, from a reader; the class of the model that was reduced names the labels."""

    def __init__(self, reader: Reader, task_class: type[PreTrainedModel]) -> None:
        self.reader, self._task_class = reader, task_class

    def set_epoch(self, epoch: int) -> None:
        self.reader.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.reader)

    def __iter__(self) -> Iterator[Inputs]:
        return (with_the_heads_names(batch.model_inputs(), self._task_class) for batch in self.reader)

    def dataset(self) -> EntryDataset:
        """Return the same documents as a map-style data set."""
        return self.reader.dataset()


class Prepared(NamedTuple):
    """A model and what it is trained on: ``for batch in batches: model(**batch).loss``."""

    model: PreTrainedModel
    batches: TextBatches | StoredBatches  # each iteration is an epoch, and the next has the next order

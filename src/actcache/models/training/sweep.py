"""Which layer suits a task? Train the reduced model of each cached layer, and a weighted pooling over all of them.

Every candidate goes through the same loop with the same seed, documents and order of batches: AdamW, a tenth of the
steps warm-up, then linear decay, as in the embedding recycling paper. What is reported of one seed is no more than
that: repeat with others before believing a small difference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from actcache.errors import UsageError
from actcache.format.arguments import to_numpy, whole, whole_numbers
from actcache.format.keys import Document
from actcache.models.documents import listed
from actcache.models.training.joint import CachedLayer, JointReader, read_jointly
from actcache.models.training.pooling import WeightedPooling
from actcache.models.training.regimes import Inputs
from actcache.reader.labels import out_of_column

Loss = Callable[[nn.Module, Any], torch.Tensor]
Metric = Callable[[nn.Module, Iterable[Any]], float]


@dataclass(frozen=True)
class Candidate:
    """What training from one layer, or from several pooled ones, came to."""

    layers: tuple[int, ...]
    shares: tuple[float, ...]  # of each layer in a ``WeightedPooling``; (1.0,) of one layer, empty of another pooling
    metric: float  # on the held-out documents
    seconds: float  # of training, reading included
    bytes_per_token: int  # that these layers' rows take up
    nbytes: int  # that they take up for all documents of the sweep, token ids and index not counted


def own_loss(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Return the loss that a task model computes from ``labels``."""
    loss: torch.Tensor = model(**inputs).loss
    return loss


def accuracy(model: nn.Module, batches: Iterable[Any]) -> float:
    """Return the share of labels (but -100) that have the highest logit; of documents or of tokens."""
    right = labelled = 0
    for inputs in batches:
        labels = inputs["labels"]
        some = labels != -100
        right += int((model(**inputs).logits.argmax(-1) == labels)[some].sum())
        labelled += int(some.sum())
    return right / labelled if labelled else float("nan")


def train(model: nn.Module, batches: Any, *, rate: float, epochs: int, loss: Loss = own_loss) -> None:
    """Train what has gradients in a model, in place, and leave it in train mode.

    The batches have a length, and are one epoch each time they are iterated over; ``rate`` is the highest.
    """
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], rate)
    steps = epochs * len(batches)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    for _ in range(epochs):
        for inputs in batches:
            loss(model, inputs).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def evaluate(model: nn.Module, batches: Iterable[Any], metric: Metric = accuracy) -> float:
    """Return a metric of a model in eval mode, which it stays in, without gradients."""
    model.eval()
    with torch.inference_mode():
        return metric(model, batches)


def sweep(
    recyclers: Mapping[int, CachedLayer],
    task_model: PreTrainedModel,
    texts: Iterable[Document],
    labels: Any,
    *,
    held_out: Sequence[int] | NDArray[np.integer],
    metric: Metric = accuracy,
    loss: Loss = own_loss,
    prepare: Callable[[PreTrainedModel], nn.Module] = lambda reduced: reduced,
    pooling: Callable[[int], nn.Module] | None = None,
    rate: float = 2e-4,
    pooling_rate: float = 1e-2,
    epochs: int = 3,
    batch_size: int = 16,
    seed: int = 0,
    device: Any = "cpu",
) -> list[Candidate]:
    """Train from each cached layer, and from all together, and return how well that went; layers ascending.

    Args:
        recyclers: by layer, as ``Recyclers`` is; each layer's space holds the documents.
        task_model: full, with a new head; not changed. Each candidate starts from a copy of it, so from the same head.
        labels: one a document, as a reader takes them. Where documents are cut into windows, each window counts.
        held_out: positions of the documents that are not trained on.
        metric: of a model in eval mode, and of the inputs of batches of the held-out documents.
        prepare: what becomes of a reduced model before it is trained, as ``add_adapters``.
        pooling: makes the model that takes the rows of all layers (as a list) from their number, as
            ``lambda layers: WeightedPooling(layers, hidden_size, classes)``; None for no pooling.
        rate, pooling_rate: the highest learning rate of reduced models and of the pooling, which has few weights.
        batch_size: documents of like length share a batch.
        seed: of the order of documents, of dropout and of the pooling's head.

    Raises:
        UsageError: nothing is held out, or nothing else; a number is none.
        MissingEntryError: documents are not in a layer's space.
        LowerHalfMismatchError: the task model has another lower half.
    """
    documents, epochs, seed = listed(texts), whole("epochs", epochs, 1), whole("seed", seed, 0)
    count, out = len(documents), np.unique(whole_numbers("held_out: positions of documents", held_out))
    rest = np.setdiff1d(np.arange(count), out)
    if not len(out) or not len(rest) or out[0] < 0 or out[-1] >= count:
        raise UsageError(f"{len(out)} of {count} documents are held out: hold some out by their positions, and not all")
    layers = sorted(recyclers)
    sizes = {layer: _sizes(recyclers[layer], documents) for layer in layers}

    def inputs_of(chosen: Sequence[int], which: NDArray[np.int64], shuffle: bool) -> _Inputs:
        some, theirs = [documents[i] for i in which], _chosen(labels, which)
        options = {"batch_size": batch_size, "shuffle": shuffle, "bucket": True, "seed": seed, "device": device}
        own = {layer: recyclers[layer] for layer in chosen}
        return _Inputs(read_jointly(own, some, labels=theirs, **options))

    def candidate(chosen: Sequence[int], model: nn.Module, top: float) -> Candidate:
        batches = inputs_of(chosen, rest, True)
        model.to(device)
        torch.manual_seed(seed)  # the same dropout where the same layers have any
        begin = time.perf_counter()
        train(model, batches, rate=top, epochs=epochs, loss=loss)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
        found = evaluate(model, inputs_of(chosen, out, False), metric)
        shares = model.shares() if isinstance(model, WeightedPooling) else [1.0] * (len(chosen) == 1)
        each, total = (sum(column) for column in zip(*(sizes[layer] for layer in chosen), strict=True))
        return Candidate(tuple(chosen), tuple(shares), found, seconds, each, total)

    found = [candidate([layer], prepare(recyclers[layer].reduce(task_model)), rate) for layer in layers]
    if pooling is not None:
        torch.manual_seed(seed)
        found.append(candidate(layers, pooling(len(layers)), pooling_rate))
    return found


class _Inputs:
    """Inputs of models from a joint reader: one layer's rows as a reduced model takes them, else a list of them."""

    def __init__(self, reader: JointReader) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step in self._reader:
            one, *others = step.values()
            inputs = one.model_inputs()
            if others:
                inputs["activations"] = [batch.activations for batch in (one, *others)]
            yield inputs


def _sizes(recycler: CachedLayer, documents: Sequence[Document]) -> tuple[int, int]:
    """Return the bytes of a token's row and of all rows of these documents."""
    each = recycler.recipe.row_bytes
    keys = list(dict.fromkeys(recycler.keys(documents)))
    return each, each * int(recycler.space.lengths(keys).sum())


def _chosen(labels: Any, which: NDArray[np.int64]) -> Any:
    labels = out_of_column(labels)
    if isinstance(labels, list | tuple):
        return [labels[i] for i in which.tolist()]
    return to_numpy(labels)[which]  # by position, as a Series is not indexed

"""What a recycler does with task models."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from actcache.errors import VerificationError
from actcache.format.keys import Document
from actcache.format.recipe import Recipe
from actcache.models import loading, replay, verification
from actcache.models.agreement import Agreement
from actcache.models.documents import listed
from actcache.models.filling import Filler
from actcache.models.lower_half import LowerHalf
from actcache.models.matching import check_same_lower_half, check_same_numbers
from actcache.models.tokenizing import DocumentEncoder
from actcache.models.training.regimes import (
    Prepared,
    Regime,
    StoredBatches,
    TextBatches,
    TokenDataset,
    with_frozen_lower_half,
)
from actcache.models.verification import Verification
from actcache.reader.labels import of_entries
from actcache.reader.order import Order
from actcache.reader.reader import Reader
from actcache.store.space import Space


class TaskModels:
    """The part of a recycler that reduces task models, loads them, compares them and prepares their training."""

    recipe: Recipe
    space: Space
    reader: Callable[..., Reader]
    _lower: LowerHalf
    _encoder: DocumentEncoder
    _filler: Filler
    _agreement: Agreement

    def reduce(self, task_model: PreTrainedModel) -> PreTrainedModel:
        """Return a copy of a task model that starts from this space's activations; see ``actcache.models.reduce``.

        It knows the recipe that it belongs to, and is saved with it.

        Raises:
            LowerHalfMismatchError: the task model's lower half is not the one that was recorded, or, with the same
                weights and configuration, computes other numbers.
        """
        family = check_same_lower_half(task_model, self.recipe)
        if self._agreement.enabled:
            check_same_numbers(task_model, self.recipe, self._encoder, self._agreement.reference())
        reduced = replay.reduce(task_model, self.recipe.layer, family)
        reduced.__dict__["actcache_recipe"] = self.recipe
        return reduced

    def load_reduced(self, folder: str | os.PathLike[str], **options: Any) -> PreTrainedModel:
        """Return a reduced model that ``save_pretrained`` or the ``Trainer`` wrote; see ``models.load_reduced``.

        Raises:
            LowerHalfMismatchError, ModelError: it belongs to another recipe, or the folder holds none.
        """
        return loading.load_reduced(folder, self.recipe, **options)

    def verify(
        self,
        sample: int = 100,
        *,
        texts: Iterable[Document] | None = None,
        task_model: PreTrainedModel | None = None,
        seed: int = 0,
    ) -> Verification:
        """Compute a sample of documents again and compare with what is stored.

        ``space.verify()`` shows that entries are what was put; this shows that they are what the model computes. An
        entry's relative error may be that of other kernels in the compute dtype (``models.canary.TOLERANCE``) and
        the stored dtype's rounding: 6e-4 for float16 entries computed in float32.

        Args:
            sample: documents to compare, chosen at random; all where there are fewer.
            texts: choose among these, and see that they make the stored tokens; else among all entries, whose token ids
                are stored.
            task_model: a full task model in eval mode, on any device, whose outputs are compared with those of its
                reduced model: each document alone.
            seed: of the choice.

        Raises:
            VerificationError: something is further off; it holds the report.
            CorruptEntryError: an entry fails its checksum.
            MissingEntryError: a text is not in the space.
            LowerHalfMismatchError: the task model's lower half is not the one that was recorded.
        """
        if task_model is not None:
            check_same_lower_half(task_model, self.recipe)
        report = verification.verify(
            self.space, self._lower, self._encoder, sample=sample, texts=texts, task_model=task_model, seed=seed
        )
        if not report.ok:
            raise VerificationError(
                f"the space does not hold what this model computes: {report}. Remove the entries "
                "(space.delete(error.report.failed)) and fill again, or go back to the model that recorded them",
                report,
            )
        return report

    def regime(
        self,
        regime: Regime | str,
        task_model: PreTrainedModel,
        texts: Iterable[Document],
        *,
        labels: Any = None,
        batch_size: int = 32,
        device: Any = "cpu",
        shuffle: bool = False,
        bucket: bool = False,
        max_tokens: int | None = None,
        seed: int = 0,
        drop_last: bool = False,
        **reading: Any,
    ) -> Prepared:
        """Return a copy of a task model, and the batches to train it on, for one of the paper's four regimes.

        ``for batch in batches: model(**batch).loss`` serves all four, and so does the ``Trainer`` with
        ``dataset = batches.dataset()`` and ``data_collator=dataset.collate``. The order of documents depends on the
        options alone.

        Args:
            regime: ``"NR"``, ``"F"``, ``"SR"`` or ``"R"``; see ``actcache.models.training.regimes``.
            task_model: full, with the recorded lower half; not changed.
            texts, labels, batch_size, ...: as of ``reader``. ``device`` is for the batches.
            reading: options of the reader that matter to SR and R alone (``depth``, ``ram_cache``).

        Raises:
            MissingEntryError: R, and documents are not in the space.
            ShapeError: the labels do not fit the documents.
            LowerHalfMismatchError: see ``reduce``.
        """
        kind, documents = Regime.named(regime), listed(texts)
        family = check_same_lower_half(task_model, self.recipe)
        order = Order(batch_size, max_tokens, shuffle, bucket, seed, drop_last)
        if kind in (Regime.RECYCLE, Regime.SAVE_AND_RECYCLE):
            reader = self.reader(
                documents,
                labels=labels,
                device=device,
                on_missing="compute" if kind is Regime.SAVE_AND_RECYCLE else "raise",
                **{**vars(order), **reading},
            )
            return Prepared(self.reduce(task_model), StoredBatches(reader, type(task_model)))
        encoded = self._encoder.encode(documents)
        owners = np.repeat(np.arange(len(documents)), [len(windows) for windows in encoded])
        given = None if labels is None else of_entries(labels, owners, len(documents))
        padding = int(self._lower.base_model.config.pad_token_id or 0)
        entries = [window for windows in encoded for window in windows]
        dataset = TokenDataset(entries, given, padding, type(task_model))
        frozen = kind is Regime.FROZEN
        model = with_frozen_lower_half(task_model, family, self.recipe.layer) if frozen else copy.deepcopy(task_model)
        return Prepared(model, TextBatches(dataset, order, torch.device(device)))

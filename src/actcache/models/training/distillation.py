"""A student that learns from a teacher's stored rows: the teacher is computed once, and never again while it trains.

The student is a reduced model, perhaps of fewer upper layers; beside the labels it learns to give, token by token, the
rows that the teacher gives behind its final layer (as DistilBERT, TinyBERT and MiniLM do with hidden states).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from actcache.errors import ShapeError, TokenizationMismatchError, UsageError
from actcache.format.arguments import whole
from actcache.format.keys import Document
from actcache.models.families import base_model_of, family_of
from actcache.models.tensors import first_parameter
from actcache.models.training.joint import CachedLayer, JointReader, read_jointly


class Distillation(nn.Module):
    """A student with the loss of distillation: its own, and the mean squared error to the teacher's rows. As
    thread-safe as the student; which is what remains when training is over.

    Args:
        student: a reduced or full task model that gives hidden states; used as it is.
        teacher_width: columns of the teacher's rows. Where the student has others, a linear layer, which trains too,
            maps its rows to them.
        weight: of the error to the teacher's rows; the student's own loss has 1.

    Raises:
        UsageError: the width is no whole number of 1 or more, or the weight is negative.
    """

    def __init__(self, student: PreTrainedModel, teacher_width: int, weight: float = 1.0) -> None:
        super().__init__()
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
            raise UsageError(f"the weight of the teacher's rows is 0 or more, not {weight!r:.80}")
        teacher_width = whole("teacher_width", teacher_width, 1)
        base = base_model_of(student)
        family: Any = getattr(student, "actcache_family", None) or family_of(base)
        own, like = family.width_of(base), first_parameter(student)
        self.student, self.weight = student, float(weight)
        self.projection: nn.Module = nn.Identity()
        if own != teacher_width:
            self.projection = nn.Linear(own, teacher_width, dtype=like.dtype, device=like.device)

    def forward(self, teacher_rows: torch.Tensor, attention_mask: torch.Tensor, **inputs: Any) -> Any:
        """Return the student's output; where there are labels, its loss is that of distillation.

        Args:
            teacher_rows: [batch, tokens, teacher_width], in any floating point dtype.
            attention_mask: [batch, tokens], 1 at tokens: padding has no error.
            inputs: the student's others, labels among them.

        Raises:
            ShapeError: the teacher's rows are of other tokens, or of another width.
        """
        output = self.student(attention_mask=attention_mask, **inputs, output_hidden_states=True)
        rows = self.projection(output.hidden_states[-1])
        if rows.shape != teacher_rows.shape:
            raise ShapeError(f"the teacher's rows are {list(teacher_rows.shape)}, and the student's {list(rows.shape)}")
        if output.loss is not None:
            errors = (rows - teacher_rows.to(rows.dtype)).square().mean(-1)
            mask = attention_mask.to(rows.dtype)
            output.loss = output.loss + self.weight * (errors * mask).sum() / mask.sum().clamp_min(1)
        return output


class TeachingBatches:
    """Batches for a ``Distillation`` from stored rows: the student's inputs, and ``teacher_rows``. Not thread-safe.

    Args:
        source: the recycler of the rows that the student starts from.
        teacher: the recycler of the teacher's rows, of the same documents; in another store perhaps.
        options: of ``Recycler.reader``.

    Raises:
        TokenizationMismatchError: the two were recorded with other tokenizers.
        MissingEntryError: documents are not in both spaces.
    """

    def __init__(self, source: CachedLayer, teacher: CachedLayer, texts: Iterable[Document], **options: Any) -> None:
        if source.recipe.tokenizer != teacher.recipe.tokenizer:
            raise TokenizationMismatchError(
                "the student's rows and the teacher's were recorded with two tokenizers, so they are not of the same "
                "tokens: record both with one"
            )
        self.reader: JointReader = read_jointly({0: source, 1: teacher}, texts, **{"device": "cpu", **options})

    def __len__(self) -> int:
        return len(self.reader)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is."""
        self.reader.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step in self.reader:
            yield {**step[0].model_inputs(), "teacher_rows": step[1].activations}

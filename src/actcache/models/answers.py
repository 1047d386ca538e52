"""Labels of answers: ``[batch, 2]``, first and last token, for heads that take them as two arguments."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from actcache.entries.batch import ANSWER_NAMES
from actcache.errors import ModelError, ShapeError


def takes_answers(task_class: Any) -> bool:
    """Return whether a task model's loss is one of answers: it has positions in the place of ``labels``."""
    parameters = inspect.signature(task_class.forward).parameters
    return set(ANSWER_NAMES) <= parameters.keys() and "labels" not in parameters


def with_the_heads_names(inputs: dict[str, Any], task_class: Any) -> dict[str, Any]:
    """Return keyword arguments with the labels under the names that the head has for them; see ``as_positions``."""
    return as_positions(inputs, task_class) if takes_answers(task_class) else inputs


def as_positions(inputs: dict[str, Any], task_class: Any) -> dict[str, Any]:
    """Return keyword arguments in which ``labels`` [batch, 2] have become the two positions; others stay.

    Raises ``ShapeError`` for labels of another form, and ``ModelError`` where answers are there under both names.
    """
    labels = inputs.get("labels")
    named = {name: value for name, value in inputs.items() if name != "labels"}
    if labels is None:
        return named
    if any(named.get(name) is not None for name in ANSWER_NAMES):
        raise ModelError(f"answers are given twice, as labels and as {' and '.join(ANSWER_NAMES)}: leave one out")
    if not isinstance(labels, torch.Tensor) or labels.ndim != 2 or labels.shape[1] != 2 or labels.is_floating_point():
        found = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise ShapeError(
            f"the labels of a {task_class.__name__} are [batch, 2] whole numbers, an answer's first and last token, "
            f"not {found}"
        )
    return {**named, **dict(zip(ANSWER_NAMES, labels.unbind(1), strict=True))}

"""Pruning a model's vocabulary, and undoing it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actcache.errors import ModelError, UsageError
from actcache.format.arguments import whole_numbers
from actcache.models.partial_vocabulary import KEPT, ROW_IDS, kept_of
from actcache.models.tensors import dtype_name
from actcache.models.vocabulary import embedding_rows, hooks
from actcache.models.vocabulary.counts import Vocabulary
from actcache.models.vocabulary.embedding_rows import Tokens, marked
from actcache.models.vocabulary.full_matrix import checksum, full_matrices
from actcache.models.vocabulary.kept import MARK, KeptVocabulary, OnUnseen


class Pruned:
    """A model of which only some tokens' embeddings are held. Not thread-safe, as the model's training is not.

    The model is called as ever, with the tokenizer's ids; ``num_embeddings`` and ``config.vocab_size`` are the rows
    that it holds. Where it has logits over the vocabulary, they are over the rows, and labels are turned into rows.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        kept = kept_of(model)
        if not isinstance(kept, KeptVocabulary):
            raise ModelError(f"the vocabulary of this {type(model).__name__} is not pruned")
        self.model = model
        self._kept = kept

    @property
    def size(self) -> int:
        """Tokens of the whole vocabulary."""
        return self._kept.size

    @property
    def ids(self) -> NDArray[np.int64]:
        """``[rows]``: the token of each row. Tokens that the vocabulary grew by come last."""
        return self._kept.ids.numpy().copy()

    @property
    def saved_bytes(self) -> int:
        """Bytes that the model's parameters are smaller by; gradients and each state of an optimizer save as much."""
        parameters = {id(p): p for module, mark in marked(self.model) for p in map(module.get_parameter, mark.names)}
        rows = len(self._kept.ids)
        return sum(p.numel() // rows * p.element_size() * (self.size - rows) for p in parameters.values())

    def rows_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of token ids, int64 of the same shape, on their device; raises ``UnseenTokenError``."""
        return self._kept.rows_of(ids)

    def ids_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the token ids of rows (the ``argmax`` of logits, say), int64 of the same shape, on their device."""
        return self._kept.ids.to(rows.device)[rows.long()]

    def track(self, *optimizers: torch.optim.Optimizer) -> None:
        """Have the state of optimizers, which are not kept alive, follow when rows are added or restored."""
        for optimizer in optimizers:
            self._kept.optimizers.track(optimizer)

    def grow(self, ids: Iterable[int] | Vocabulary) -> None:
        """Add the rows of tokens, as they were before pruning; what is there already stays as it is.

        Raises:
            UnseenTokenError: they are no tokens of the model.
            ModelError: the rows are not at hand.
        """
        wanted = ids.ids if isinstance(ids, Vocabulary) else whole_numbers("token ids", ids)
        unseen = self._kept.unseen(torch.from_numpy(wanted))
        if len(unseen):
            embedding_rows.grow(self.model, self._kept, unseen)

    def whole_logits(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which a language model's logits are over the whole vocabulary, minus infinity for tokens
        without a row; the loss is the same. ``model.generate`` runs in it by itself."""
        return hooks.whole_logits(self.model)

    def restore(self) -> PreTrainedModel:
        """Put the rows back into the whole matrices and return the model, which is as if it had never been pruned.

        Rows that were held are as training has left them, the others as they were before pruning. The state of
        optimizers that are tracked is restored likewise, zero where there was none.

        Raises:
            ModelError: the other rows are not at hand.
        """
        model, kept = self.model, self._kept
        embedding_rows.move_rows(model, kept, torch.arange(kept.size))
        for module, mark in marked(model):
            if isinstance(module, nn.Embedding) and mark.padding_idx is not None:
                module.padding_idx = mark.padding_idx
        for module in model.modules():
            hooks.remove(module)
            module._buffers.pop(ROW_IDS, None)
            module._non_persistent_buffers_set.discard(ROW_IDS)
            for name in (KEPT, MARK):
                module.__dict__.pop(name, None)
        return model

    def __repr__(self) -> str:
        return f"<Pruned {type(self.model).__name__}: {len(self._kept.ids)} of {self.size} tokens>"


def prune_vocabulary(
    model: PreTrainedModel,
    vocabulary: Vocabulary | Iterable[int],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    on_unseen: OnUnseen = "raise",
    full_matrix: str | Path = "memory",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Pruned:
    """Drop the embeddings of tokens that a corpus does not use (Williams and Aletras, arXiv:2309.08708). In place.

    Input embeddings, output embeddings and their bias lose the same rows, and what is tied stays tied. Outputs for the
    tokens that are kept are the same, but for logits over the vocabulary, which are over the rows that are kept. Frozen
    flags, gradients and the optimizer's state stay. Do it before the model is wrapped (``DataParallel``, ...).

    Args:
        vocabulary: the ids to keep, usually from ``count_vocabulary``. Those that the configuration names (padding, end
            of text, ...) and 0 are kept in any case.
        optimizer: one that trains the model already; give later ones to ``track``.
        on_unseen: what becomes of a token that is not kept: ``"raise"`` an error that names it, or ``"grow"`` the
            matrices by its row before the call goes on.
        full_matrix: where the dropped rows stay, for growing, restoring and the digest of a recipe: in ``"memory"`` (of
            the CPU), in the ``"checkpoint"`` that the model was loaded from, whose safetensors files are mapped and
            compared with the model first, or in a safetensors file of this path, which is written.
        tokenizer: names tokens in errors; that of the vocabulary by default.

    Raises:
        UnsupportedModelError: the model has no embedding matrix, or more than this knows.
        ModelError: it is pruned already, or the checkpoint has other embeddings than the model.
        UsageError: ids that the model does not have, or an unknown option.
    """
    if on_unseen not in ("raise", "grow"):
        raise UsageError(f"on_unseen {on_unseen!r} is neither 'raise' nor 'grow'")
    if kept_of(model) is not None:
        raise ModelError(
            f"the vocabulary of this {type(model).__name__} is pruned already: use Pruned(model).grow(ids)"
        )
    tokens = embedding_rows.tokens_of(model)
    if not isinstance(vocabulary, Vocabulary):
        vocabulary = Vocabulary.of(vocabulary)
    padding = {mark.padding_idx for _, mark in tokens.marks if mark.padding_idx is not None}
    special = [i for i in {*embedding_rows.special_ids(model), *padding} if 0 <= i < tokens.size]
    ids = np.union1d(vocabulary.ids, np.array(special, np.int64))
    if ids[-1] >= tokens.size:
        raise UsageError(
            f"token id {ids[-1]} is to be kept and {type(model).__name__} has 0..{tokens.size - 1}: is it the "
            "vocabulary of another model's tokenizer?"
        )
    kept = KeptVocabulary(
        tokens.size,
        torch.arange(tokens.size),
        full_matrices(model, tokens, full_matrix),
        has_output=tokens.has_output,
        on_unseen=on_unseen,
        tokenizer=tokenizer or vocabulary.tokenizer,
    )
    if optimizer is not None:
        kept.optimizers.track(optimizer)
    source = next(iter(tokens.parameters.values()))
    record = {"size": tokens.size, "dtype": dtype_name(source.dtype), "xxh3_128": checksum(source, source.dtype)}
    for name, parameter in tokens.parameters.items():
        kept.optimizers.check(parameter, name)  # before anything is changed
    return hold(model, tokens, kept, torch.from_numpy(ids), record)


def hold(
    model: PreTrainedModel, tokens: Tokens, kept: KeptVocabulary, ids: torch.Tensor, record: dict[str, Any]
) -> Pruned:
    """Have a model hold the rows of some tokens, look them up by token ids, and be saved with ``record``."""
    embedding_rows.own_configs(model)
    for module, mark in tokens.marks:
        module.__dict__.update({KEPT: kept, MARK: mark})
    for root in embedding_rows.roots_of(model, kept):
        root.__dict__[KEPT] = kept
    embedding_rows.move_rows(model, kept, ids)
    hooks.install(model, tokens.embeddings, record)
    return Pruned(model)

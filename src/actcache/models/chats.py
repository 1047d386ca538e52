"""Conversations as documents: the tokenizer's chat template makes token ids of them, and says what the assistant said.

A conversation's key is that of its token ids. So a sample is found by its tokens, whatever the order of the data set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from actcache.errors import DocumentError, UsageError
from actcache.format.arguments import whole
from actcache.models.documents import streamed


@dataclass(frozen=True)
class Chats:
    """Conversations as a model takes them, one after another."""

    token_ids: list[NDArray[np.int64]]  # [tokens] each: documents, for ``fill``, ``reader``, ``keys``
    loss_masks: list[NDArray[np.bool_]]  # [tokens] each, True at what the assistant said: a column beside them

    def __len__(self) -> int:
        return len(self.token_ids)


def encode_chats(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[Any],
    *,
    max_length: int | None = None,
    **template: Any,
) -> Chats:
    """Return the token ids of conversations and their assistant masks.

    Args:
        conversations: lists of messages, which are mappings with a ``role`` and a ``content``.
        max_length: tokens after which a conversation is cut; None for no limit.
        template: options of ``apply_chat_template``: ``tools``, ``enable_thinking``, ...

    Raises:
        UsageError: the tokenizer has no chat template, or none that marks what the assistant says.
        DocumentError: a conversation is none, or the template refuses it; it names the position.
    """
    source = getattr(tokenizer, "chat_template", None)
    if not source:
        raise UsageError(
            f"the {type(tokenizer).__name__} has no chat template: set tokenizer.chat_template, or give token ids"
        )
    if max_length is not None:
        max_length = whole("max_length", max_length, 1)
    chats = Chats([], [])
    for position, messages in enumerate(streamed(conversations)):
        if not isinstance(messages, Sequence) or not all(isinstance(one, Mapping) for one in messages) or not messages:
            raise DocumentError(
                f"position {position} is no conversation: give a list of messages with role and content"
            )
        try:
            encoded = tokenizer.apply_chat_template(
                [dict(one) for one in messages],
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **template,
            )
        except Exception as error:  # templates raise what they like
            raise DocumentError(f"position {position}: the chat template refuses the conversation: {error}") from error
        made: Any = encoded
        ids, mask = made["input_ids"], np.array(made["assistant_masks"], bool)
        if not mask.any() and any(one.get("role") == "assistant" for one in messages):
            raise UsageError(
                "the chat template does not mark what the assistant says, so nothing would be trained on: put "
                "{% generation %} and {% endgeneration %} around it in tokenizer.chat_template"
            )
        chats.token_ids.append(np.array(ids, np.int64)[:max_length])
        chats.loss_masks.append(mask[:max_length])
    return chats

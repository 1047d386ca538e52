"""The tokenizer's identity, and the policies for long documents."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import actcache
from actcache.errors import DocumentError, DocumentTooLongError, ModelError, RecipeError
from actcache.models import DocumentEncoder, tokenizer_digest

LONG = "the quick brown fox jumps over the lazy dog " * 5  # 45 tokens


def ids(encoder: DocumentEncoder, document: Any) -> list[list[int]]:
    (windows,) = encoder.encode([document])
    return [window.token_ids.tolist() for window in windows]


def test_the_digest_survives_every_kind_of_call(minilm_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    want, state = tokenizer_digest(tokenizer), tokenizer.backend_tokenizer.to_str()
    for options in (
        {"padding": True},
        {"truncation": True, "max_length": 7},
        {"padding": "max_length", "truncation": True, "max_length": 9, "return_overflowing_tokens": True},
        {},
    ):
        tokenizer(["a text", LONG], **options)
        assert tokenizer_digest(tokenizer) == want
        tokenizer.backend_tokenizer.no_padding()
    tokenizer(["a"], padding=True)
    assert tokenizer.backend_tokenizer.to_str() != state  # what had to be left out


def test_settings_change_the_digest(tokenizer: Any, tmp_path: Path) -> None:
    def changed(how: Any) -> str:
        other = copy.deepcopy(tokenizer)
        how(other)
        return tokenizer_digest(other)

    tokenizer.save_pretrained(tmp_path)
    seen = [
        tokenizer_digest(tokenizer),
        tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path, do_lower_case=False)),
        changed(lambda one: one.add_tokens(["actcache"])),
        changed(lambda one: setattr(one, "truncation_side", "left")),
        changed(lambda one: setattr(one, "split_special_tokens", True)),
        changed(lambda one: setattr(one, "model_input_names", ["input_ids", "attention_mask"])),
    ]
    assert len(set(seen)) == len(seen)
    assert changed(lambda one: setattr(one, "padding_side", "left")) == seen[0]
    assert changed(lambda one: setattr(one, "model_max_length", 9)) == seen[0]
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path)) == seen[0]


def test_the_callers_tokenizer_is_not_changed(minilm_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    before = tokenizer.backend_tokenizer.to_str(), tokenizer.model_max_length
    encoder = DocumentEncoder(tokenizer, 16, "truncate")
    encoder.encode([LONG, ("a", "b")])
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.model_max_length) == before


def test_each_kind_of_document(tokenizer: Any) -> None:
    encoder = DocumentEncoder(tokenizer, 32, extras=("spans", "word_ids"))
    documents = ["Hello world", ("Hello", "world peace"), ["Hello", "worlds", "apart"], [101, 7592, 102], np.array([5])]
    (text,), (pair,), (words,), (given,), (array,) = encoder.encode(documents)
    assert text.token_ids.tolist() == tokenizer("Hello world")["input_ids"]
    assert text.token_ids.dtype == np.int32
    assert text.spans is not None
    assert text.spans.tolist() == [[0, 0], [0, 5], [6, 11], [0, 0]]
    assert text.word_ids is not None
    assert text.word_ids.tolist() == [-1, 0, 1, -1]
    assert pair.token_ids.tolist() == tokenizer("Hello", "world peace")["input_ids"]
    assert pair.type_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert words.word_ids is not None
    assert words.token_ids.tolist() == tokenizer(documents[2], is_split_into_words=True)["input_ids"]
    assert words.word_ids.tolist() == [-1, 0, 1, 2, -1]
    assert given.token_ids.tolist() == [101, 7592, 102]
    assert given.type_ids.tolist() == [0, 0, 0]
    assert given.word_ids is not None
    assert given.word_ids.tolist() == [-1, -1, -1]
    assert array.token_ids.tolist() == [5]
    bare = DocumentEncoder(tokenizer, 32, special_tokens=False)
    assert ids(bare, "Hello world") == [tokenizer("Hello world", add_special_tokens=False)["input_ids"]]
    assert text.spans is not None
    assert bare.encode(["x"])[0][0].spans is None


def test_documents_that_are_too_long(tokenizer: Any) -> None:
    encoder = DocumentEncoder(tokenizer, 16)
    for document, count in ((LONG, 47), ([7] * 17, 17), (("short", LONG), 49), (LONG.split(), 47)):
        with pytest.raises(DocumentTooLongError, match=f"{count} tokens, more than 16.*truncate.*windows") as caught:
            encoder.encode(["fine", document], [4, 7])
        assert "document 7" in str(caught.value)
    truncating = DocumentEncoder(tokenizer, 16, "truncate")
    assert ids(truncating, LONG) == [tokenizer(LONG, truncation=True, max_length=16)["input_ids"]]
    assert ids(truncating, list(range(30))) == [list(range(16))]
    assert ids(truncating, ("a", LONG)) == [tokenizer("a", LONG, truncation=True, max_length=16)["input_ids"]]
    assert len(ids(DocumentEncoder(tokenizer, None), LONG)[0]) == 47


def test_windows_cover_the_document(tokenizer: Any) -> None:
    encoder = DocumentEncoder(tokenizer, 512, actcache.windows(16, stride=4))
    assert encoder.max_length == 16
    content = tokenizer(LONG, add_special_tokens=False)["input_ids"]
    windows = ids(encoder, LONG)
    assert all(window[0] == 101 and window[-1] == 102 and len(window) <= 16 for window in windows)
    assert windows[0][1:-1] + [token for window in windows[1:] for token in window[1:-1][4:]] == content
    assert len(ids(encoder, "short")) == 1
    assert ids(encoder, "short") == ids(DocumentEncoder(tokenizer, 16), "short")
    given = list(range(100, 140))
    cut = ids(encoder, given)
    assert [len(window) for window in cut] == [16, 16, 16]
    assert cut[0] + [token for window in cut[1:] for token in window[4:]] == given
    first, *rest = ids(encoder, ("a question", LONG))
    question = tokenizer("a question")["input_ids"]
    assert rest
    assert all(window[: len(question)] == question for window in (first, *rest))
    mixed = encoder.encode([LONG, "short", given, ("a", LONG), LONG.split()])
    assert [len(windows) > 1 for windows in mixed] == [True, False, True, True, True]


def test_windows_without_room(tokenizer: Any) -> None:
    with pytest.raises(RecipeError, match="2 are special tokens and 14 are stride"):
        DocumentEncoder(tokenizer, None, actcache.windows(16, stride=14))
    with pytest.raises(RecipeError, match="longer than the 8"):
        DocumentEncoder(tokenizer, 8, actcache.windows(16))
    with pytest.raises(DocumentTooLongError, match="first text of document 3"):
        DocumentEncoder(tokenizer, None, actcache.windows(16, stride=4)).encode([(LONG, "short")], [3])
    with pytest.raises(RecipeError, match="no room"):
        DocumentEncoder(tokenizer, 2)
    with pytest.raises(RecipeError, match="'refuse', 'truncate'"):
        DocumentEncoder(tokenizer, 8, "cut")  # type: ignore[arg-type]


def test_documents_without_tokens_or_outside_the_vocabulary(tokenizer: Any) -> None:
    bare = DocumentEncoder(tokenizer, 16, special_tokens=False)
    with pytest.raises(DocumentError, match=r"document 1 \('\\n '\) makes no tokens"):
        bare.encode(["fine", "\n "])
    with pytest.raises(DocumentError, match=r"document 0: token ids must lie in \[0, "):
        bare.encode([[-1, 5]])
    for bad in ([1, 30522], [2**40]):
        with pytest.raises(DocumentError, match=r"document 0 .*vocabulary is 0\.\.30521"):
            bare.encode([bad])
    small = DocumentEncoder(tokenizer, 16, vocabulary=1000)
    with pytest.raises(DocumentError, match="tokenizer of another model"):
        small.encode(["hello world"])
    with pytest.raises(DocumentError, match=r"document 0: .*holds values of float"):
        bare.encode([[1.5]])  # type: ignore[list-item]


def test_a_tokenizer_without_a_vocabulary(tmp_path: Path, minilm_path: str) -> None:
    shutil.copy(Path(minilm_path) / "config.json", tmp_path)
    empty = AutoTokenizer.from_pretrained(tmp_path)  # transformers makes one up
    with pytest.raises(ModelError, match="lacks the tokenizer's files"):
        DocumentEncoder(empty, 16)


def test_a_byte_level_tokenizer(roberta_tokenizer: Any) -> None:
    encoder = DocumentEncoder(roberta_tokenizer, 64)
    (text,), (pair,), (words,) = encoder.encode(["Return a list", ("Return", "it"), ["Return", "it"]])
    assert text.token_ids.tolist() == roberta_tokenizer("Return a list")["input_ids"]
    assert pair.token_ids.tolist() == roberta_tokenizer("Return", "it")["input_ids"]
    assert pair.type_ids.tolist() == [0] * len(pair.token_ids)
    assert words.token_ids.tolist() == roberta_tokenizer("Return it")["input_ids"]

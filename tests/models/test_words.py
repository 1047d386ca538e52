"""Given words, and truncation, under tokenizers of each kind: one rule for all kinds of documents."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    ByT5Tokenizer,
    DebertaV2Tokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    RobertaTokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

import actcache
from actcache.errors import DocumentError
from actcache.models import DocumentEncoder

CORPUS = ["Return it to the list of things", "the cat sat on the mat and it was a b c"] * 20
WORDS = ["the", "cat", "sat", "on", "it"]


def trained(pre_tokenizer: Any, decoder: Any = None, normalizer: Any = None) -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        backend.decoder = decoder
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def parts(backend: Tokenizer) -> dict[str, Any]:
    """Vocabulary and merges, as the classes of models take them."""
    model = json.loads(backend.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def byte_level(prefix: bool) -> Tokenizer:
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel())


def metaspace(scheme: Any) -> Tokenizer:
    return trained(pre_tokenizers.Metaspace(prepend_scheme=scheme), decoders.Metaspace(prepend_scheme=scheme))


def marked(*prepend: Any) -> Tokenizer:
    """As Gemma and the older Llama: a space becomes a mark by the normalizer."""
    backend = trained(
        pre_tokenizers.Split("▁", "merged_with_next"),
        normalizer=normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")]),
    )
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return backend


def fast(backend: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -9.0), *((f"▁{word}", -3.0) for word in WORDS)]
PIECES += [(one, -8.0) for one in "abcdefghijklmnopqrstuvwxyz"]

APART = {
    "byte level, prefix": lambda: fast(byte_level(True)),
    "GPT-2, prefix": lambda: GPT2Tokenizer(**parts(byte_level(True)), add_prefix_space=True),
    "RoBERTa, prefix": lambda: RobertaTokenizer(**parts(byte_level(True)), add_prefix_space=True),
    "Metaspace, always": lambda: fast(metaspace("always")),
    "Metaspace, first": lambda: fast(metaspace("first")),
    "Llama, normalized": lambda: fast(marked(normalizers.Prepend("▁"))),
    "Llama": lambda: LlamaTokenizer(**parts(metaspace("first"))),
    "T5": lambda: T5Tokenizer(vocab=PIECES),
    "XLM-R": lambda: XLMRobertaTokenizer(vocab=PIECES),
    "DeBERTa-v2": lambda: DebertaV2Tokenizer(vocab=PIECES),
}
JOINED = {
    "byte level": lambda: fast(byte_level(False)),
    "GPT-2": lambda: GPT2Tokenizer(**parts(byte_level(False))),
    "RoBERTa": lambda: RobertaTokenizer(**parts(byte_level(False))),
    "Qwen 2": lambda: Qwen2Tokenizer(**parts(byte_level(False))),
    "Metaspace, never": lambda: fast(metaspace("never")),
    "Gemma": lambda: GemmaTokenizer(**parts(metaspace("first"))),
    "Gemma, normalized": lambda: fast(marked()),
    "Llama, no prefix": lambda: LlamaTokenizer(**parts(metaspace("first")), add_prefix_space=False),
    "ByT5": lambda: ByT5Tokenizer(),
}


@pytest.mark.parametrize("name", APART)
def test_words_get_the_tokens_that_they_have_in_a_text(name: str) -> None:
    tokenizer = APART[name]()
    encoder = DocumentEncoder(tokenizer, special_tokens=False, extras=("word_ids",))
    ((words,), (text,)) = encoder.encode([WORDS, " ".join(WORDS)])
    assert words.token_ids.tolist() == text.token_ids.tolist()
    assert words.token_ids.tolist() != tokenizer("".join(WORDS), add_special_tokens=False)["input_ids"]
    assert words.word_ids is not None
    assert sorted(set(words.word_ids.tolist())) == list(range(len(WORDS)))


@pytest.mark.parametrize("name", JOINED)
def test_words_that_would_run_together_are_refused(name: str) -> None:
    tokenizer = JOINED[name]()
    joined = tokenizer(WORDS, is_split_into_words=True, add_special_tokens=False)["input_ids"]
    assert joined != tokenizer(" ".join(WORDS), add_special_tokens=False)["input_ids"]  # transformers says nothing
    encoder = DocumentEncoder(tokenizer, special_tokens=False)
    with pytest.raises(DocumentError, match=rf"document 7 is words.*{type(tokenizer).__name__}.*add_prefix_space"):
        encoder.encode(["fine", ["the", "cat"]], [3, 7])
    (text,) = encoder.encode([" ".join(WORDS)])[0]
    assert text.token_ids.tolist() == tokenizer(" ".join(WORDS), add_special_tokens=False)["input_ids"]


def test_digits_alone_that_would_run_together() -> None:
    """Qwen's prefix goes before each digit, in a text too: as words, 1 and 2 are what the text 12 is."""
    tokenizer = Qwen2Tokenizer(**parts(byte_level(True)), add_prefix_space=True)
    joined = tokenizer(["1", "2"], is_split_into_words=True)["input_ids"]
    assert joined == tokenizer("12")["input_ids"] != tokenizer("1 2")["input_ids"]
    with pytest.raises(DocumentError, match="the words '1', '2'"):
        DocumentEncoder(tokenizer).encode([["1", "2"]])


LETTERS = list("abcdefghijkl")


def cut(tokenizer: Any, too_long: Any, document: Any) -> list[list[str]]:
    """The windows of a document as tokens, without the special ones."""
    windows = DocumentEncoder(tokenizer, 6, too_long).encode([document])[0]
    special = tokenizer.all_special_ids
    return [tokenizer.convert_ids_to_tokens([i for i in one.token_ids.tolist() if i not in special]) for one in windows]


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_side_for_every_kind_of_document(tokenizer: Any, side: str) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.truncation_side = side
    ids = tokenizer.convert_tokens_to_ids(LETTERS)
    kept = LETTERS[-6:] if side == "left" else LETTERS[:6]  # token ids have no special tokens, which take two places
    rest = kept[2:] if side == "left" else kept[:4]
    assert cut(tokenizer, "truncate", " ".join(LETTERS)) == [rest]
    assert cut(tokenizer, "truncate", LETTERS) == [rest]
    assert cut(tokenizer, "truncate", ids) == [kept]
    assert cut(tokenizer, "truncate", ids[:5]) == [LETTERS[:5]]
    pair = cut(tokenizer, "truncate", (" ".join(LETTERS), "x y z"))
    assert pair == [["k", "l", "z"] if side == "left" else ["a", "b", "x"]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_windows_go_from_the_beginning_on(tokenizer: Any, side: str) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.truncation_side = side
    spec = actcache.windows(6, 1)
    ids = tokenizer.convert_tokens_to_ids(LETTERS)
    of_text = [LETTERS[i : i + 4] for i in (0, 3, 6, 9)]
    assert cut(tokenizer, spec, " ".join(LETTERS)) == of_text
    assert cut(tokenizer, spec, LETTERS) == of_text
    assert cut(tokenizer, spec, ids) == [LETTERS[i : i + 6] for i in (0, 5, 10)]
    of_pair = cut(tokenizer, spec, ("a", " ".join(LETTERS)))
    assert [window[1] for window in of_pair] == LETTERS[: len(of_pair)]
    assert of_pair[-1][-1] == "l"
    assert tokenizer.truncation_side == side  # the caller's own

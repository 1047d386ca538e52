"""Counting: against a plain Counter over the tokenizer's own output."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actcache
from actcache.errors import DocumentError, MissingEntryError, UsageError
from actcache.models import canary
from actcache.models.recycler import Recycler
from actcache.models.vocabulary import Vocabulary, count_stored, count_vocabulary
from tests.support import recipe


def oracle(tokenizer: Any, texts: list[Any], **options: Any) -> Counter[int]:
    return Counter(i for text in texts for i in tokenizer(text, **options)["input_ids"])


def counted(vocabulary: Vocabulary) -> dict[int, int]:
    return {int(i): int(vocabulary.counts[i]) for i in np.flatnonzero(vocabulary.counts)}


@pytest.mark.parametrize("threads", [1, 3])
def test_counts_equal_a_counters(tokenizer, docstrings, threads):
    vocabulary = count_vocabulary(iter(docstrings), tokenizer, threads=threads)
    expected = oracle(tokenizer, docstrings)
    assert counted(vocabulary) == expected
    assert vocabulary.documents == len(docstrings)
    assert vocabulary.tokens == sum(expected.values())
    always = set(tokenizer.all_special_ids) | set(oracle(tokenizer, list(canary.TEXTS)))
    assert set(vocabulary.ids.tolist()) == set(expected) | always
    assert len(vocabulary) == len(vocabulary.ids)
    assert tokenizer.mask_token_id in vocabulary  # it does not occur
    assert tokenizer.mask_token_id not in expected


def test_every_kind_of_document(tokenizer):
    documents: list[Any] = ["one text", ("a pair", "of texts"), ["words", "in", "lists"], [7592, 2088], np.array([999])]
    vocabulary = count_vocabulary(documents, tokenizer, special_tokens=False)
    plain = {"add_special_tokens": False}
    expected = oracle(tokenizer, ["one text", "a pair", "of texts", "words in lists"], **plain)
    assert counted(vocabulary) == expected + Counter([7592, 2088, 999])


def test_documents_are_streamed(tokenizer):
    """A source without an end is read no further than what is under way."""
    taken = itertools.count()

    def source():
        for number in taken:
            yield "" if number == 3000 else f"document {number}"
            assert number < 20000, "the whole source was read"

    with pytest.raises(DocumentError, match="document 3000"):
        count_vocabulary(source(), tokenizer, special_tokens=False, threads=2)


def test_long_documents_are_counted_to_their_end(tokenizer):
    text = "word " * 2000 + "zebra"
    assert tokenizer.convert_tokens_to_ids("zebra") in count_vocabulary([text], tokenizer)


def test_vocabularies_add_up(tokenizer, docstrings):
    first, second = docstrings[:50], docstrings[50:90]
    both = count_vocabulary(first, tokenizer) | count_vocabulary(second, tokenizer, keep=[29999])
    assert counted(both) == oracle(tokenizer, first + second)
    assert both.documents == 90
    assert 29999 in both
    assert both.tokenizer is tokenizer
    other = Vocabulary.of([40000, 40000, 3]) | both
    assert other.counts[40000] == 2
    assert "90 documents" in repr(both)


def test_what_is_no_corpus(tokenizer):
    with pytest.raises(UsageError, match="not one text"):
        count_vocabulary("one text", tokenizer)
    with pytest.raises(UsageError, match="token ids"):
        Vocabulary.of([-1])
    with pytest.raises(UsageError, match="token ids"):
        Vocabulary.of(np.array([0.5]))
    assert len(Vocabulary.of([])) == 0


def test_a_store_is_counted_without_tokenizing(tmp_path: Path, minilm, tokenizer, docstrings, monkeypatch):
    texts = docstrings[:12]
    monkeypatch.setattr("actcache.models.vocabulary.counts._ROWS", 100)  # several reads
    with Recycler(minilm, tokenizer, layer=3, store=tmp_path / "store", max_length=24, too_long="truncate") as recycler:
        recycler.fill(texts, progress=False)
        expected = oracle(tokenizer, texts, truncation=True, max_length=24)
        canaries = oracle(tokenizer, list(canary.TEXTS), truncation=True, max_length=24)
        vocabulary = count_stored(recycler.space)
        assert counted(vocabulary) == expected
        assert set(vocabulary.ids.tolist()) == set(expected) | set(canaries)
        assert vocabulary.documents == 12

        special = count_stored(recycler.space, tokenizer=tokenizer, keep=[5000])
        assert {tokenizer.mask_token_id, 5000} <= set(special.ids.tolist())

        keys = recycler.keys(texts[:7])
        store = recycler._store
        store.put_collection("few", keys)
        few = oracle(tokenizer, texts[:7], truncation=True, max_length=24)
        assert counted(count_stored(recycler.space, keys)) == few
        assert counted(count_stored(recycler.space, store.collection("few"))) == few
        with pytest.raises(MissingEntryError, match="1 of 2") as raised:
            count_stored(recycler.space, [keys[0], actcache.document_key("absent")])
        assert raised.value.keys == [actcache.document_key("absent")]


def test_entries_without_token_ids(tmp_path: Path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        assert len(count_stored(space)) == 0
        space.put([actcache.document_key("a")], [np.zeros((3, 8), np.float32)])
        with pytest.raises(UsageError, match="no token ids"):
            count_stored(space)

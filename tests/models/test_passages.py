"""Passages: what the model is given for them, what a revision computes, and what readers deliver of them.

The oracle is the full model, run on the passages' tokens by transformers alone.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForTokenClassification, PreTrainedModel

import actcache
from actcache.errors import DocumentError, MissingEntryError, RecipeError, ShapeError, UsageError
from actcache.format.keys import document_key
from actcache.models.recycler import Recycler
from actcache.models.recyclers import Recyclers
from actcache.models.tokenizing import DocumentEncoder
from actcache.store.store import Store
from tests.support import backends

LAYER = 2
SPEC = actcache.passages(34, least=8)  # 32 tokens of its own
PARAGRAPHS = [
    " ".join(f"{word} {i * 7 % 23} {other}" for i in range(n, n + 6)) + "."
    for n, (word, other) in enumerate(itertools.product(["cats", "dogs", "trees", "stars"], ["run", "sleep", "shine"]))
]
LONG = "\n\n".join(PARAGRAPHS)
OTHER = "\n\n".join(PARAGRAPHS[5:]) + "\n\nAnother end."
SHORT = "A short document."


@pytest.fixture(scope="module")
def model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model(AutoModel)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with actcache.open(tmp_path / "store") as store:
        yield store


def _recycler(model: Any, tokenizer: Any, store: Any, spec: Any = SPEC, **options: Any) -> Recycler:
    return Recycler(
        model, tokenizer, layer=LAYER, store=store, dtype="float32", max_length=66, too_long=spec, **options
    )


def _rows(model: PreTrainedModel, ids: Any) -> Any:
    """What the full model makes of token ids at the layer."""
    with torch.inference_mode():
        states = model(input_ids=torch.from_numpy(np.asarray(ids, np.int64))[None], output_hidden_states=True)
    return states.hidden_states[LAYER][0].numpy()


def _contents(recycler: Recycler, text: str) -> list[bytes]:
    return [one.key() for one in recycler.passages([text])[0]]


@backends.each(everyday=("hdf5", "lmdb"))
def test_passages_are_stored_once_and_hold_what_the_full_model_makes_of_them(
    kind: backends.Kind, model: PreTrainedModel, tokenizer: Any, tmp_path: Path
) -> None:
    texts = [LONG, SHORT, OTHER, LONG]
    with _recycler(model, tokenizer, kind.url(tmp_path / "store")) as recycler:
        report = recycler.fill(texts, progress=False)
        outline = recycler.outline(texts)
        assert (report.documents, report.computed, report.present) == (4, 4, 0)
        assert report.passages == len(outline)
        assert report.new_passages == len(outline.distinct) == len(recycler.space) < len(outline)
        assert report.tokens + report.reused_tokens == outline.lengths.sum()
        entries: Any = recycler.space.get(outline.keys)
        for one, entry in zip(itertools.chain.from_iterable(recycler.passages(texts)), entries, strict=True):
            assert entry.token_ids.tolist() == one.token_ids.tolist()
            np.testing.assert_allclose(entry.activations, _rows(model, one.token_ids), atol=1e-5)
        again = recycler.fill(texts, progress=False)
        assert (again.present, again.computed, again.tokens, again.new_passages) == (4, 0, 0, 0)
        assert recycler.verify(texts=texts, sample=4).documents == len(outline.distinct)


@pytest.mark.parametrize("by", ["paragraphs", "tokens"])
def test_insertion_at_the_front_computes_at_most_two_passages(
    by: Any, model: PreTrainedModel, tokenizer: Any, store: Store, tmp_path: Path
) -> None:
    spec = actcache.passages(34, least=8, by=by)
    revised = "A new front.\n\n" + LONG
    with _recycler(model, tokenizer, store, spec) as recycler, actcache.open(tmp_path / "fresh") as other:
        recycler.fill([LONG], progress=False)
        assert recycler.missing([LONG, revised]) == [1]
        report = recycler.fill([revised], progress=False)
        assert 1 <= report.new_passages <= 2
        assert report.passages > 8
        with _recycler(model, tokenizer, other, spec) as fresh:
            fresh.fill([revised], progress=False)
            found: list[Any] = [one.space.get(fresh.keys([revised])) for one in (recycler, fresh)]
            for mine, theirs in zip(*found, strict=True):
                np.testing.assert_allclose(mine.activations, theirs.activations, atol=1e-5)


def test_statistics_are_of_the_passages_once_each(model: PreTrainedModel, tokenizer: Any, store: Store) -> None:
    texts = [LONG, SHORT, LONG, OTHER]
    with _recycler(model, tokenizer, store) as recycler:
        recycler.fill(texts, progress=False)
        different = {one.key(): one.token_ids for cut in recycler.passages(texts) for one in cut}
        rows = np.concatenate([_rows(model, ids) for ids in different.values()]).astype(np.float64)
        found = recycler.space.statistics()
        assert found.count == len(rows) < recycler.outline(texts).lengths.sum()
        np.testing.assert_allclose(found.mean, rows.mean(0), atol=1e-5)
        np.testing.assert_allclose(found.variance, rows.var(0), atol=1e-4)


def test_all_specs_share_a_space_and_a_short_document_is_what_a_whole_one_is(
    model: PreTrainedModel, tokenizer: Any, store: Store
) -> None:
    with _recycler(model, tokenizer, store) as one:
        assert one.recipe.format_version == 4
        one.fill([SHORT], progress=False)
    with _recycler(model, tokenizer, store, actcache.passages(60)) as other:
        assert one.recipe == other.recipe
        assert other.missing([SHORT, LONG]) == [1]
        (passage,) = other.passages([SHORT])[0]
        assert passage.token_ids.tolist() == tokenizer(SHORT)["input_ids"]


def test_a_passage_knows_its_characters_and_words_in_the_document(model: PreTrainedModel, tokenizer: Any) -> None:
    encoder = DocumentEncoder(tokenizer, 66, SPEC)
    plain = tokenizer(LONG, add_special_tokens=False, return_offsets_mapping=True)
    words = plain.word_ids()
    cut = encoder.cut([LONG])[0]
    assert len(cut) > 3
    for one in cut:
        own = slice(one.begin, one.end)
        whole = slice(one.first, one.first + one.own)
        assert one.token_ids[own].tolist() == plain["input_ids"][whole]
        assert one.spans[own].tolist() == [[*pair] for pair in plain["offset_mapping"][whole]]
        assert one.word_ids[own].tolist() == words[whole]
        assert one.word_ids[[0, -1]].tolist() == [-1, -1]
    assert sum(one.own for one in cut) == len(plain["input_ids"])


def test_the_key_covers_the_context(model: PreTrainedModel, tokenizer: Any) -> None:
    spec = actcache.passages(46, context=6, least=8)
    encoder = DocumentEncoder(tokenizer, 66, spec)
    plain = tokenizer(LONG, add_special_tokens=False)["input_ids"]
    cut = encoder.cut([LONG])[0]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    for one in cut:
        around = plain[max(0, one.first - 6) : one.first + one.own + 6]
        assert one.token_ids.tolist() == [cls, *around, sep]
        assert one.key() == document_key([cls, *around, sep])
        assert len(one.token_ids) <= 46
    # another word in front of a passage changes it, one further away does not
    place = cut[2].spans[cut[2].begin][0]
    near = LONG[: place - 5] + "x" + LONG[place - 4 :]
    assert cut[2].key() in {one.key() for one in encoder.cut(["x " + LONG])[0]}
    assert cut[2].key() not in {one.key() for one in encoder.cut([near])[0]}


def test_words_and_token_ids_are_cut_too_and_ids_get_no_special_tokens(tokenizer: Any) -> None:
    encoder = DocumentEncoder(tokenizer, 66, SPEC)
    words = LONG.split()
    ids = tokenizer(LONG, add_special_tokens=False)["input_ids"]
    of_words, of_ids = encoder.cut([words, ids])
    assert len(of_words) > 3
    assert np.concatenate([one.token_ids[1:-1] for one in of_words]).tolist() == ids
    assert np.concatenate([one.token_ids for one in of_ids]).tolist() == ids
    starts = {one.word_ids[one.begin] for one in of_words}
    assert len(starts) == len(of_words)


def test_a_reader_delivers_passages_with_their_documents_labels(
    model: PreTrainedModel, tokenizer: Any, store: Store
) -> None:
    texts = [LONG, SHORT]
    with _recycler(model, tokenizer, store) as recycler:
        recycler.fill(texts, progress=False)
        outline = recycler.outline(texts)
        (batch,) = recycler.reader(texts, labels=[5, 6], batch_size=99)
        assert batch.documents.tolist() == outline.documents.tolist()
        assert batch.labels.tolist() == [5 + i for i in outline.documents]
        assert sum(map(len, recycler.rows(texts, batch_size=64))) == outline.lengths.sum()


@pytest.mark.parametrize("special", [False, True])
def test_labels_of_tokens_go_to_the_passage_whose_own_the_token_is(
    special: bool, model: PreTrainedModel, tokenizer: Any, store: Store
) -> None:
    spec = actcache.passages(46, context=6, least=8)
    texts = [LONG, SHORT, OTHER]
    given = [np.array(tokenizer(text, add_special_tokens=special)["input_ids"]) for text in texts]
    with _recycler(model, tokenizer, store, spec) as recycler:
        recycler.fill(texts, progress=False)
        (batch,) = recycler.reader(texts, labels=given, batch_size=99)
        passages = [one for cut in recycler.passages(texts) for one in cut]
        for one, ids, labels in zip(passages, batch.token_ids, batch.labels, strict=True):
            own = slice(one.begin, one.end)
            assert labels[own].tolist() == ids[own].tolist() == one.token_ids[own].tolist()
            assert (np.delete(labels.numpy(), np.r_[own]) == -100).all()
        with pytest.raises(ShapeError, match=r"position 1: \d+ tokens and 3 labels"):
            recycler.reader(texts, labels=[given[0], [1, 2, 3], given[2]])


def test_a_reduced_model_on_passages_equals_the_full_model_on_their_tokens(
    make_model: Callable[..., PreTrainedModel], tokenizer: Any, store: Store
) -> None:
    task = make_model(AutoModelForTokenClassification, num_labels=3)
    spec = actcache.passages(46, context=6, least=8)
    with _recycler(task, tokenizer, store, spec) as recycler:
        recycler.fill([LONG], progress=False)
        reduced: Any = recycler.reduce(task)
        reduced.eval()
        passages = recycler.passages([LONG])[0]
        with torch.inference_mode():
            (batch,) = recycler.reader([LONG], batch_size=99)
            found = reduced(**batch.model_inputs()).logits
            for logits, one in zip(found, passages, strict=True):
                ids = torch.from_numpy(one.token_ids.astype(np.int64))[None]
                expected = task(input_ids=ids).logits[0]
                torch.testing.assert_close(logits[: len(one.token_ids)], expected, atol=1e-5, rtol=1e-5)


def test_a_reader_computes_the_passages_that_are_missing(model: PreTrainedModel, tokenizer: Any, store: Store) -> None:
    texts = [LONG, SHORT, LONG, OTHER]
    with _recycler(model, tokenizer, store) as recycler:
        recycler.fill([OTHER], progress=False)
        with pytest.raises(MissingEntryError, match="3 of 4 documents have passages that are not in the space"):
            recycler.reader(texts)
        reader = recycler.reader(texts, labels=[0, 1, 2, 3], batch_size=4, bucket=True, on_missing="compute")
        batches = [*reader]
        assert len(recycler.space) == len(recycler.outline(texts).distinct)
        assert sorted(np.concatenate([b.documents for b in batches])) == recycler.outline(texts).documents.tolist()
        assert all((batch.labels == torch.as_tensor(batch.documents)).all() for batch in batches)
        assert recycler.missing(texts) == []


def test_several_layers_shares_and_bounds_know_passages(model: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    texts = [LONG, SHORT, OTHER]
    options: dict[str, Any] = {"dtype": "float32", "max_length": 66, "too_long": SPEC}
    with Recyclers(model, tokenizer, layers=[1, 2], store=tmp_path / "store", **options) as recyclers:
        reports = [recyclers.fill(texts, partition=(i, 2), progress=False) for i in range(2)]
        total = reports[0] + reports[1]
        assert (total.documents, total.computed) == (3, 3)
        assert total.new_passages == len(recyclers[1].space) == len(recyclers[2].space)
        assert recyclers.missing(texts) == []
    with _recycler(model, tokenizer, tmp_path / "bounded") as recycler:
        report = recycler.fill(texts, max_bytes=70_000, progress=False)
        assert report.left_out + report.computed == 3
        assert report.left_out == len(recycler.missing(texts)) > 0


def test_what_cannot_be_cut_into_passages_is_refused(
    model: PreTrainedModel, tokenizer: Any, roberta_tokenizer: Any, store: Store
) -> None:
    with pytest.raises(RecipeError, match="passages of 80 tokens are longer than the 66 possible"):
        _recycler(model, tokenizer, store, actcache.passages(80))
    with pytest.raises(RecipeError, match="66 tokens that the model takes"):
        Recycler(model, tokenizer, layer=1, store=store, max_length=128, too_long=actcache.passages(100))
    with pytest.raises(RecipeError, match=r"recycler.passages\(texts\) tells them"):
        _recycler(model, tokenizer, store, extras=["spans"])
    with _recycler(model, tokenizer, store) as recycler:
        with pytest.raises(DocumentError, match="document 1 is a pair of texts"):
            recycler.fill(["a", ("a", "b")], progress=False)
        rows: Any = [{"text": "a", "m": [1]}]
        with pytest.raises(UsageError, match="which others share"):
            recycler.fill(rows, field="text", columns=["m"], progress=False)
        with pytest.raises(UsageError, match="cut into passages here"):
            recycler.pooled([SHORT])
    with Recycler(model, tokenizer, layer=LAYER, store=store) as plain, pytest.raises(UsageError, match="cuts no pass"):
        plain.passages([SHORT])


def test_a_byte_level_tokenizers_passages_are_of_the_documents_tokens(roberta_tokenizer: Any) -> None:
    encoder = DocumentEncoder(roberta_tokenizer, 64, SPEC)
    cut = encoder.cut([LONG])[0]
    ids = roberta_tokenizer(LONG, add_special_tokens=False)["input_ids"]
    assert np.concatenate([one.token_ids[one.begin : one.end] for one in cut]).tolist() == ids
    assert all(one.token_ids[[0, -1]].tolist() == [0, 2] for one in cut)
    assert all(one.spans[one.begin][0] == 0 or LONG[one.spans[one.begin][0] - 1 :][:2].strip(" \n") for one in cut)


def test_a_tokenizer_whose_special_tokens_change_a_text_cuts_no_passages(tokenizer: Any) -> None:
    class Odd(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, *given: Any, add_special_tokens: bool = True, **options: Any) -> Any:
            found = super().__call__(*given, add_special_tokens=add_special_tokens, **options)
            if add_special_tokens:
                found["input_ids"] = [101, 7, 102]
            return found

    odd = copy.deepcopy(tokenizer)
    odd.__class__ = Odd
    with pytest.raises(RecipeError, match="passages would be other inputs than texts"):
        DocumentEncoder(odd, 66, SPEC)
    assert DocumentEncoder(odd, 66, SPEC, special_tokens=False).around == (0, 0)


@pytest.mark.long
def test_the_regimes_train_on_the_same_passages_with_the_same_labels(
    make_model: Callable[..., PreTrainedModel], tokenizer: Any, store: Store
) -> None:
    task = make_model(AutoModelForTokenClassification, num_labels=3)
    texts = [LONG, SHORT, OTHER]
    labels = [np.array(tokenizer(text)["input_ids"]) % 3 for text in texts]
    with _recycler(task, tokenizer, store, actcache.passages(46, context=6, least=8)) as recycler:
        recycler.fill(texts, progress=False)
        losses = []
        for regime in ("NR", "F", "R", "SR"):
            model, batches = recycler.regime(regime, task, texts, labels=labels, batch_size=64)
            model.eval()
            with torch.inference_mode():
                losses.append([float(model(**batch).loss) for batch in batches])
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("by", ["paragraphs", "sentences", "tokens"])
def test_real_docstrings_are_cut_alike_wherever_they_stand(by: Any, tokenizer: Any, docstrings: list[str]) -> None:
    """A text of 3,000 tokens and more keeps its passages in another document, but for two at each end."""
    encoder = DocumentEncoder(tokenizer, 512, actcache.passages(128, by=by))
    for start in range(0, 400, 100):
        text = "\n\n".join(docstrings[start : start + 80])
        alone = [one.key() for one in encoder.cut([text])[0]]
        around = f"{docstrings[start + 90]}\n\n{text}\n\n{docstrings[start + 91]}"
        there = {one.key() for one in encoder.cut([around])[0]}
        assert len(alone) > 20
        assert all(key in there for key in alone[2:-2])

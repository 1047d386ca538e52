"""Tokens that a pruned model does not keep: named, or added."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, BartConfig, BartForConditionalGeneration

from actcache.errors import ModelError, UnseenTokenError, UnsupportedModelError, UsageError
from actcache.models import base_model_of
from actcache.models.vocabulary import Pruned, count_vocabulary, prune_vocabulary
from tests.models.vocabulary.families import SIZE, USED, inputs, language_model, make


def test_an_unseen_token_is_named(tokenizer, minilm):
    model = copy.deepcopy(minilm)
    prune_vocabulary(model, count_vocabulary(["one two three"], tokenizer))
    ids = tokenizer("one two zebra", return_tensors="pt")["input_ids"]
    with pytest.raises(UnseenTokenError, match=r"\('zebra'\).*grow") as raised:
        model(input_ids=ids)
    assert raised.value.ids == [tokenizer.convert_tokens_to_ids("zebra")]


@pytest.mark.parametrize("token", [-1, SIZE, 10**6])
@pytest.mark.parametrize("on_unseen", ["raise", "grow"])
def test_what_is_no_token_is_named(token, on_unseen):
    model = make(AutoModel, "bert")
    pruned = prune_vocabulary(model, USED, on_unseen=on_unseen)
    ids = torch.tensor([[7, token]])
    with pytest.raises(UnseenTokenError, match=rf"{token} \(no token of this model\)"):
        model(input_ids=ids)
    with pytest.raises(UnseenTokenError, match="no token"):
        pruned.grow([token])
    assert set(pruned.ids.tolist()) == {0, *USED}


@pytest.mark.parametrize("family", ["bert", "deberta-v3", "t5", "gpt2", "llama"])
def test_a_language_model_grows_by_what_it_is_given(family):
    """By inputs and labels at once, at the first call and between two, while an earlier graph lives."""
    full, model = (make(language_model(family), family) for _ in range(2))
    pruned = prune_vocabulary(model, USED, on_unseen="grow")
    for token in (3, 4):
        batch = inputs(model)
        batch["labels"] = batch["input_ids"][:, :4].clone() if family == "t5" else batch["input_ids"].clone()
        batch["input_ids"][1, 2] = token
        batch["labels"][1, 3] = token + 50
        out = model(**batch)
        with torch.no_grad():
            expected = full(**batch)
        torch.testing.assert_close(out.logits, expected.logits[..., pruned.ids])
        assert pruned.ids[-2:].tolist() == [token, token + 50]
        out.loss.backward()
        assert model.get_input_embeddings().weight.grad.shape == (len(pruned.ids), 32)
        model.zero_grad()
    assert model.config.vocab_size == len(pruned.ids) == len(set(pruned.ids.tolist()))
    pruned.restore()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), full.parameters(), strict=True))


def test_positional_arguments_are_seen_too():
    model = make(AutoModelForSequenceClassification, "bert")
    pruned = prune_vocabulary(model, USED, on_unseen="grow")
    ids = torch.tensor([[7, 4, 5]])
    with torch.no_grad():
        expected = make(AutoModelForSequenceClassification, "bert")(ids).logits
        assert torch.equal(model(ids).logits, expected)
        assert pruned.ids[-2:].tolist() == [4, 5]
        model.bert(torch.tensor([[6]]))  # the base model of a model without a vocabulary's logits grows it too
    assert pruned.ids[-1] == 6


def test_the_base_model_of_a_language_model_cannot_grow_it():
    model = make(language_model("bert"), "bert")
    prune_vocabulary(model, USED, on_unseen="grow")
    with pytest.raises(UnseenTokenError, match="4"):
        base_model_of(model)(torch.tensor([[7, 4]]))


def test_labels_that_are_not_kept():
    model = make(language_model("bert"), "bert")
    prune_vocabulary(model, USED)
    ids = torch.tensor([[7, 10]])
    with pytest.raises(UnseenTokenError, match="3"):
        model(input_ids=ids, labels=torch.tensor([[3, -100]]))
    labels = torch.tensor([[7, -100]], dtype=torch.int32)
    assert model(input_ids=ids, labels=labels.long()).loss.isfinite()


def test_rows_and_ids():
    pruned = prune_vocabulary(make(AutoModel, "modernbert"), USED)
    assert pruned.ids.tolist() == [0, *USED, 197, 198, 199]
    ids = torch.tensor([[7, 199], [0, 10]], dtype=torch.int32)
    rows = pruned.rows_of(ids)
    assert rows.tolist() == [[1, len(pruned.ids) - 1], [0, 2]]
    assert torch.equal(pruned.ids_of(rows), ids.long())
    assert pruned.saved_bytes == (SIZE - len(pruned.ids)) * 32 * 4


def test_inputs_of_any_shape_and_integer():
    model = make(AutoModel, "bert")
    embedding = model.get_input_embeddings()
    expected = embedding(torch.tensor([7, 10]))
    prune_vocabulary(model, USED)
    assert torch.equal(embedding(torch.tensor([7, 10], dtype=torch.int32)), expected)
    assert torch.equal(embedding(input=torch.tensor([7, 10])), expected)
    assert torch.equal(embedding(torch.tensor(7)), expected[0])
    assert embedding(torch.empty(0, dtype=torch.long)).shape == (0, 32)
    with torch.inference_mode():
        assert torch.equal(embedding(torch.tensor([7, 10])), expected)
    embedding(torch.tensor([7])).sum().backward()


def test_what_is_refused():
    model = make(AutoModel, "bert")
    with pytest.raises(UsageError, match=r"200.*0\.\.199"):
        prune_vocabulary(model, [7, SIZE])
    with pytest.raises(UsageError, match="token ids are integers"):
        prune_vocabulary(model, [-3])
    with pytest.raises(UsageError, match="'raise' nor 'grow'"):
        prune_vocabulary(model, USED, on_unseen="ignore")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="is not pruned"):
        Pruned(model)
    assert len(model.get_input_embeddings().weight) == SIZE
    pruned = prune_vocabulary(model, USED)
    with pytest.raises(ModelError, match="pruned already"):
        prune_vocabulary(model, USED)
    pruned.restore()
    with pytest.raises(ModelError, match="is not pruned"):
        Pruned(model)
    prune_vocabulary(model, USED[:3])
    model = make(AutoModel, "bert")
    model.config.vocab_size = 300
    with pytest.raises(ModelError, match=r"200 embeddings.*300"):
        prune_vocabulary(model, USED)
    model = make(AutoModel, "bert")
    model.set_input_embeddings(torch.nn.Linear(3, 3))
    with pytest.raises(UnsupportedModelError, match="Linear"):
        prune_vocabulary(model, USED)
    tiny = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    bart = BartConfig(vocab_size=SIZE, max_position_embeddings=16, **tiny)
    with pytest.raises(UnsupportedModelError, match="final_logits_bias"):
        prune_vocabulary(BartForConditionalGeneration(bart), USED)
    prune_vocabulary(BartForConditionalGeneration(bart).model, USED)
    model = make(language_model("gpt2"), "gpt2")
    with prune_vocabulary(model, USED).whole_logits(), pytest.raises(UsageError, match="return_dict"):
        model(torch.tensor([USED]), return_dict=False)

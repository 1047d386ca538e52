"""Cross-model recycling: a smaller model that reads a larger one's stored rows, compared with plain torch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.normalizers import Lowercase
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    T5ForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import actcache
from actcache import Recycler
from actcache.errors import (
    LayerError,
    LowerHalfMismatchError,
    MissingEntryError,
    ModelError,
    ShapeError,
    TokenizationMismatchError,
    UnsupportedModelError,
    UsageError,
)
from actcache.models.tokenizing import token_ids_digest, tokenizer_digest

Make = Callable[..., PreTrainedModel]

TEXTS = [("good " if i % 2 else "bad ") + f"document {i} says " + "la " * (i % 7) + "." for i in range(12)]
LABELS = np.arange(12) % 2
HOWS = ("add", "concat", "gate")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(make_model: Make, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recycler]:
    """The final rows of the larger model. Shared by the tests: they must not change it."""
    folder = tmp_path_factory.mktemp("consumers") / "store"
    with Recycler(make_model(AutoModel), tokenizer, layer="last", store=folder, dtype="float32") as recycler:
        recycler.fill(TEXTS, progress=False)
        yield recycler


def smaller(make_model: Make, kind: Any = AutoModelForSequenceClassification, **options: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    return make_model(kind, seed=7, **{**sizes, **NO_DROPOUT, **options})


def inputs_of(recycler: Recycler, texts: list[str] = TEXTS, **options: Any) -> Any:
    reader = recycler.reader(texts, labels=LABELS[: len(texts)], batch_size=len(texts), **options)
    return next(iter(reader)).model_inputs()


def test_the_source_is_the_larger_models_final_layer(source: Recycler, make_model: Make, tokenizer: Any) -> None:
    model = make_model(AutoModel)
    with torch.no_grad():
        wanted = model(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state[0]
    rows = source.space.get(source.keys(TEXTS[:1]))[0].activations
    np.testing.assert_allclose(rows, wanted, atol=1e-5)
    assert source.recipe.layer is None or source.recipe.layer == 4


@pytest.mark.parametrize("start", ["itself", "random"])
@pytest.mark.parametrize("how", HOWS)
def test_rows_join_the_embeddings(how: Any, start: Any, source: Recycler, make_model: Make, tokenizer: Any) -> None:
    """By plain torch: the embeddings are made by hand, and go into the task model as inputs_embeds."""
    task = smaller(make_model).eval()
    torch.manual_seed(1)
    consumer: Any = source.consumer(task, tokenizer, how=how, width=24, start=start).eval()
    torch.manual_seed(2)
    for parameter in consumer.bridge.parameters():  # as after training
        nn.init.normal_(parameter, std=0.2)
    inputs = inputs_of(source)
    with torch.no_grad():
        found = consumer(**inputs)
        weights = dict(consumer.bridge.named_parameters())
        embedded = nn.functional.embedding(inputs["token_ids"], task.get_input_embeddings().weight)
        hidden = torch.relu(inputs["activations"] @ weights["mlp.0.weight"].T + weights["mlp.0.bias"])
        assert hidden.shape[-1] == 24
        made = hidden @ weights["mlp.2.weight"].T + weights["mlp.2.bias"]
        if how == "add":
            embedded = embedded + made
        else:
            both = torch.cat([embedded, made], -1) @ weights["join.weight"].T + weights["join.bias"]
            embedded = both if how == "concat" else embedded + made / (1 + torch.exp(-both))
        mask = inputs["attention_mask"]
        wanted = task(inputs_embeds=embedded, attention_mask=mask, labels=inputs["labels"])
        alone = task(input_ids=inputs["token_ids"], attention_mask=mask)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-4, atol=1e-5)
    assert (found.logits - alone.logits).abs().max() > 1e-2  # what is compared is not nothing


@pytest.mark.parametrize("how", HOWS)
def test_it_begins_as_itself_and_learns_the_bridge(
    how: Any, source: Recycler, make_model: Make, tokenizer: Any
) -> None:
    task = smaller(make_model).eval()
    consumer: Any = source.consumer(task, tokenizer, how=how).eval()
    inputs = inputs_of(source)
    with torch.no_grad():
        alone = task(input_ids=inputs["token_ids"], attention_mask=inputs["attention_mask"])
        assert torch.equal(consumer(**inputs).logits, alone.logits)
    optimizer = torch.optim.SGD(consumer.parameters(), 0.5)
    for _ in range(2):  # the first moves the MLP's last layer, and then its first one has a gradient
        optimizer.zero_grad()
        consumer(**inputs).loss.backward()
        optimizer.step()
    still = [name for name, one in consumer.bridge.named_parameters() if not one.grad.any()]
    assert not still
    assert not any(one.grad is not None for one in task.parameters())  # the task model is another


@pytest.mark.parametrize("family", ["distilbert", "roberta", "electra", "modernbert", "gpt2", "llama"])
def test_other_families_read_a_berts_rows(family: str, source: Recycler, make_model: Make, tokenizer: Any) -> None:
    options: dict[str, Any] = {"classifier_dropout": 0.0} if family == "modernbert" else {"max_position_embeddings": 70}
    task = make_model(AutoModelForSequenceClassification, family, seed=7, **options).eval()
    task.config.pad_token_id = 0
    consumer: Any = source.consumer(task, tokenizer).eval()
    inputs = inputs_of(source)
    with torch.no_grad():
        alone = task(input_ids=inputs["token_ids"], attention_mask=inputs["attention_mask"])
        torch.testing.assert_close(consumer(**inputs).logits, alone.logits)
        nn.init.normal_(consumer.bridge.mlp[2].weight)
        assert not torch.allclose(consumer(**inputs).logits, alone.logits, atol=1e-5)


def test_a_real_model_reads_the_rows_of_a_real_one(
    minilm: PreTrainedModel, minilm_path: str, tokenizer: Any, docstrings: list[str], tmp_path: Path
) -> None:
    """MiniLM's final rows, and a consumer of its two lower layers, as plain torch has them; texts of many lengths."""
    texts = docstrings[:12]
    kind = AutoModelForSequenceClassification
    small = kind.from_pretrained(minilm_path, num_labels=3, num_hidden_layers=2).eval()
    options: dict[str, Any] = {"max_length": 64, "too_long": "truncate", "dtype": "float32"}
    with Recycler(minilm, tokenizer, layer="last", store=tmp_path / "s", **options) as recycler:
        recycler.fill(texts, progress=False)
        torch.manual_seed(0)
        consumer: Any = recycler.consumer(small, tokenizer, start="random").eval()
        with torch.no_grad():
            found = consumer(**inputs_of(recycler, texts)).logits
            for text, logits in zip(texts, found, strict=True):
                one = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
                rows = minilm(**one).last_hidden_state
                embedded = small.get_input_embeddings()(one["input_ids"]) + consumer.bridge.mlp(rows)
                wanted = small(inputs_embeds=embedded, attention_mask=one["attention_mask"]).logits[0]
                torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-4)


def test_a_plain_loop_learns_from_rows_alone(source: Recycler, make_model: Make, tokenizer: Any) -> None:
    """Embeddings that say nothing (all zero, frozen): what is learned comes through the bridge."""
    task = smaller(make_model, num_labels=2)
    words: Any = task.get_input_embeddings()
    words.weight.data.zero_()
    words.weight.requires_grad_(False)
    torch.manual_seed(0)
    consumer = source.consumer(task, tokenizer).train()
    optimizer = torch.optim.AdamW([one for one in consumer.parameters() if one.requires_grad], 3e-3)
    for _ in range(30):
        for batch in source.reader(TEXTS, labels=LABELS, batch_size=6, shuffle=True):
            consumer(**batch.model_inputs()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    inputs = inputs_of(source)
    assert (consumer.eval()(**inputs).logits.argmax(1) == inputs["labels"]).all()


@pytest.mark.parametrize("kind", [AutoModelForTokenClassification, AutoModelForMaskedLM, AutoModelForMultipleChoice])
def test_other_heads(kind: Any, source: Recycler, make_model: Make, tokenizer: Any) -> None:
    task = smaller(make_model, kind).eval()
    consumer: Any = source.consumer(task, tokenizer).eval()
    inputs = inputs_of(source)
    del inputs["labels"]
    if kind is AutoModelForMultipleChoice:
        inputs = {name: tensor.view(-1, 3, *tensor.shape[1:]) for name, tensor in inputs.items()}
    with torch.no_grad():
        alone = task(input_ids=inputs["token_ids"], attention_mask=inputs["attention_mask"])
        assert torch.equal(consumer(**inputs).logits, alone.logits)
        nn.init.normal_(consumer.bridge.mlp[2].weight)
        assert not torch.allclose(consumer(**inputs).logits, alone.logits)


@pytest.mark.filterwarnings("ignore")  # the Trainer's own
def test_the_trainer_trains_saves_and_goes_on(
    source: Recycler, make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    """As the plain loop does, to the last loss; a checkpoint goes on to the same weights."""
    task = smaller(make_model)
    dataset = source.reader(TEXTS, labels=LABELS).dataset()
    options: Any = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "seed": 3,
    }
    options |= {"disable_tqdm": True, "save_strategy": "epoch", "num_train_epochs": 2, "lr_scheduler_type": "constant"}

    def trainer() -> Trainer:
        torch.manual_seed(0)
        model: Any = source.consumer(task, tokenizer, how="gate")
        arguments = TrainingArguments(str(tmp_path / "out"), **options)
        return Trainer(model, arguments, train_dataset=dataset, data_collator=dataset.collate)

    whole = trainer()
    whole.train()
    trained = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    for name, tensor in again.model.state_dict().items():
        torch.testing.assert_close(tensor, trained[name], rtol=1e-5, atol=1e-6)
    loaded: Any = source.load_consumer(tmp_path / "out" / "checkpoint-6")
    inputs = inputs_of(source)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, whole.model.eval()(**inputs).logits)


def test_it_is_saved_and_loaded(source: Recycler, make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    consumer: Any = source.consumer(smaller(make_model).eval(), tokenizer, how="concat", start="random")
    consumer.save_pretrained(tmp_path / "c")
    assert sorted(one.name for one in (tmp_path / "c").iterdir()) == ["consumer.json", "model.safetensors"]
    loaded: Any = source.load_consumer(tmp_path / "c")
    copied, pickled = copy.deepcopy(consumer), pickle.loads(pickle.dumps(consumer))  # noqa: S301
    inputs = inputs_of(source)
    with torch.no_grad():
        wanted = consumer(**inputs).logits
        for other in (loaded, copied, pickled):
            assert torch.equal(other(**inputs).logits, wanted)
            nn.init.normal_(other.bridge.mlp[2].weight)  # a copy has a bridge of its own
            assert not torch.equal(other(**inputs).logits, wanted)
        assert torch.equal(consumer(**inputs).logits, wanted)
    with pytest.raises((OSError, ValueError)):  # transformers would load it without the bridge
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "c")
    with pytest.raises(ModelError, match="recycler"):
        type(consumer).from_pretrained(tmp_path / "c")


def test_texts_that_are_not_cached_are_computed(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    """The larger model runs for what is missing, in training and afterwards, and what it gives is as stored."""
    with Recycler(make_model(AutoModel), tokenizer, layer="last", store=tmp_path / "s") as recycler:
        recycler.fill(TEXTS[:4], progress=False)
        with pytest.raises(MissingEntryError):
            inputs_of(recycler)
        torch.manual_seed(0)
        consumer = recycler.consumer(smaller(make_model).eval(), tokenizer, start="random")
        with torch.no_grad():
            computed = consumer(**inputs_of(recycler, on_missing="compute")).logits
            assert recycler.fill(TEXTS, progress=False).computed == 0
            torch.testing.assert_close(consumer(**inputs_of(recycler)).logits, computed)


def test_other_rows_are_refused_when_it_is_loaded(
    source: Recycler, make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    source.consumer(smaller(make_model), tokenizer).save_pretrained(tmp_path / "c")
    with actcache.open(tmp_path / "store") as store:
        other = Recycler(make_model(AutoModel, seed=5), tokenizer, layer="last", store=store, dtype="float32")
        with pytest.raises(LowerHalfMismatchError, match="consumer model"):
            other.load_consumer(tmp_path / "c")
        half = Recycler(make_model(AutoModel), tokenizer, layer="last", store=store, dtype="float16")
        with pytest.raises(ModelError, match="allow="):
            half.load_consumer(tmp_path / "c")
        half.load_consumer(tmp_path / "c", allow=["dtype"])
    with pytest.raises(ModelError, match="no consumer model"):
        source.load_consumer(tmp_path)


def test_what_has_other_token_ids_is_refused(
    source: Recycler, make_model: Make, tokenizer: Any, roberta_tokenizer: Any
) -> None:
    """By what decides the ids, not by names; the error shows a text."""
    task = smaller(make_model)
    with pytest.raises(TokenizationMismatchError, match="The quick brown fox"):
        source.consumer(task, roberta_tokenizer)
    swapped = copy.deepcopy(tokenizer)
    swapped.backend_tokenizer.normalizer = Lowercase()  # accents stay: the same name, vocabulary and class
    assert swapped("the fox")["input_ids"] == tokenizer("the fox")["input_ids"]
    with pytest.raises(TokenizationMismatchError, match="Za"):
        source.consumer(task, swapped)
    renamed = copy.deepcopy(tokenizer)
    renamed.name_or_path, renamed.model_input_names = "another", ["input_ids", "attention_mask"]
    renamed.truncation_side = "left"
    renamed(TEXTS, truncation=True, padding=True, max_length=4)
    assert tokenizer_digest(renamed) != tokenizer_digest(tokenizer)
    assert token_ids_digest(renamed) == token_ids_digest(tokenizer)
    source.consumer(task, renamed)
    with pytest.raises(TokenizationMismatchError, match="and the consumer embeds"):
        source.consumer(smaller(make_model, vocab_size=1000), tokenizer)


def test_what_cannot_be_a_consumer_is_refused(
    source: Recycler, make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    task = smaller(make_model)
    for wrong in ({"how": "multiply"}, {"start": "zero"}, {"width": 0}):
        with pytest.raises(UsageError):
            source.consumer(task, tokenizer, **wrong)
    with pytest.raises(LayerError, match="max_length=16"):
        source.consumer(smaller(make_model, max_position_embeddings=16), tokenizer)
    consumer: Any = source.consumer(task, tokenizer)
    with pytest.raises(ModelError, match="already"):
        source.consumer(consumer, tokenizer)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 2, "vocab_size": 30522}
    t5: Any = T5ForSequenceClassification
    with pytest.raises(UnsupportedModelError, match="other inputs"):
        source.consumer(t5(t5.config_class(**sizes, pad_token_id=0, decoder_start_token_id=0)), tokenizer)
    inputs = inputs_of(source)
    with pytest.raises(ShapeError, match="32"):
        consumer(**{**inputs, "activations": inputs["activations"][..., :16]})
    with pytest.raises(ModelError, match="inputs_embeds"):
        consumer(**inputs, inputs_embeds=torch.zeros(1))
    with pytest.raises(ModelError, match="needs activations"):
        consumer(token_ids=inputs["token_ids"])
    with pytest.raises(ModelError, match="generated"):
        consumer.generate()
    with pytest.raises(UsageError, match="variant"):
        consumer.save_pretrained(tmp_path, variant="fp16")

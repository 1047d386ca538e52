"""The reduced model: every head of every family, what it refuses, and that it can be copied, pickled and trained."""

from __future__ import annotations

import copy
import inspect
import io
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from actcache.errors import LayerError, ModelError, ShapeError, UnsupportedModelError
from actcache.models import Family, base_model_of, reduce, register_family
from actcache.models.families import _FAMILIES

Make = Callable[..., PreTrainedModel]

LAYER = 2
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]])
LABELS = torch.tensor([0, 1, 1])
TOKEN_LABELS = torch.randint(0, 2, MASK.shape, generator=torch.Generator().manual_seed(3))

HEADS: dict[Any, dict[str, torch.Tensor]] = {
    AutoModel: {},
    AutoModelForSequenceClassification: {"labels": LABELS},
    AutoModelForTokenClassification: {"labels": TOKEN_LABELS},
    AutoModelForQuestionAnswering: {"start_positions": LABELS, "end_positions": LABELS},
    AutoModelForMaskedLM: {"labels": TOKEN_LABELS},
    AutoModelForPreTraining: {"labels": TOKEN_LABELS},
    AutoModelForNextSentencePrediction: {"labels": LABELS},
}
ONLY_BERT = (AutoModelForNextSentencePrediction,)


def example(model: PreTrainedModel, layer: int = LAYER) -> dict[str, torch.Tensor]:
    """A padded batch and, from the full model itself, its activations after a layer."""
    ids = torch.randint(5, 900, MASK.shape, generator=torch.Generator().manual_seed(1))
    ids = torch.where(MASK.bool(), ids, int(model.config.pad_token_id or 0))
    with torch.no_grad():
        base = base_model_of(model)
        training = base.training
        base.eval()
        hidden = base(input_ids=ids, attention_mask=MASK, output_hidden_states=True).hidden_states[layer]
        base.train(training)
    return {"activations": hidden, "token_ids": ids, "attention_mask": MASK}


def full_outputs(model: PreTrainedModel, batch: dict[str, torch.Tensor], **labels: torch.Tensor) -> Any:
    return model(input_ids=batch["token_ids"], attention_mask=batch["attention_mask"], **labels)


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("head", list(HEADS), ids=lambda head: head.__name__)
def test_every_head_gives_the_full_models_outputs(head: Any, family: str, make_model: Make) -> None:
    if family != "bert" and head in ONLY_BERT:
        pytest.skip(f"{family} has no such head")
    model = make_model(head, family)
    batch, labels = example(model), dict(HEADS[head])
    if "next_sentence_label" in inspect.signature(model.forward).parameters:
        labels["next_sentence_label"] = LABELS
    for layer in (1, 2, 3):
        reduced = reduce(model, layer)
        with torch.no_grad():
            want, got = full_outputs(model, batch, **labels), reduced(**example(model, layer), **labels)
        assert type(got) is type(want)
        assert got.keys() == want.keys()
        assert ("loss" in got) == bool(labels)
        if "start_logits" in want:  # no answer begins or ends at padding
            for name in ("start_logits", "end_logits"):
                want[name] = want[name].masked_fill(MASK == 0, torch.finfo(torch.float32).min)
            losses = [torch.nn.functional.cross_entropy(want[name], LABELS) for name in ("start_logits", "end_logits")]
            want["loss"] = torch.stack(losses).mean()
        for name in want:
            torch.testing.assert_close(got[name], want[name], atol=1e-5, rtol=1e-5)


def test_other_activations_give_other_outputs(make_model: Make) -> None:
    model = make_model(AutoModelForSequenceClassification)
    batch, reduced = example(model), reduce(model, LAYER)
    with torch.no_grad():
        first = reduced(**batch).logits
        second = reduced(**{**batch, "activations": batch["activations"].flip(0)}).logits
        masked = reduced(**{**batch, "attention_mask": torch.ones_like(MASK)}).logits
    assert not torch.allclose(first, second, atol=1e-3)
    assert not torch.allclose(first, masked, atol=1e-3)


def test_multiple_choice(make_model: Make) -> None:
    model = make_model(AutoModelForMultipleChoice)
    flat = example(model)
    batch = {name: tensor[None] for name, tensor in flat.items()}  # one question, three choices
    reduced = reduce(model, LAYER)
    with torch.no_grad():
        want = model(input_ids=batch["token_ids"], attention_mask=batch["attention_mask"], labels=torch.tensor([1]))
        got = reduced(**batch, labels=torch.tensor([1]))
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", [AutoModel, AutoModelForTokenClassification])
def test_hidden_states_and_attentions_keep_their_numbers(head: Any, make_model: Make) -> None:
    model = make_model(head)
    model.set_attn_implementation("eager")  # sdpa returns no attentions
    batch, reduced = example(model), reduce(model, LAYER)
    options = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        want, got = full_outputs(model, batch, **options), reduced(**batch, **options)
        as_tuple = reduced(**batch, **options, return_dict=False)
    batch_size, heads = len(MASK), model.config.num_attention_heads
    assert [tuple(one.shape) for one in got.hidden_states[:LAYER]] == [(batch_size, 0, 32)] * LAYER
    assert [tuple(one.shape) for one in got.attentions[:LAYER]] == [(batch_size, heads, 0, 0)] * LAYER
    for name, first in (("hidden_states", LAYER), ("attentions", LAYER)):
        assert len(got[name]) == len(want[name])
        for mine, theirs in zip(got[name][first:], want[name][first:], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], got[0])
    with pytest.raises(ModelError, match="select hidden states"):
        reduced(**batch, output_hidden_states=[-1])


def test_the_task_model_is_untouched_and_shares_nothing(make_model: Make) -> None:
    model = make_model(AutoModelForSequenceClassification)
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    modules = [id(module) for module in model.modules()]
    reduced = reduce(model, LAYER)
    with torch.no_grad():
        for parameter in reduced.parameters():
            parameter.add_(1.0)
    assert [id(module) for module in model.modules()] == modules
    assert type(model).__name__ == "BertForSequenceClassification"
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_only_the_upper_half_is_in_the_state_dict(make_model: Make) -> None:
    model = make_model(AutoModelForSequenceClassification)
    reduced = reduce(model, LAYER)
    lower = ("bert.embeddings.", "bert.encoder.layer.0.", "bert.encoder.layer.1.")
    assert set(reduced.state_dict()) == {name for name in model.state_dict() if not name.startswith(lower)}
    assert isinstance(reduced, type(model))
    assert reduced.get_input_embeddings() is not None
    trained = {name: tensor + 1 for name, tensor in reduced.state_dict().items()}
    missing, unexpected = copy.deepcopy(model).load_state_dict(trained, strict=False)
    assert not unexpected
    assert all(name.startswith(lower) for name in missing)


def test_a_tied_head_gets_its_own_matrix(make_model: Make, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(AutoModelForMaskedLM)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    with caplog.at_level(logging.WARNING, "actcache"):
        reduced = reduce(model, LAYER)
    assert len(caplog.records) == 1
    assert "cls.predictions.decoder.weight" in caplog.text
    decoder = reduced.cls.predictions.decoder
    assert torch.equal(decoder.weight, model.cls.predictions.decoder.weight)
    assert decoder.weight is not model.cls.predictions.decoder.weight
    assert decoder.bias is reduced.cls.predictions.bias  # that tie stays
    weight = decoder.weight
    reduced.tie_weights()
    assert decoder.weight is weight
    assert not reduced.config.tie_word_embeddings
    assert model.config.tie_word_embeddings


def test_copies_and_pickles_are_reduced_models_of_their_own(make_model: Make) -> None:
    model = make_model(AutoModelForSequenceClassification)
    # a copy: transformers' own hooks for hidden states, which example() makes it install, cannot be pickled
    batch, reduced = example(copy.deepcopy(model)), reduce(model, LAYER)
    file = io.BytesIO()
    torch.save(reduced, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        want = reduced(**batch).logits
        for other in (copy.deepcopy(reduced), loaded):
            assert type(other) is type(reduced)
            assert torch.equal(other(**batch).logits, want)
            for parameter in other.parameters():
                parameter.zero_()
            assert not torch.allclose(other(**batch).logits, want)
        assert torch.equal(reduced(**batch).logits, want)


def test_rows_are_not_kept_after_a_forward(make_model: Make) -> None:
    model = make_model(AutoModelForSequenceClassification)
    batch, reduced = example(model), reduce(model, LAYER)
    reduced(**batch)
    with pytest.raises(ShapeError):
        reduced(**{**batch, "attention_mask": MASK[:, :3]})
    assert reduced.actcache_injected.get() == (None, None)
    assert reduced.actcache_injected.last == (None, None)


def test_threads_that_share_a_model_get_their_own_rows(make_model: Make) -> None:
    model = make_model(AutoModelForSequenceClassification)
    batch, reduced = example(model), reduce(model, LAYER)
    other = {**batch, "activations": batch["activations"].flip(0)}
    with torch.no_grad():
        want, other_want = reduced(**batch).logits, reduced(**other).logits
    assert not torch.allclose(want, other_want)

    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return reduced(**inputs).logits

    between: list[torch.Tensor] = []

    def another_thread_runs_it(*_: Any) -> None:
        handle.remove()
        between.append(pool.submit(run, other).result())

    with ThreadPoolExecutor(1) as pool:
        handle = reduced.bert.embeddings.register_forward_hook(another_thread_runs_it)
        got = run(batch)
    assert torch.equal(got, want)
    assert torch.equal(between[0], other_want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_of_any_dtype_are_cast(dtype: torch.dtype, make_model: Make) -> None:
    model = make_model(AutoModelForSequenceClassification)
    batch, reduced = example(model), reduce(model, LAYER)
    with torch.no_grad():
        want = reduced(**batch).logits
        got = reduced(**{**batch, "activations": batch["activations"].to(dtype)}).logits
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.1)
    in_bfloat16 = reduced.to(torch.bfloat16)(**batch)
    assert in_bfloat16.logits.dtype == torch.bfloat16


def test_wrong_inputs_are_refused(make_model: Make) -> None:
    model = make_model(AutoModelForSequenceClassification)
    batch, reduced = example(model), reduce(model, LAYER)
    with pytest.raises(ModelError, match="needs activations"):
        reduced(token_ids=batch["token_ids"])
    with pytest.raises(ModelError, match="needs token_ids"):
        reduced(activations=batch["activations"])
    with pytest.raises(ModelError, match="no input_ids"):
        reduced(**batch, input_ids=batch["token_ids"])
    with pytest.raises(ShapeError, match="32"):
        reduced(**{**batch, "activations": batch["activations"][..., :16]})
    with pytest.raises(ShapeError, match="token_ids"):
        reduced(**{**batch, "token_ids": batch["token_ids"][:2]})
    with pytest.raises(ShapeError, match="attention_mask"):
        reduced(**{**batch, "attention_mask": MASK[:, :3]})
    with pytest.raises(ShapeError, match="floating"):
        reduced(**{**batch, "activations": batch["activations"].long()})
    with pytest.raises(ShapeError, match="torch tensors"):
        reduced(**{**batch, "activations": batch["activations"].numpy()})
    with pytest.raises(ShapeError, match=r"do not fit.*collate_fn=dataset\.collate"):
        reduced(**{name: tensor[None] for name, tensor in batch.items()})


@pytest.mark.parametrize("layer", [0, -1, 4, 5, True, 1.5])
def test_layers_outside_the_model_are_refused(layer: Any, make_model: Make) -> None:
    with pytest.raises(LayerError, match=r"1\.\.3"):
        reduce(make_model(AutoModel), layer)


def test_models_that_cannot_be_reduced(make_model: Make) -> None:
    model = make_model(AutoModel)
    with pytest.raises(ModelError, match="reduced one already"):
        reduce(reduce(model, LAYER), LAYER)
    with pytest.raises(UnsupportedModelError, match="decoder"):
        reduce(make_model(AutoModel, is_decoder=True), LAYER)
    with pytest.raises(UnsupportedModelError, match="Linear"):
        reduce(torch.nn.Linear(2, 2), 1)  # type: ignore[arg-type]
    albert = AutoModel.from_config(transformers.AlbertConfig(hidden_size=16, num_attention_heads=2, vocab_size=9))
    with pytest.raises(UnsupportedModelError, match=r"register_family.*docs/models\.md"):
        reduce(albert, 1)


def test_a_family_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actcache.models.families._FAMILIES", dict(_FAMILIES))
    config = transformers.ErnieConfig(hidden_size=32, num_hidden_layers=3, vocab_size=99, num_attention_heads=2)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    register_family(Family("ernie", ("ernie",)))
    ids = torch.randint(5, 99, (2, 6))
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, output_hidden_states=True).hidden_states[1]
        got = reduce(model, 1)(activations=hidden, token_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(got, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    register_family(Family("ernie", ("ernie",), layers="no.such.path"))
    with pytest.raises(UnsupportedModelError, match=r"no\.such\.path"):
        reduce(model, 1)
    register_family(Family("ernie", ("ernie",), embeddings=("embeddings", "projection")))
    with pytest.raises(UnsupportedModelError, match="projection"):  # or its weights would be in no identity
        reduce(model, 1)


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing(make_model: Make) -> None:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = make_model(AutoModelForSequenceClassification, **dropout)
    batch, reduced = example(model), reduce(model, LAYER).train()
    want = gradients(reduced, reduced(**batch, labels=LABELS).loss)
    assert "bert.encoder.layer.2.attention.self.query.weight" in want
    reduced.activation_checkpointing_enable({"use_reentrant": False})
    got = gradients(reduced, reduced(**batch, labels=LABELS).loss)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name])
    for options in ({"use_reentrant": True}, {"determinism_check": "none"}):  # the second leaves it at torch's default
        reduced.activation_checkpointing_enable(options)
        with pytest.raises(ModelError, match="use_reentrant"):
            reduced(**batch, labels=LABELS)
    reduced.eval()(**batch)  # without gradients it does not matter


def test_the_signature_names_the_columns(make_model: Make) -> None:
    reduced = reduce(make_model(AutoModelForQuestionAnswering), LAYER)
    names = list(inspect.signature(reduced.forward).parameters)
    assert names[:3] == ["activations", "token_ids", "attention_mask"]
    assert {"start_positions", "end_positions"} <= set(names)
    assert not {"input_ids", "token_type_ids", "position_ids", "inputs_embeds"} & set(names)


def test_the_trainer_trains_it(make_model: Make, tmp_path: Path) -> None:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = make_model(AutoModelForSequenceClassification, **dropout)
    batch, reduced = example(model), reduce(model, LAYER)
    rows = [
        {**{name: tensor[i] for name, tensor in batch.items()}, "labels": LABELS[i], "dropped": torch.tensor(0)}
        for i in range(3)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=20,
        per_device_train_batch_size=3,
        learning_rate=5e-3,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        activation_checkpointing=True,
    )
    trainer = Trainer(model=reduced, args=arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 2

"""The recycler: identity, filling and resuming, windows, and what it refuses."""

from __future__ import annotations

import copy
import getpass
import io
import logging
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

import actcache
from actcache.errors import (
    CanaryError,
    CodecOverflowError,
    DocumentError,
    DocumentTooLongError,
    LayerError,
    LowerHalfMismatchError,
    MissingEntryError,
    ModelError,
    NonFiniteError,
    ReadOnlyError,
    RecipeError,
    ShapeError,
    SpaceNotFoundError,
    UsageError,
)
from actcache.models import base_model_of, canary, filling
from actcache.models.lower_half import LowerHalf
from actcache.models.recycler import Recycler
from actcache.store.store import Store

Make = Callable[..., PreTrainedModel]

TEXTS = [f"document {i} says " + "la " * (i % 13) + "." for i in range(60)]
LONG = "the quick brown fox jumps over the lazy dog " * 5


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with actcache.open(tmp_path / "store") as store:
        yield store


@pytest.fixture
def model(make_model: Make) -> PreTrainedModel:
    return make_model(AutoModel)


def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents each forward pass of a lower half computed, canaries included."""
    counts: list[int] = []
    original = LowerHalf._forward

    def counted(self: LowerHalf, inputs: Any, *rest: Any) -> Any:
        counts.append(len(inputs["input_ids"]))
        return original(self, inputs, *rest)

    monkeypatch.setattr(LowerHalf, "_forward", counted)
    return counts


#: The forward passes of a check: what the digest has to cover is found by a run, then come the canaries.
CHECK = [1, len(canary.TEXTS), 1]
#: And where documents are present, of which some are computed again.
CHECK_PRESENT = [*CHECK, 3]


# --- identity --------------------------------------------------------------------------------------------------------


def test_what_makes_another_space(store: Store, make_model: Make, tokenizer: Any) -> None:
    def fingerprint(model: PreTrainedModel | None = None, how: Any = None, **options: Any) -> str:
        other = copy.deepcopy(tokenizer)
        if how is not None:
            how(other)
        model = model or make_model(AutoModel)
        with Recycler(model, other, **{"layer": 2, "store": store, **options}) as recycler:
            return recycler.recipe.fingerprint

    changed = make_model(AutoModel)
    changed.encoder.layer[1].output.dense.bias.data[0] += 1e-4
    seen = {
        "as it is": fingerprint(),
        "layer": fingerprint(layer=3),
        "stored dtype": fingerprint(dtype="float32"),
        "autocast": fingerprint(compute_dtype="bfloat16"),
        "weights in bfloat16": fingerprint(make_model(AutoModel).to(torch.bfloat16)),
        "one weight": fingerprint(changed),
        "epsilon": fingerprint(make_model(AutoModel, layer_norm_eps=1e-5)),
        "heads": fingerprint(make_model(AutoModel, num_attention_heads=2)),
        "activation": fingerprint(make_model(AutoModel, hidden_act="relu")),
        "max_length": fingerprint(max_length=32),
        "truncation": fingerprint(too_long="truncate"),
        "windows": fingerprint(too_long=actcache.windows(66)),
        "no special tokens": fingerprint(special_tokens=False),
        "tokens added": fingerprint(how=lambda one: one.add_tokens(["actcache"])),
        "truncation side": fingerprint(how=lambda one: setattr(one, "truncation_side", "left")),
        "family": fingerprint(make_model(AutoModel, "roberta"), max_length=66 - 2),
        "family with one pad token": fingerprint(make_model(AutoModel, "roberta", pad_token_id=0), max_length=64),
    }
    assert len(set(seen.values())) == len(seen), seen


def test_what_does_not(store: Store, make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    with Recycler(make_model(AutoModel), tokenizer, layer=2, store=store, dtype="float32") as recycler:
        recycler.fill(TEXTS, progress=False)
        want, recipe = recycler.space.get(recycler.keys(TEXTS)), recycler.recipe
    other = make_model(AutoModelForSequenceClassification, num_labels=7)
    with torch.no_grad():
        for part in (other.classifier, *other.bert.encoder.layer[2:]):
            for parameter in part.parameters():
                parameter.add_(1.0)
    other.config.hidden_dropout_prob = 0.3
    other.save_pretrained(tmp_path / "elsewhere")
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    options: dict[str, Any] = {"layer": 2, "store": store, "dtype": "float32", "provenance": {"who": "me"}}
    with Recycler.from_pretrained(tmp_path / "elsewhere", device="cpu", **options) as recycler:
        assert recycler.recipe.model == str(tmp_path / "elsewhere")
        assert recycler.recipe.differences(recipe) == {}
        assert recycler.recipe.fingerprint == recipe.fingerprint
        assert not recycler.space.created
        assert recycler.fill(TEXTS, progress=False).computed == 0
        for mine, theirs in zip(recycler.space.get(recycler.keys(TEXTS)), want, strict=True):
            np.testing.assert_array_equal(mine.activations, theirs.activations)
        batch = next(iter(recycler.reader(TEXTS)))
        assert recycler.reduce(other)(**batch.model_inputs()).logits.shape[-1] == 7


def test_the_recipe_says_where_it_came_from(store: Store, model: PreTrainedModel, tokenizer: Any) -> None:
    with Recycler(model, tokenizer, layer=2, store=store, provenance={"who": "me"}) as recycler:
        provenance = recycler.space.recipe.provenance
    assert provenance["who"] == "me"
    assert provenance["torch"] == torch.__version__
    assert provenance["made_by"].startswith(f"{getpass.getuser()}@")
    assert abs((datetime.now(UTC) - datetime.fromisoformat(provenance["made_at"])).total_seconds()) < 60
    assert {"transformers", "tokenizers", "actcache", "python", "device", "attention", "weights_dtype"} <= set(
        provenance
    )


def test_a_precision_that_was_set_the_newer_way(store: Store, model: PreTrainedModel, tokenizer: Any) -> None:
    matmul = torch.backends.mkldnn.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("an older torch")
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        with Recycler(model, tokenizer, layer=2, store=store) as recycler:
            assert recycler.space.recipe.provenance["matmul_precision"] == "bf16"
    finally:
        matmul.fp32_precision = before


def test_an_empty_space_says_what_is_near(
    store: Store, model: PreTrainedModel, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "actcache"):
        with Recycler(model, tokenizer, layer=2, store=store) as first:
            first.fill(["a text"], progress=False)
        assert "nearest" not in caplog.text
        Recycler(model, tokenizer, layer=2, store=store, max_length=20).close()
    assert "max_length: 20 here, 66 there" in caplog.text


# --- reducing --------------------------------------------------------------------------------------------------------


def test_another_lower_half_is_not_reduced(store: Store, make_model: Make, tokenizer: Any) -> None:
    head = AutoModelForSequenceClassification
    with Recycler(make_model(AutoModel), tokenizer, layer=2, store=store) as recycler:
        recycler.reduce(make_model(head))
        tuned = make_model(head)
        optimizer = torch.optim.SGD(tuned.bert.encoder.layer[1].parameters(), lr=1e-3)
        tuned(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([1])).loss.backward()
        optimizer.step()
        with pytest.raises(LowerHalfMismatchError, match="fine-tuned"):
            recycler.reduce(tuned)
        with pytest.raises(LowerHalfMismatchError, match="layer_norm_eps: 1e-05, recorded 1e-12"):
            recycler.reduce(make_model(head, layer_norm_eps=1e-5))
        with pytest.raises(LowerHalfMismatchError, match="family"):
            recycler.reduce(make_model(head, "roberta"))
        with pytest.raises(LowerHalfMismatchError, match="bfloat16, load the model with dtype float32"):
            recycler.reduce(make_model(head).to(torch.bfloat16))
        with pytest.raises(LayerError):
            recycler.reduce(make_model(head, num_hidden_layers=2))
        upper = make_model(head)
        upper.bert.encoder.layer[2].output.dense.bias.data += 1
        recycler.reduce(upper)


def test_pairs_and_ids_end_to_end(store: Store, make_model: Make, tokenizer: Any) -> None:
    task = make_model(AutoModelForSequenceClassification)
    texts: list[Any] = [("a question", "an answer " * i) for i in range(1, 9)] + [[101, 7592, 102], ["some", "words"]]
    with Recycler(task, tokenizer, layer=2, store=store, dtype="float32", extras=("type_ids", "word_ids")) as recycler:
        recycler.fill(texts, token_budget=40, progress=False)
        reduced = recycler.reduce(task)
        (batch,) = recycler.reader(texts, batch_size=99, shuffle=True)
        with torch.no_grad():
            got = reduced(**batch.model_inputs()).logits
            for logits, i in zip(got, batch.documents.tolist(), strict=True):
                if isinstance(texts[i], tuple):
                    inputs = dict(tokenizer(*texts[i], return_tensors="pt"))
                elif i == 8:
                    inputs = {"input_ids": torch.tensor([texts[i]])}
                else:
                    inputs = dict(tokenizer(texts[i], is_split_into_words=True, return_tensors="pt"))
                torch.testing.assert_close(logits, task(**inputs).logits[0], atol=1e-5, rtol=1e-5)
        (entry,) = recycler.space.get(recycler.keys(texts[:1]))
        np.testing.assert_array_equal(entry.extras["type_ids"], tokenizer(*texts[0])["token_type_ids"])


def test_roberta_end_to_end(store: Store, make_model: Make, roberta_tokenizer: Any) -> None:
    task = make_model(AutoModelForSequenceClassification, "roberta", vocab_size=600)
    texts = ["Return a list", "Return the <pad> token, which is no padding here", "x"]
    with Recycler(task, roberta_tokenizer, layer=3, store=store, dtype="float32") as recycler:
        assert recycler.recipe.max_length == 64  # 66 positions, two of them before the first token
        recycler.fill(texts, progress=False)
        (batch,) = recycler.reader(texts)
        with torch.no_grad():
            got = recycler.reduce(task)(**batch.model_inputs()).logits
            for logits, text in zip(got, texts, strict=True):
                alone = task(**roberta_tokenizer(text, return_tensors="pt")).logits[0]
                torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)


# --- filling ---------------------------------------------------------------------------------------------------------


def test_filling_twice_computes_nothing(
    store: Store, model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Recycler(model, tokenizer, layer=2, store=store) as recycler:
        first = recycler.fill([*TEXTS, *TEXTS[:5]], progress=False)
        assert (first.documents, first.present, first.computed) == (65, 5, 60)
        assert first.tokens == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
        counts = forwards(monkeypatch)
        again = recycler.fill((text for text in TEXTS), progress=False)
        assert (again.documents, again.present, again.computed, again.tokens) == (60, 60, 0, 0)
        assert counts == CHECK_PRESENT
        assert recycler.fill([*TEXTS, "new"], progress=False).computed == 1
        assert counts == [*CHECK_PRESENT, *CHECK_PRESENT, 1]
        assert recycler.fill([], progress=False).documents == 0


def test_small_chunks_and_budgets_store_the_same(
    store: Store, model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Recycler(model, tokenizer, layer=2, store=store, dtype="float32") as recycler:
        recycler.fill(TEXTS, progress=False)
        want = recycler.space.get(recycler.keys(TEXTS))
        recycler.space.delete(recycler.keys(TEXTS))
        monkeypatch.setattr(filling, "CHUNK", 7)
        counts = forwards(monkeypatch)
        assert recycler.fill(TEXTS, token_budget=30, progress=False).computed == 60
        assert max(counts) * 5 <= 30
        for mine, theirs in zip(recycler.space.get(recycler.keys(TEXTS)), want, strict=True):
            np.testing.assert_allclose(mine.activations, theirs.activations, atol=1e-5)
            np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)


def test_an_interrupted_fill_goes_on(
    tmp_path: Path, model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "_GROUP", 1)
    original = LowerHalf._forward
    calls = iter(range(1000))

    def interrupted(self: LowerHalf, inputs: Any, *rest: Any) -> Any:
        if next(calls) == 12:  # the canaries come first
            raise KeyboardInterrupt
        return original(self, inputs, *rest)

    with Recycler(model, tokenizer, layer=2, store=tmp_path / "store") as recycler:
        monkeypatch.setattr(LowerHalf, "_forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recycler.fill(TEXTS, token_budget=64, progress=False)
        monkeypatch.setattr(LowerHalf, "_forward", original)
        # what is visible to another process at this moment was flushed
        with actcache.open(tmp_path / "store", mode="r") as other, other.space(recycler.recipe) as space:
            stored = len(space)
    assert 0 < stored < 60
    with Recycler(model, tokenizer, layer=2, store=tmp_path / "store") as recycler:
        report = recycler.fill(TEXTS, token_budget=64, progress=False)
        assert (report.present, report.computed) == (stored, 60 - stored)
        assert [len(batch) for batch in recycler.reader(TEXTS, batch_size=60)] == [60]


def test_a_lower_half_that_was_trained_meanwhile_fills_nothing(
    store: Store, model: PreTrainedModel, tokenizer: Any
) -> None:
    with Recycler(model, tokenizer, layer=2, store=store) as recycler:
        model.encoder.layer[0].output.dense.weight.data[0, 0] += 1e-3
        with pytest.raises(LowerHalfMismatchError):
            recycler.fill(TEXTS, progress=False)
        assert len(recycler.space) == 0


def test_train_mode_fills_nothing(store: Store, model: PreTrainedModel, tokenizer: Any) -> None:
    with Recycler(model.train(), tokenizer, layer=2, store=store) as recycler:
        with pytest.raises(ModelError, match=r"model\.eval\(\)"):
            recycler.fill(TEXTS, progress=False)
        assert len(recycler.space) == 0


def test_numbers_that_cannot_be_stored(store: Store, model: PreTrainedModel, tokenizer: Any) -> None:
    with Recycler(model, tokenizer, layer=2, store=store) as recycler:
        recycler.fill(TEXTS[:5], progress=False)
    huge = copy.deepcopy(model)
    huge.embeddings.word_embeddings.weight.data[7592] = torch.nan  # "hello"
    with Recycler(huge, tokenizer, layer=2, store=store) as recycler:
        with pytest.raises(NonFiniteError, match="position 2 of the texts"):
            recycler.fill(["fine", "good", "oh hello"], progress=False)
        assert recycler.fill(["fine", "good"], progress=False).documents == 2
    large = copy.deepcopy(model)
    large.encoder.layer[1].output.LayerNorm.weight.data[:] = 1e5
    with (
        Recycler(large, tokenizer, layer=2, store=store) as recycler,
        pytest.raises(CodecOverflowError, match=r"position 0 .*bfloat16"),
    ):
        recycler.fill(["fine"], progress=False)
    with Recycler(model, tokenizer, layer=2, store=store) as recycler:
        assert recycler.fill(TEXTS[:5], progress=False).computed == 0


def test_documents_that_cannot_be_stored(store: Store, model: PreTrainedModel, tokenizer: Any) -> None:
    with Recycler(model, tokenizer, layer=2, store=store, max_length=20) as recycler:
        with pytest.raises(DocumentTooLongError, match=r"document 1 .*47 tokens, more than 20"):
            recycler.fill(["fine", LONG], progress=False)
        with pytest.raises(DocumentError, match="position 1"):
            recycler.fill(["fine", ""], progress=False)
        with pytest.raises(DocumentError, match="vocabulary"):
            recycler.fill([[99999]], progress=False)
        for method in (recycler.fill, recycler.reader, recycler.keys):
            with pytest.raises(UsageError, match="not one text"):
                method("a text")
            with pytest.raises(UsageError, match="not a dict"):
                method({"text": ["a", "b"]})


def test_arguments_that_cannot_be(store: Store, model: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    def recycler(**options: Any) -> None:
        Recycler(model, tokenizer, **{"layer": 2, "store": store, **options}).close()

    for layer in (5, -6, None, "encoder.layers.2"):
        with pytest.raises(UsageError if layer is None else LayerError):
            recycler(layer=layer)
    with pytest.raises(UsageError, match="one of layer=6"):
        recycler(site="pooler")
    with pytest.raises(RecipeError, match="67 is more than the 66"):
        recycler(max_length=67)
    with pytest.raises(RecipeError, match="dtype"):
        recycler(dtype="float8")
    with pytest.raises(RecipeError, match="too_long"):
        recycler(too_long="cut")
    with pytest.raises(UsageError, match="extras"):
        recycler(extras=("lemmas",))
    with pytest.raises(ModelError, match="cannot be loaded"):
        Recycler.from_pretrained("/no/such/model", layer=1, store=store)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="cannot be moved to the device potato"):
        Recycler.from_pretrained(tmp_path / "model", layer=1, store=store, device="potato")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"truncated")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Recycler.from_pretrained(tmp_path / "model", layer=1, store=store)


def test_a_read_only_store(tmp_path: Path, model: PreTrainedModel, tokenizer: Any) -> None:
    with Recycler(model, tokenizer, layer=2, store=tmp_path / "store") as recycler:
        recycler.fill(TEXTS, progress=False)
    with actcache.open(tmp_path / "store", mode="r") as store:
        with Recycler(model, tokenizer, layer=2, store=store) as recycler:
            assert len(recycler.reader(TEXTS)) == 2
            with pytest.raises(ReadOnlyError, match="mode='a'"):
                recycler.fill(["new"], progress=False)
        with pytest.raises(SpaceNotFoundError):
            Recycler(model, tokenizer, layer=3, store=store)


def test_progress_without_a_terminal(
    store: Store, model: PreTrainedModel, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with Recycler(model, tokenizer, layer=2, store=store) as recycler:
        recycler.fill(TEXTS)
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("fill: 60/60 documents, 60 computed")
        assert "tokens/s" in err
        recycler.fill(TEXTS, progress=False)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("gone", ["pipe", "/dev/full"])
def test_progress_that_nobody_reads(
    gone: str, store: Store, model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gone == "pipe":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open(gone, os.O_WRONLY)
    raw = io.FileIO(writing, "w")
    monkeypatch.setattr("sys.stderr", io.TextIOWrapper(raw, write_through=True))
    monkeypatch.setattr("actcache.io.progress._LINE_SECONDS", 0.0)
    with raw, Recycler(model, tokenizer, layer=2, store=store) as recycler:
        assert recycler.fill(TEXTS).computed == 60
        assert len(recycler.space) == 60


# --- canaries --------------------------------------------------------------------------------------------------------


def test_canaries_come_with_the_first_fill(
    store: Store, model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Recycler(model, tokenizer, layer=2, store=store) as recycler:
        assert recycler.space.blob(canary.BLOB_NAME) is None
        recycler.fill(TEXTS[:3], progress=False)
        blob = recycler.space.blob(canary.BLOB_NAME)
        assert blob is not None
    counts = forwards(monkeypatch)
    with Recycler(model, tokenizer, layer=2, store=store) as recycler:
        assert counts == CHECK  # the same set-up, too
        recycler.reader(TEXTS[:3])
        assert counts == [*CHECK, *CHECK_PRESENT]
        assert recycler.space.blob(canary.BLOB_NAME) == blob


def test_another_set_up_has_to_agree(
    store: Store,
    model: PreTrainedModel,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Recycler(model, tokenizer, layer=2, store=store) as recycler:
        recycler.fill(TEXTS, progress=False)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with caplog.at_level(logging.INFO, "actcache"), Recycler(eager, tokenizer, layer=2, store=store) as recycler:
        assert "canaries agree" in caplog.text
        assert recycler.fill(TEXTS, progress=False).computed == 0
    # a release of a library that computes something else from the same weights and configuration
    original = LowerHalf._forward
    monkeypatch.setattr(
        LowerHalf,
        "_forward",
        lambda self, *given: {site: rows * 1.001 for site, rows in original(self, *given).items()},
    )
    with pytest.raises(CanaryError, match="attention: 'sdpa' then, 'eager' now"):
        Recycler(eager, tokenizer, layer=2, store=store)


def test_canaries_that_appear_later_are_checked_too(
    tmp_path: Path, model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with (
        Recycler(eager, tokenizer, layer=2, store=tmp_path / "store") as early,
        Recycler(model, tokenizer, layer=2, store=tmp_path / "store") as late,
    ):
        late.fill(TEXTS, progress=False)
        original = LowerHalf._forward
        monkeypatch.setattr(
            LowerHalf,
            "_forward",
            lambda self, *given: {site: rows * 1.001 for site, rows in original(self, *given).items()},
        )
        for method in (early.fill, early.reader):
            with pytest.raises(CanaryError):
                method(TEXTS)


def hooked(model: PreTrainedModel) -> PreTrainedModel:
    base_model_of(model).encoder.layer[0].register_forward_hook(lambda module, inputs, output: output * 1.1)
    return model


def retuned(model: PreTrainedModel) -> PreTrainedModel:
    base_model_of(model).encoder.layer[0].output.LayerNorm.eps = 0.1  # the configuration does not know
    return model


@pytest.mark.parametrize("change", [hooked, retuned])
def test_changes_that_no_recipe_sees(change: Any, store: Store, make_model: Make, tokenizer: Any) -> None:
    with Recycler(make_model(AutoModel), tokenizer, layer=2, store=store) as recycler:
        recycler.fill(TEXTS[:5], progress=False)
        task = change(make_model(AutoModelForSequenceClassification)).train()
        with pytest.raises(LowerHalfMismatchError, match=r"BertForSequenceClassification .*is it a hook"):
            recycler.reduce(task)
        assert all(module.training for module in task.modules())
        recycler.reduce(make_model(AutoModelForSequenceClassification).train())
    with pytest.raises(CanaryError, match="is it a hook"):
        Recycler(change(make_model(AutoModel)), tokenizer, layer=2, store=store)


# --- reading and windows ---------------------------------------------------------------------------------------------


def test_missing_documents(store: Store, model: PreTrainedModel, tokenizer: Any) -> None:
    with Recycler(model, tokenizer, layer=2, store=store) as recycler:
        recycler.fill(TEXTS[:10], progress=False)
        with pytest.raises(MissingEntryError, match=r"2 of 12 .*position 10") as caught:
            recycler.reader(TEXTS[:12])
        assert caught.value.keys == [actcache.document_key(text) for text in TEXTS[10:12]]
        (batch,) = recycler.reader(TEXTS[8:12], labels=[8, 9, 10, 11], on_missing="skip")
        assert batch.labels.tolist() == [8, 9]
        assert batch.documents.tolist() == [0, 1]
        with pytest.raises(ShapeError, match="labels"):
            recycler.reader(TEXTS[:3], labels=[1])


def test_labels_are_what_losses_take(store: Store, model: PreTrainedModel, tokenizer: Any) -> None:
    with Recycler(model, tokenizer, layer=2, store=store) as recycler:
        recycler.fill(TEXTS[:3], progress=False)
        for labels in ([1, 0, 1], np.array([1, 0, 1], np.int32), [True, False, True], torch.tensor([1, 0, 1]).byte()):
            (batch,) = recycler.reader(TEXTS[:3], labels=labels)
            assert batch.labels.tolist() == [1, 0, 1]
            assert batch.labels.dtype == torch.int64
        (batch,) = recycler.reader(TEXTS[:3], labels=np.array([0.5, 1, 2], np.float32))
        assert batch.labels.dtype == torch.float32
        for bad in (["a", "b", "c"], [None] * 3):
            with pytest.raises(ShapeError, match="each class a number"):
                recycler.reader(TEXTS[:3], labels=bad)


def test_entries_that_are_deleted_under_a_reader(store: Store, model: PreTrainedModel, tokenizer: Any) -> None:
    with Recycler(model, tokenizer, layer=2, store=store) as recycler:
        recycler.fill(TEXTS[:6], progress=False)
        batches = iter(recycler.reader(TEXTS[:6], batch_size=3, depth=0))  # what was read ahead would be delivered
        next(batches)
        recycler.space.delete(recycler.keys(TEXTS[4:5]))
        with pytest.raises(MissingEntryError, match=r"1 documents of this batch .*position 4") as caught:
            next(batches)
        assert caught.value.keys == recycler.keys(TEXTS[4:5])


def test_windows_end_to_end(
    store: Store, model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["short", LONG, "another", LONG + " again", "last"]
    spec = actcache.windows(16, stride=4)
    options: dict[str, Any] = {"layer": 2, "store": store, "dtype": "float32", "too_long": spec}
    with Recycler(model, tokenizer, **options) as recycler:
        report = recycler.fill(texts, token_budget=40, progress=False)
        assert (report.documents, report.computed) == (5, 5)
        assert len(recycler.space) == 1 + 5 + 1 + 5 + 1
        counts = forwards(monkeypatch)
        assert recycler.fill(texts, progress=False).present == 5
        assert counts == CHECK_PRESENT
        labels = torch.tensor([10, 11, 12, 13, 14])
        owners, seen = [], []
        for batch in recycler.reader(texts, labels=labels, batch_size=5):
            assert (batch.labels == batch.documents + 10).all()
            owners += batch.documents.tolist()
            seen += [ids[:n].tolist() for ids, n in zip(batch.token_ids, batch.lengths.tolist(), strict=True)]
        assert owners == [0] + [1] * 5 + [2] + [3] * 5 + [4]
        encoded = tokenizer(texts, truncation=True, max_length=16, stride=4, return_overflowing_tokens=True)
        assert seen == encoded["input_ids"]
        assert len(recycler.keys(texts)) == 13
        # Each window is computed as if it were a document.
        for entry in recycler.space.get(recycler.keys(texts)):
            with torch.no_grad():
                alone = model(input_ids=torch.tensor(entry.token_ids)[None].long(), output_hidden_states=True)
            np.testing.assert_allclose(entry.activations, alone.hidden_states[2][0].numpy(), atol=1e-5)


def test_a_document_that_lacks_a_window_is_missing(store: Store, model: PreTrainedModel, tokenizer: Any) -> None:
    spec = actcache.windows(16, stride=4)
    with Recycler(model, tokenizer, layer=2, store=store, too_long=spec) as recycler:
        recycler.fill(["short", LONG], progress=False)
        keys = recycler.keys(["short", LONG])
        for lost in keys[1:]:
            recycler.space.delete([lost])
            with pytest.raises(MissingEntryError, match="position 1"):
                recycler.reader(["short", LONG])
            with pytest.raises(MissingEntryError):
                recycler.keys([LONG])
            (batch,) = recycler.reader(["short", LONG], on_missing="skip")
            assert batch.documents.tolist() == [0]
            assert recycler.fill(["short", LONG], progress=False).computed == 1
            assert recycler.keys(["short", LONG]) == keys


def test_it_closes_what_it_opened(tmp_path: Path, model: PreTrainedModel, tokenizer: Any) -> None:
    recycler = Recycler(model, tokenizer, layer=2, store=str(tmp_path / "store"))
    recycler.close()
    recycler.close()
    with actcache.open(tmp_path / "store") as store:
        Recycler(model, tokenizer, layer=2, store=store).close()
        assert store.recipes() == []  # still open

"""Encoder-decoders whose encoder's rows are stored: outputs, losses, gradients, generation against the full model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from actcache import Recycler
from actcache.errors import LayerError, ModelError, ShapeError
from actcache.models.families import base_model_of, family_of
from actcache.models.replay import reduce
from tests.models.zoo import KINDS

VOCABULARY = 30522  # the tokenizer's

_BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "init_std": 0.4,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"num_beams": 3})


def t5() -> PreTrainedModel:
    model = KINDS["t5"].make(AutoModelForSeq2SeqLM, vocab_size=VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # so that different prompts are answered differently
    return model


def bart() -> PreTrainedModel:
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**_BART)).eval()


@pytest.mark.parametrize(("make", "layer"), [(t5, "last"), (bart, "last"), (bart, 3)], ids=["t5", "bart", "bart-3"])
def test_fifty_prompts_are_answered_as_by_the_full_model(make: Any, layer: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCABULARY, length) for length in rng.integers(1, 20, 50)]
    with Recycler(model, tokenizer, layer=layer, store=tmp_path / "store", dtype="float32") as recycler:
        recycler.fill(prompts, progress=False)
        reduced = recycler.reduce(model)
        assert not any(name.startswith(("encoder.", "model.encoder.")) for name, _ in reduced.named_parameters())
        answers = set()
        for batch in recycler.reader(prompts, batch_size=25):
            inputs = batch.model_inputs()
            tokens = {"input_ids": inputs["token_ids"], "attention_mask": inputs["attention_mask"]}
            tokens["input_ids"] = tokens["input_ids"].masked_fill(
                tokens["attention_mask"] == 0, model.config.pad_token_id
            )
            labels = torch.randint(3, VOCABULARY, (25, 4), generator=torch.Generator().manual_seed(1))
            full, again = model(**tokens, labels=labels), reduced(**inputs, labels=labels)
            torch.testing.assert_close(again.loss, full.loss, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(again.logits, full.logits, atol=1e-4, rtol=1e-4)
            for options in OPTIONS:
                options = {**options, "max_new_tokens": 6, "do_sample": False}
                expected = model.generate(**tokens, **options)
                assert torch.equal(reduced.generate(**inputs, **options), expected)
                answers.update(map(tuple, expected.tolist()))
        assert len(answers) > 10  # or any model would have given them
        full.loss.backward()
        again.loss.backward()
        theirs = dict(model.named_parameters())
        for name, parameter in reduced.named_parameters():
            if theirs[name].grad is not None and "shared" not in name and "lm_head" not in name:
                torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-4)


def test_generation_from_an_inner_layer(tokenizer: Any, tmp_path: Path) -> None:
    model = t5()
    prompts = [np.arange(3, 3 + length) for length in (4, 9, 2)]
    with Recycler(model, tokenizer, layer=2, store=tmp_path / "store", dtype="float32") as recycler:
        recycler.fill(prompts, progress=False)
        inputs = next(iter(recycler.reader(prompts, batch_size=3))).model_inputs()
        tokens = {"input_ids": inputs["token_ids"], "attention_mask": inputs["attention_mask"]}
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(recycler.reduce(model).generate(**inputs, **options), model.generate(**tokens, **options))


def test_it_is_saved_loaded_and_merged(tokenizer: Any, tmp_path: Path) -> None:
    model = t5()
    with Recycler(model, tokenizer, layer="last", store=tmp_path / "store", dtype="float32") as recycler:
        recycler.fill([np.arange(3, 9)], progress=False)
        reduced = recycler.reduce(model)
        inputs = next(iter(recycler.reader([np.arange(3, 9)]))).model_inputs()
        labels = torch.tensor([[5, 6]])
        with torch.no_grad():
            reduced.get_parameter("decoder.final_layer_norm.weight").add_(0.5)
            loss = reduced(**inputs, labels=labels).loss
            reduced.save_pretrained(tmp_path / "saved")
            again = recycler.load_reduced(tmp_path / "saved")
            kept, loaded = reduced.state_dict(), again.state_dict()
            assert kept.keys() == loaded.keys()
            assert all(torch.equal(loaded[name], weights) for name, weights in kept.items())
            # Equal weights that lie elsewhere in memory can give another last bit.
            torch.testing.assert_close(again(**inputs, labels=labels).loss, loss, atol=1e-6, rtol=1e-6)
            merged = reduced.merge_into(t5())
            tokens = {"input_ids": inputs["token_ids"], "attention_mask": inputs["attention_mask"]}
            torch.testing.assert_close(merged(**tokens, labels=labels).loss, loss, atol=1e-5, rtol=1e-5)


def test_whisper_from_what_its_encoder_gives() -> None:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        **{**_BART, "max_source_positions": 20, "max_target_positions": 40, "num_mel_bins": 8, "pad_token_id": 1},
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    config.max_position_embeddings = 40
    model = transformers.WhisperForConditionalGeneration(config).eval()
    features = torch.randn(2, 8, 40)
    with torch.no_grad():
        rows = model.get_encoder()(features).last_hidden_state
        reduced = reduce(model, "last")
        labels = torch.tensor([[5, 6, 7], [8, 9, 10]])
        full = model(input_features=features, labels=labels)
        torch.testing.assert_close(reduced(activations=rows, labels=labels).loss, full.loss)
        for options in OPTIONS:
            options = {**options, "max_new_tokens": 5, "do_sample": False}
            expected = model.generate(input_features=features, **options)
            assert torch.equal(reduced.generate(activations=rows, **options), expected)


def test_sites_for_reading_say_so(tokenizer: Any, tmp_path: Path) -> None:
    model = t5()
    for place in ({"layer": 0}, {"layer": 4}, {"site": "encoder.block.1.layer.0"}):
        recycler = Recycler(model, tokenizer, **place, store=tmp_path / "store")  # type: ignore[arg-type]
        with recycler, pytest.raises(LayerError, match=r"for reading.*1\.\.3, or layer=\"last\""):
            recycler.reduce(model)
    llama = KINDS["qwen3"].make(AutoModelForCausalLM, vocab_size=VOCABULARY)
    with (
        Recycler(llama, tokenizer, layer="last", store=tmp_path / "store") as recycler,
        pytest.raises(LayerError, match=r"norm are for reading.*1\.\.3\. Record that"),
    ):
        recycler.reduce(llama)
    with pytest.raises(LayerError, match="no encoder-decoder"):
        reduce(llama, "last")
    with pytest.raises(ModelError, match=r"keys and values that the lower layers.*merge_into"):
        reduce(llama, 2).generate(activations=torch.zeros(1, 2, 32), token_ids=torch.ones(1, 2))
    reduced = reduce(model, "last")
    with pytest.raises(ModelError, match="needs activations"):
        reduced(input_ids=torch.ones(1, 2))
    with pytest.raises(ShapeError, match="do not belong"):
        reduced(activations=torch.zeros(1, 3, 32), token_ids=torch.ones(1, 2))


def test_a_base_model_has_its_encoder_where_the_family_says() -> None:
    for model in (t5(), KINDS["t5"].make(AutoModel), bart()):
        base = base_model_of(model)
        assert family_of(base).stack == "encoder"

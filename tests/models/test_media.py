"""Images and audio as documents: rows, reduced models, fine-tuning, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image as pil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import actcache
from actcache.errors import (
    CanaryError,
    DocumentError,
    DocumentTooLongError,
    ErrorBudgetError,
    LowerHalfMismatchError,
    MissingEntryError,
    ModelError,
    RecipeError,
    ShapeError,
    UsageError,
    VerificationError,
)
from actcache.models.families import base_model_of, family_of
from actcache.models.processing import processor_digest
from tests.support.media import KINDS, documents, is_visual, pictures, processor, sounds, task_model

LAYER = 2


def made(kind: str, given: list[Any]) -> list[torch.Tensor]:
    """What the processor makes of each document alone, by a caller of transformers."""
    if is_visual(kind):
        return [processor(kind)(images=one, return_tensors="pt")["pixel_values"] for one in given]
    name = "input_features" if kind == "whisper" else "input_values"
    return [processor(kind)(one, sampling_rate=rate, return_tensors="pt")[name] for one, rate in given]


def hooked(kind: str, model: Any, given: list[Any], layer: int = LAYER) -> list[np.ndarray]:
    """What goes into the layer after ``layer``, each document alone, by a plain hook."""
    found: list[np.ndarray] = []
    base = base_model_of(model)
    following = family_of(base).layers_of(base)[layer]

    def take(module: Any, args: Any, kwargs: Any) -> None:
        found.append((args[0] if args else kwargs["hidden_states"])[0].numpy().copy())

    hook = following.register_forward_pre_hook(take, with_kwargs=True)
    with torch.no_grad():
        for inputs in made(kind, given):
            model(inputs)
    hook.remove()
    return found


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def recycler(kind: str, tmp_path):
    with actcache.Recycler(
        task_model(kind), processor(kind), layer=LAYER, store=tmp_path / "store", dtype="float32"
    ) as made:
        yield made


def test_rows_are_those_of_a_plain_hook(kind, recycler):
    given = documents(kind)
    report = recycler.fill(given, progress=False)
    assert (report.computed, report.present) == (len(given), 0)
    expected = hooked(kind, task_model(kind), given)
    for entry, rows in zip(recycler.space.get(recycler.keys(given)), expected, strict=True):
        assert entry.token_ids is None
        np.testing.assert_allclose(entry.activations, rows, rtol=2e-6, atol=2e-6)
    assert recycler.fill(given, progress=False).present == len(given)
    assert recycler.verify(texts=given, task_model=task_model(kind)).ok
    if kind in ("dinov2", "wav2vec2"):
        assert len({len(rows) for rows in expected}) > 1  # several sizes, each as if alone


def test_a_reduced_model_learns_what_the_frozen_model_learns(kind, recycler):
    given = documents(kind)
    labels = np.arange(len(given)) % 3
    recycler.fill(given, progress=False)
    options: dict[str, Any] = {"labels": labels, "batch_size": 2, "shuffle": True, "seed": 3}
    losses: dict[str, list[float]] = {}
    for regime in ("F", "R"):
        model, batches = recycler.regime(regime, task_model(kind), given, **options)
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=3e-3)
        model.eval()  # dropout would draw other numbers
        losses[regime] = []
        for _ in range(3):
            for batch in batches:
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[regime].append(float(loss.detach()))
    assert len(losses["R"]) >= 3 * len(given) // 2
    np.testing.assert_allclose(losses["R"], losses["F"], rtol=0, atol=1e-4)
    assert np.mean(losses["R"][-3:]) < np.mean(losses["R"][:3])


def test_a_reduced_model_has_nothing_of_the_lower_half(kind, recycler, tmp_path):
    recycler.fill(documents(kind), progress=False)
    model = task_model(kind)
    reduced = recycler.reduce(model)
    assert set(reduced.state_dict()) < set(model.state_dict())
    weights = sum(one.numel() for one in model.parameters())
    assert sum(one.numel() for one in reduced.parameters()) < 0.75 * weights
    reduced.save_pretrained(tmp_path / "reduced")
    again = recycler.load_reduced(tmp_path / "reduced")
    batch = next(iter(recycler.reader(documents(kind), batch_size=2)))
    with torch.no_grad():
        torch.testing.assert_close(again(**batch.model_inputs()).logits, reduced.eval()(**batch.model_inputs()).logits)
        full = model(torch.cat([made(kind, documents(kind))[i] for i in batch.documents]))
    torch.testing.assert_close(again(**batch.model_inputs()).logits, full.logits, rtol=0, atol=1e-5)


def test_computed_on_a_miss(kind, recycler):
    given = documents(kind)
    reader = recycler.reader(given, batch_size=4, on_missing="compute", labels=np.arange(len(given)))
    batches = list(reader)
    assert all(len(set(batch.lengths.tolist())) == 1 for batch in batches)
    assert sorted(int(label) for batch in batches for label in batch.labels) == list(range(len(given)))
    assert len(recycler.space) == len(given)


def test_identity_is_the_processors_too(kind):
    model = task_model(kind)
    with actcache.open("ram:one") as store, actcache.Recycler(model, processor(kind), layer=2, store=store) as one:
        other = type(processor(kind)).from_dict(processor(kind).to_dict())
        assert processor_digest(other) == processor_digest(processor(kind)) == one.recipe.tokenizer
        if is_visual(kind):
            other.image_mean = [0.4, 0.5, 0.5]
        else:
            other.padding_value = 0.5
        with actcache.Recycler(model, other, layer=2, store=store) as changed:
            assert set(one.recipe.differences(changed.recipe)) == {"tokenizer"}
        for module in base_model_of(task_model(kind, seed=1)).modules():
            if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d):  # what makes patches or frames
                with pytest.raises(LowerHalfMismatchError):
                    one.reduce(task_model(kind, seed=1))
                break


def test_another_lower_half_is_seen_by_the_canaries(kind, recycler):
    recycler.fill(documents(kind)[:2], progress=False)
    base = recycler.agreement.lower.base_model
    first = family_of(base).layers_of(base)[0]
    first.register_forward_hook(lambda module, args, out: out + 0.02 * out.flip(-1))
    with pytest.raises(CanaryError):
        recycler.reader(documents(kind)[:2])


def test_wrong_rows_are_seen_by_verify(kind, recycler):
    given = documents(kind)[:3]
    recycler.fill(given, progress=False)
    keys = recycler.keys(given)
    wrong = recycler.space.get(keys)[1].activations + np.float32(0.1)
    recycler.space.put([keys[1]], [wrong], overwrite=True)
    with pytest.raises(VerificationError) as caught:
        recycler.verify(texts=given)
    assert caught.value.report.failed == [keys[1]]
    with pytest.raises(UsageError, match="give the documents themselves"):
        recycler.verify()


def test_keys_by_bytes(tmp_path):
    paths = []
    for i, image in enumerate(pictures()[:3]):
        paths.append(tmp_path / f"{i}.png")
        image.save(paths[-1])
    model = task_model("vit")
    with (
        actcache.open("ram:bytes") as store,
        actcache.Recycler(model, processor("vit"), layer=1, store=store) as by_content,
        actcache.Recycler(model, processor("vit"), layer=1, store=store, key_by="bytes") as by_bytes,
    ):
        assert by_content.recipe == by_bytes.recipe
        assert by_content.keys(paths) == by_content.keys(pictures()[:3])
        assert set(by_bytes.keys(paths)).isdisjoint(by_content.keys(paths))
        assert by_bytes.keys([actcache.Image(path) for path in paths]) == by_content.keys(paths)  # it says so itself
        assert by_bytes.fill(paths, progress=False).computed == 3
        assert by_content.fill(paths, progress=False).computed == 3
        with pytest.raises(DocumentError, match="decoded already"):
            by_bytes.fill(pictures()[:1], progress=False)
        with pytest.raises(UsageError, match="key_by"):
            actcache.Recycler(model, processor("vit"), layer=1, store=store, key_by="name")


def test_arrays_and_columns_of_a_data_set():
    import datasets

    given = pictures()[:4]
    with actcache.Recycler(task_model("vit"), processor("vit"), layer=1, store="ram:columns") as recycler:
        recycler.fill([np.asarray(image) for image in given], progress=False)
        table = datasets.Dataset.from_dict({"image": given, "label": [0, 1, 2, 0]})
        table = table.cast_column("image", datasets.Image())
        assert recycler.fill(table, field="image", progress=False).present == 4
        undecoded = table.cast_column("image", datasets.Image(decode=False))
        assert recycler.fill(undecoded, field="image", progress=False).present == 4
        batch = next(iter(recycler.reader(table, field="image", labels=table["label"])))
        assert batch.labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("kind", ["vit", "whisper"])
def test_a_folder_is_loaded_with_its_processor(kind, tmp_path):
    base_model_of(task_model(kind)).save_pretrained(tmp_path / "model")
    processor(kind).save_pretrained(tmp_path / "model")
    if kind == "whisper":
        transformers.WhisperModel(task_model(kind).config).save_pretrained(tmp_path / "model")
    with actcache.Recycler.from_pretrained(tmp_path / "model", layer=2, store="ram:loaded", device="cpu") as recycler:
        assert recycler.fill(documents(kind), progress=False).computed == len(documents(kind))


def test_several_layers_in_one_pass():
    with actcache.Recyclers(task_model("whisper"), processor("whisper"), layers=[1, 3], store="ram:two") as both:
        both.fill(sounds(), progress=False)
        for layer in (1, 3):
            entries = both[layer].space.get(both[layer].keys(sounds()))
            expected = hooked("whisper", task_model("whisper"), sounds(), layer)
            for entry, rows in zip(entries, expected, strict=True):
                np.testing.assert_allclose(np.float32(entry.activations), rows, atol=2e-3)


def test_a_processor_of_both_is_taken_for_its_part(recycler_of_text):
    tokenizer, bert = recycler_of_text
    both = transformers.CLIPProcessor(processor("vit"), tokenizer)
    with (
        actcache.Recycler(task_model("vit"), both, layer=1, store="ram:both") as images,
        actcache.Recycler(task_model("vit"), processor("vit"), layer=1, store="ram:both2") as plain,
    ):
        assert images.recipe == plain.recipe
    with actcache.Recycler(bert, both, layer=1, store="ram:both3") as texts:
        assert texts.agreement.encoder.has_token_ids


@pytest.fixture
def recycler_of_text(tokenizer, make_model):
    return tokenizer, make_model(transformers.AutoModel)


def test_what_does_not_fit_the_model_is_refused(recycler_of_text):
    tokenizer, bert = recycler_of_text
    vit = task_model("vit")
    cases: list[tuple[Any, Any, str]] = [
        (vit, tokenizer, "takes pixel_values, and a .* makes input_ids.*give the model's image processor"),
        (vit, processor("whisper"), "give the model's image processor"),
        (bert, processor("vit"), "takes input_ids, and a ViTImageProcessorPil makes pixel_values.*tokenizer"),
        (task_model("whisper"), processor("vit"), "takes input_features.*feature extractor"),
        (task_model("whisper"), transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1), "does not fit"),
        (task_model("whisper"), transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=2), "does not fit"),
        (task_model("ast"), transformers.ASTFeatureExtractor(max_length=64, num_mel_bins=16), "does not fit"),
    ]
    for model, wrong, says in cases:
        with pytest.raises(ModelError, match=says):
            actcache.Recycler(model, wrong, layer=1, store="ram:wrong")
    larger = ViTImageProcessorPil(size={"height": 48, "width": 32})  # its positions can be interpolated
    with actcache.Recycler(vit, larger, layer=1, store="ram:larger", dtype="float32") as recycler:
        recycler.fill(pictures()[:2], progress=False)
        inputs = larger(images=pictures()[:2], return_tensors="pt")["pixel_values"]
        batch = next(iter(recycler.reader(pictures()[:2])))
        with torch.no_grad():
            full = vit(inputs, interpolate_pos_encoding=True).logits
            torch.testing.assert_close(recycler.reduce(vit)(**batch.model_inputs()).logits, full, rtol=0, atol=1e-5)
    for options, error in (
        ({"max_length": 7}, UsageError),
        ({"extras": ["spans"]}, UsageError),
        ({"special_tokens": False}, UsageError),
        ({"too_long": actcache.windows(8)}, RecipeError),
    ):
        with pytest.raises(error):
            actcache.Recycler(vit, processor("vit"), layer=1, store="ram:wrong", **options)
    with pytest.raises(UsageError, match="key_by is for images"):
        actcache.Recycler(bert, tokenizer, layer=1, store="ram:wrong", key_by="bytes")


@pytest.mark.parametrize("kind", ["vit"])
def test_bad_images_are_named_and_lose_nothing(recycler, tmp_path):
    broken = tmp_path / "broken.png"
    pictures()[0].save(broken)
    broken.write_bytes(broken.read_bytes()[:80])
    for wrong, says in (
        (broken, r"document 1: .*broken.png.* cannot be decoded"),
        ("a cat on a mat", r"document 1: 'a cat on a mat' .* names no file"),
        (actcache.Audio(np.zeros(10, np.float32), 16_000), "document 1: it is audio"),
        ([101, 102], "document 1: a list is no such document"),
        (None, "document 1: a missing value"),
    ):
        with pytest.raises(DocumentError, match=says):
            recycler.fill([pictures()[0], wrong], progress=False)
    recycler.fill([pictures()[0]], progress=False)
    assert len(recycler.space) == 1
    with pytest.raises(MissingEntryError):
        recycler.reader(pictures()[:2])
    with pytest.raises(UsageError, match="conversations"):
        recycler.chats([[{"role": "user", "content": "hello"}]])
    grey = pictures()[1].convert("L")  # as RGB, which the model takes
    recycler.fill([grey, pictures()[1].convert("RGBA"), pil.new("CMYK", (20, 20))], progress=False)
    rows = [entry.activations for entry in recycler.space.get(recycler.keys([grey, grey.convert("RGB")]))[:1]]
    recycler.fill([grey.convert("RGB")], progress=False)
    np.testing.assert_array_equal(rows[0], recycler.space.get(recycler.keys([grey.convert("RGB")]))[0].activations)


def test_what_a_codec_does_to_images_is_measured_and_bounded():
    model = task_model("vit")
    with actcache.Recycler(model, processor("vit"), layer=2, store="ram:int8", dtype="int8") as recycler:
        with pytest.raises(ErrorBudgetError, match="int8 changes hidden"):
            recycler.fill(pictures(), progress=False, max_error=1e-6, metric="hidden")
        assert len(recycler.space) == 0
        assert recycler.fill(pictures(), progress=False).computed == 12
        assert recycler.verify(texts=pictures()).ok
        rows = hooked("vit", model, pictures())
        stored = [entry.activations for entry in recycler.space.get(recycler.keys(pictures()))]
        off = sum(float(np.square(a - b).sum()) for a, b in zip(stored, rows, strict=True))
        norm = sum(float(np.square(b).sum()) for b in rows)
        assert recycler.measured.rows == pytest.approx((off / norm) ** 0.5, rel=1e-3)
        found = recycler.measure(pictures(), task_model=model)
        with torch.no_grad():  # independently: the full model with the stored rows put in by a hook
            full = model(torch.cat(made("vit", pictures()))).logits
            swap = model.vit.layers[2].register_forward_pre_hook(lambda module, args: (torch.tensor(np.stack(stored)),))
            replaced = model(torch.cat(made("vit", pictures()))).logits
            swap.remove()
        assert found.logits == pytest.approx(float((replaced - full).norm() / full.norm()), rel=1e-2)
        chosen = recycler.choose(pictures(), max_error=0.05, layers=[1, 2], dtypes=["float32", "int8"])
        assert (chosen.layer, chosen.dtype) == (2, "int8")


def test_sounds_of_several_lengths_are_measured():
    with actcache.Recycler(
        task_model("wav2vec2"), processor("wav2vec2"), layer=2, store="ram:sounds", dtype="int8"
    ) as recycler:
        recycler.fill(sounds(), progress=False)
        assert 0 < recycler.measured.hidden < 0.05
        assert recycler.measured.documents == 9


@pytest.mark.parametrize("kind", ["whisper", "ast", "wav2vec2"])
def test_bad_audio_is_named(kind, recycler):
    samples = sounds()[0][0]
    for wrong, error, says in (
        ((samples, 8_000), DocumentError, "document 1: .*8,000 samples a second, .* takes 16,000"),
        (samples, DocumentError, "document 1: samples need their rate"),
        (actcache.Image(pictures()[0]), DocumentError, "document 1: it is an image"),
    ):
        with pytest.raises(error, match=says):
            recycler.fill([(samples, 16_000), wrong], progress=False)
    long = np.sin(np.arange(3 * 16_000) / 20).astype(np.float32)
    if kind == "wav2vec2":  # which takes any length, but nothing shorter than its filters
        with pytest.raises(DocumentError, match=r"document 0: .* cannot be computed"):
            recycler.fill([(long[:5], 16_000)], progress=False)
        return
    with pytest.raises(DocumentTooLongError, match=r"document 0: .*3\.0 s long"):
        recycler.fill([(long, 16_000)], progress=False)
    options: dict[str, Any] = {"layer": LAYER, "store": "ram:cut", "dtype": "float32", "too_long": "truncate"}
    with actcache.Recycler(task_model(kind), processor(kind), **options) as cutting:
        cutting.fill([(long, 16_000)], progress=False)
        rows = cutting.space.get(cutting.keys([(long, 16_000)]))[0].activations
        np.testing.assert_allclose(rows, hooked(kind, task_model(kind), [(long, 16_000)])[0], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["dinov2"])
def test_images_of_several_sizes_share_no_batch(recycler):
    given = pictures()
    recycler.fill(given, progress=False)
    reduced = recycler.reduce(task_model("dinov2"))
    for options in ({}, {"shuffle": True}, {"bucket": True}, {"max_tokens": 60}, {"shuffle": True, "drop_last": True}):
        reader = recycler.reader(given, batch_size=3, **options)
        batches = list(reader)
        seen = sorted(int(i) for batch in batches for i in batch.documents)
        assert seen == list(range(12)) if "drop_last" not in options else len(seen) >= 9
        assert all(batch.attention_mask.all() for batch in batches)
        assert len(reader) == len(batches)
    mixed = next(iter(recycler.reader(given, batch_size=12, equal_lengths=False)))
    with pytest.raises(ShapeError, match="equal_lengths=True"):
        reduced(**mixed.model_inputs())
    with pytest.raises(UsageError, match="drop_last=True"):
        recycler.reader(given, batch_size=3, ranks=(0, 2))
    dealt = [recycler.reader(given, batch_size=2, ranks=(rank, 2), drop_last=True) for rank in (0, 1)]
    assert all(batch.attention_mask.all() for reader in dealt for batch in reader)
    with pytest.raises(ModelError, match="pixel_values"):
        reduced(pixel_values=made("dinov2", given[:1])[0])


def test_training_never_skips_the_layer_that_puts_the_rows_in():
    """wav2vec2 skips each layer with a probability; without the rows its outputs would be of nothing."""
    model = task_model("wav2vec2").eval()
    base = base_model_of(model)
    base.config.layerdrop = 1.0  # all of them, whenever it trains
    reduced = actcache.models.reduce(model, LAYER)
    given = sounds()[:1]
    rows = torch.tensor(np.stack(hooked("wav2vec2", model, given)))
    expected = reduced(activations=rows).logits
    for module in reduced.modules():  # trains, but for dropout
        module.training = not isinstance(module, torch.nn.Dropout)
        for name in ("dropout_p", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    for name in ("hidden_dropout", "activation_dropout", "attention_dropout", "final_dropout"):
        setattr(base_model_of(reduced).config, name, 0.0)
    torch.testing.assert_close(reduced(activations=rows).logits, expected, atol=1e-5, rtol=1e-5)
    assert base.config.layerdrop == 1.0  # the task model is untouched

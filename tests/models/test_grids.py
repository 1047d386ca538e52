"""Layers that hold rows as a grid: convolutional networks, and vision transformers without a line of patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import actcache
from actcache.errors import LayerError, ModelError, ShapeError, UnsupportedModelError
from actcache.models import LowerHalf, family_of, reduce
from actcache.models.families import base_model_of
from tests.support.media import pictures, task_model

_CLASSES = {"num_labels": 3}
_STAGES = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 4], **_CLASSES}
_SAM = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_dim": 48, "output_channels": 16}


def model_of(kind: str) -> PreTrainedModel:
    """Return a tiny model; no weight is 0, or nothing would be seen through it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any
        if kind == "resnet":
            config: Any = transformers.ResNetConfig(embedding_size=8, layer_type="basic", **_STAGES)
            model = transformers.ResNetForImageClassification(config)
        elif kind == "convnext":
            config = transformers.ConvNextConfig(image_size=32, patch_size=2, **_STAGES)
            model = transformers.ConvNextForImageClassification(config)
        else:
            config = transformers.SamVisionConfig(
                image_size=32, patch_size=8, window_size=2, global_attn_indexes=[2], **_SAM
            )
            model = transformers.SamVisionModel(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    checked: PreTrainedModel = model.eval()
    return checked


def plain_rows(kind: str, model: PreTrainedModel, pixels: torch.Tensor, layer: int) -> np.ndarray:
    """What layer ``layer`` gives, by a plain hook, place by place of the grid."""
    layers: Any = {
        "resnet": lambda: model.resnet.encoder.stages[1].layers,
        "convnext": lambda: model.convnext.encoder.stages[1].layers,
        "sam": lambda: model.vision_encoder.layers,
    }[kind]()
    found: list[torch.Tensor] = []
    handle = layers[layer - 1].register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model(pixels)
    handle.remove()
    grid = found[0] if kind == "sam" else found[0].permute(0, 2, 3, 1)
    _, height, width, _ = grid.shape
    return np.stack([grid[:, y, x].numpy() for y in range(height) for x in range(width)], axis=1)


def outputs_of(output: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("kind", ["resnet", "convnext", "sam"])
def test_rows_are_the_grids_places_and_replay_is_the_full_model(kind: str) -> None:
    model = model_of(kind)
    base = base_model_of(model)
    pixels = torch.randn(3, 3, 32 if kind != "resnet" else 64, 32 if kind != "resnet" else 64)
    with torch.no_grad():
        full = outputs_of(model(pixels))
    for layer in (1, 2, 3):
        rows = LowerHalf(base, family_of(base), layer).rows_of({"pixel_values": pixels})
        np.testing.assert_array_equal(rows, plain_rows(kind, model, pixels, layer))
        reduced = reduce(model, layer)
        assert not any("patch_embed" in name or "stages.0" in name for name in reduced.state_dict())
        with torch.no_grad():
            got = outputs_of(reduced(activations=rows))
        assert got.keys() == full.keys()
        for name, value in full.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)
        withheld = "hidden_states" in reduced.actcache_family.withheld
        assert withheld or kind != "convnext"  # which returns what goes through the stages before, too
        assert not withheld or kind != "sam"
        if withheld:
            with torch.no_grad(), pytest.raises(ModelError, match="no hidden_states: they are of stages"):
                reduced(activations=rows, output_hidden_states=True)
        else:
            with torch.no_grad():
                states = model(pixels, output_hidden_states=True).hidden_states
                known = reduced(activations=rows, output_hidden_states=True).hidden_states
            assert len(known) == len(states)
            assert known[-1].numel()
            for here, there in zip(known, states, strict=True):
                assert not here.numel() or torch.allclose(here, there, rtol=1e-5, atol=1e-5)
        with pytest.raises(ShapeError, match=r"rows of a document|takes \d+ rows"):
            reduced(activations=rows[:, :-1])


def test_a_network_of_convolutions_is_recorded_reduced_and_trained(tmp_path: Path) -> None:
    """Its processor makes other sizes than its configuration says, and its first layer halves the grid."""
    model = model_of("resnet")
    processor = ViTImageProcessorPil(size={"height": 48, "width": 32})
    labels = np.arange(12) % 3
    with actcache.Recycler(model, processor, layer=2, store=tmp_path / "store", dtype="float32") as recycler:
        recycler.fill(pictures(), progress=False)
        pixels = processor(images=pictures(), return_tensors="pt")["pixel_values"]
        expected = plain_rows("resnet", model, pixels, 2)
        for entry, rows in zip(recycler.space.get(recycler.keys(pictures())), expected, strict=True):
            np.testing.assert_allclose(entry.activations, rows, rtol=2e-6, atol=2e-6)
        reduced = recycler.reduce(model)
        reduced.save_pretrained(tmp_path / "reduced")
        again = recycler.load_reduced(tmp_path / "reduced")
        for batch in recycler.reader(pictures(), labels=labels, batch_size=4):
            full = model(pixels[batch.documents], labels=torch.tensor(labels[batch.documents]))
            for one in (reduced, again):
                got = one(**batch.model_inputs())
                torch.testing.assert_close(got.logits, full.logits, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(got.loss, full.loss, rtol=1e-5, atol=1e-5)


def test_sites_of_a_network_of_convolutions() -> None:
    model = model_of("resnet")
    base = base_model_of(model)
    pixels = torch.randn(2, 3, 64, 64)
    before, after = (LowerHalf(base, family_of(base), layer) for layer in (0, 1))
    assert (before.hidden_size, after.hidden_size) == (8, 16)
    assert before.rows_of({"pixel_values": pixels}).shape == (2, 256, 8)
    assert after.rows_of({"pixel_values": pixels}).shape == (2, 64, 16)
    with pytest.raises(UnsupportedModelError, match=r"gives a tensor \[2, 16, 8, 8\]"):
        LowerHalf(base, family_of(base), "layers.2.layer.0").hidden_size  # noqa: B018
    with pytest.raises(LayerError, match=r"has layers 1\.\.4"):
        reduce(model, 4)


def test_what_the_lower_half_gives_is_not_made_up() -> None:
    """wav2vec2's ``extract_features`` are of its convolutions, which a reduced model has not."""
    base = base_model_of(task_model("wav2vec2"))
    sound = torch.randn(2, 4000)
    rows = LowerHalf(base, family_of(base), 2).rows_of({"input_values": sound})
    reduced = reduce(base, 2)
    with torch.no_grad():
        full, got = base(sound), reduced(activations=rows)
    assert full.extract_features is not None
    assert got.extract_features is None
    torch.testing.assert_close(got.last_hidden_state, full.last_hidden_state, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), pytest.raises(ModelError, match=r"no extract_features.*return_dict=False"):
        reduced(activations=rows, return_dict=False)
    assert not any("feature" in name for name in reduced.state_dict())


def test_chance_is_caught_before_anything_is_stored() -> None:
    """A ViTMAE leaves out patches by chance, and a model may look at the other images of its batch."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    mae = transformers.ViTMAEModel(transformers.ViTMAEConfig(image_size=32, patch_size=8, **sizes)).eval()
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    with pytest.raises(UnsupportedModelError, match="a document computed twice"):
        actcache.Recycler(mae, processor, layer=2, store="ram:mae")
    model = task_model("vit")
    model.vit.layers[0].register_forward_hook(lambda module, args, output: output - 0.1 * output.mean(0))
    with pytest.raises(UnsupportedModelError, match="alone and in a batch"):
        actcache.Recycler(model, processor, layer=2, store="ram:batch")

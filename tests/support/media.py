"""Images and audio for the tests, and tiny random models that take them.

The images are real pictures: icons and a photograph that matplotlib brings, and shapes that Pillow draws. The sounds
are synthesized: tones, chirps and beats.
"""

from __future__ import annotations

import functools
import wave
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

RATE = 16_000

_SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64, "num_labels": 3}
_WHISPER = {
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "num_labels": 3,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_source_positions": 50,
    "num_mel_bins": 8,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_PATCHES = {"image_size": 32, "patch_size": 8}
_CONVOLUTIONS = {
    "conv_dim": (16, 16),
    "conv_stride": (10, 8),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 32,
    "classifier_proj_size": 16,
    "layerdrop": 0.0,
}
_SPECTROGRAM = {"max_length": 128, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 16}

#: By name: the task model's class, its configuration, and what makes its processor.
KINDS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "vit": (
        "ViTForImageClassification",
        _SIZES | _PATCHES,
        lambda: ViTImageProcessorPil(size={"height": 32, "width": 32}),
    ),
    "dinov2": (  # takes images of any size, whose positions it interpolates
        "Dinov2ForImageClassification",
        _SIZES | _PATCHES,
        lambda: BitImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False, resample=3),
    ),
    "whisper": (
        "WhisperForAudioClassification",
        _WHISPER,
        lambda: transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1),
    ),
    "wav2vec2": (
        "Wav2Vec2ForSequenceClassification",
        _SIZES | _CONVOLUTIONS,
        lambda: transformers.Wav2Vec2FeatureExtractor(),
    ),
    "ast": (
        "ASTForAudioClassification",
        _SIZES | _SPECTROGRAM,
        lambda: transformers.ASTFeatureExtractor(max_length=128, num_mel_bins=16),
    ),
}


def is_visual(kind: str) -> bool:
    return kind in ("vit", "dinov2")


def task_model(kind: str, seed: int = 0, **options: Any) -> Any:
    """Return a tiny random task model in eval mode."""
    name, config, _ = KINDS[kind]
    cls = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(cls.config_class(**config, **options)).eval()


@functools.cache
def processor(kind: str) -> Any:
    return KINDS[kind][2]()


def documents(kind: str) -> list[Any]:
    """Return documents for a kind of model, and for all of two or more sizes."""
    return pictures() if is_visual(kind) else sounds()


@functools.cache
def pictures() -> list[Image.Image]:
    """Twelve pictures of three classes (i % 3): icons and photograph, circles, stripes."""
    folder = Path(matplotlib.get_data_path())
    icons = sorted((folder / "images").glob("*.png"))[:3]
    real = [Image.open(path).convert("RGB") for path in (*icons, folder / "sample_data" / "grace_hopper.jpg")]
    real[-1] = real[-1].resize((96, 112))
    found = []
    for i in range(12):
        size = ((64, 64), (96, 64), (64, 80))[i // 4]
        if i % 3 == 0:
            found.append(real[i // 3].resize(size))
            continue
        image = Image.new("RGB", size, (30 * i % 255, 90, 200 - 10 * i))
        draw = ImageDraw.Draw(image)
        if i % 3 == 1:
            draw.ellipse((8 + i, 6, 40 + i, 50), fill=(255, 20 * i, 0), outline="white", width=3)
        else:
            for x in range(0, size[0], 6 + i // 3):
                draw.line((x, 0, size[0] - x, size[1]), fill=(0, 255 - 9 * x % 255, 128), width=2)
        found.append(image)
    return found


@functools.cache
def sounds() -> list[tuple[np.ndarray, int]]:
    """Nine sounds of three classes (i % 3): tones, chirps, beats; of 0.2, 0.3 and 0.4 s."""
    found = []
    for i in range(9):
        t = np.arange(int(RATE * (0.2, 0.3, 0.4)[i // 3])) / RATE
        if i % 3 == 0:
            wave_form = np.sin(2 * np.pi * (220 + 40 * i) * t)
        elif i % 3 == 1:
            wave_form = np.sin(2 * np.pi * (300 + (900 + 50 * i) * t) * t)
        else:
            wave_form = np.sin(2 * np.pi * 440 * t) * (np.sin(2 * np.pi * (8 + i) * t) > 0)
        found.append(((0.5 * wave_form).astype(np.float32), RATE))
    return found


def write_wave(path: Path, samples: np.ndarray, rate: int = RATE, channels: int = 1, width: int = 2) -> Path:
    """Write whole numbers as a WAV file by Python's own module."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path

"""From images and audio to what a model takes: the processor's identity, and features in the place of token ids."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import FeatureExtractionMixin, PreTrainedModel, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin

from actcache.errors import DocumentError, DocumentTooLongError, ModelError, RecipeError
from actcache.format.arguments import check_choice
from actcache.format.media import BY, Audio, By, Image, audio_of, image_of
from actcache.format.recipe import canonical_json
from actcache.io.cached import cached_property
from actcache.models.discovery import encoder_path, main_input_of, small_inputs
from actcache.models.tokenizing import Encoded

#: What a processor says of itself that changes no number: where it came from, and what it is called.
_COSMETIC = {
    *("processor_class", "_processor_class", "auto_map", "_auto_class", "name_or_path", "_name_or_path"),
    *("_commit_hash", "transformers_version", "image_processor_type", "feature_extractor_type", "return_tensors"),
}
#: Names under which models take what is no text.
FEATURE_NAMES = ("pixel_values", "input_features", "input_values")


@dataclass(frozen=True, eq=False)
class Features:
    """One image or audio as the model takes it. It has no token ids."""

    name: str  # of the model's argument: ``pixel_values``, ``input_features``, ``input_values``
    values: NDArray[np.float32]  # without a batch's axis
    length: (
        int  # rows that the model makes of it: patches, with what stands for the whole of them, or frames; 0: unknown
    )


#: One entry of a document as the model takes it.
Made = Encoded | Features


def takes_features(base_model: PreTrainedModel) -> bool:
    """Return whether a model's documents are images or audio."""
    return main_input_of(base_model) in FEATURE_NAMES


def sample_features(base_model: PreTrainedModel, shape: tuple[int, ...] | None = None) -> Features:
    """Return features to run a model once, of a shape, or of that which its configuration names; noise."""
    name = main_input_of(base_model)
    if shape is not None:
        return Features(name, np.random.default_rng(0).standard_normal(shape, np.float32), 0)
    run = base_model.get_submodule(encoder_path(base_model))
    return Features(name, small_inputs(run)[name][0].float().cpu().numpy(), 0)


def larger(sample: Features) -> Features:
    """Return features of another size than a sample's, as some models take: twice as high, or twice as long."""
    axis = 1 if sample.name == "pixel_values" else 0
    return replace(sample, values=np.concatenate([sample.values, sample.values[::-1]], axis=axis))


def processor_of(processor: Any, base_model: PreTrainedModel) -> Any:
    """Return the part of a processor that makes a model's input, or what was given where it has no parts.

    Raises:
        ModelError: it makes another input than the model takes: a tokenizer for a model of images, ...
    """
    name = main_input_of(base_model)
    parts = [processor]
    if isinstance(processor, ProcessorMixin):
        parts = [getattr(processor, attribute) for attribute in processor.get_attributes()]
    for part in parts:
        if name in (getattr(part, "model_input_names", None) or ()):
            return part
    made = ", ".join(dict.fromkeys(one for part in parts for one in (getattr(part, "model_input_names", None) or ())))
    kind = {"pixel_values": "image processor", "input_ids": "tokenizer"}.get(name, "feature extractor")
    raise ModelError(
        f"a {type(base_model).__name__} takes {name}, and a {type(processor).__name__} makes {made or 'none'}: give "
        f"the model's {kind}"
    )


def processor_digest(processor: Any) -> str:
    """Return a digest of all that decides what an image processor or feature extractor makes: 64 hexadecimal digits.

    That is its class (the ones that use Pillow and torchvision resize otherwise), and its configuration but for names
    and paths.
    """
    kept = {name: _plain(value) for name, value in processor.to_dict().items() if name not in _COSMETIC}
    kind = type(processor)
    text = canonical_json({"class": f"{kind.__module__.rpartition('.')[2]}.{kind.__qualname__}", "configuration": kept})
    return hashlib.blake2b(text.encode(), digest_size=32, person=b"actcache/process").hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value.hex()
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "items"):  # transformers' SizeDict
        return _plain(dict(value))
    raise ModelError(
        f"the processor's configuration holds a {type(value).__name__}, of which nobody can tell whether two are the "
        "same: give a processor whose configuration can be saved as JSON"
    )


class MediaEncoder:
    """Turns images or audio into a model's features, each as if it were alone. Not thread-safe.

    Args:
        processor: an image processor or feature extractor of transformers; used as it is.
        model: whose input it makes.
        rows_of: tells how many rows the model makes of features.
        key_by: what keys are made from, of documents that do not say it themselves.
        too_long: audio that is longer than the feature extractor takes is refused, or cut as it cuts it.

    Raises:
        ModelError: the processor does not fit the model.
        RecipeError: ``too_long`` is neither.
    """

    # What text has and these have not; see ``DocumentEncoder``.
    windows = None
    passages = None
    extras: tuple[str, ...] = ()
    max_length = None
    special_tokens = False
    has_token_ids = False
    chunk = 128  #: documents whose features are held at a time

    def __init__(
        self,
        processor: Any,
        model: PreTrainedModel,
        rows_of: Callable[[Features], int],
        *,
        key_by: By = "content",
        too_long: Any = "refuse",
    ) -> None:
        if too_long not in ("refuse", "truncate"):
            raise RecipeError(f"documents of images and audio are 'refuse'd or 'truncate'd, not cut into {too_long!r}")
        check_choice("key_by", key_by, BY)
        self.processor = processor_of(processor, model)
        self.name, self.too_long, self.key_by = main_input_of(model), too_long, key_by
        self._model, self._rows_of = type(model).__name__, rows_of
        self._channels = getattr(model.config, "num_channels", None)
        self._lengths: dict[tuple[int, ...], int] = {}  # rows by the shape of features
        self.images = isinstance(self.processor, ImageProcessingMixin)
        if not self.images and not isinstance(self.processor, FeatureExtractionMixin):
            raise ModelError(f"a {type(processor).__name__} is no image processor or feature extractor of transformers")
        try:
            self._encoded(self.canaries()[0], cut=True)
        except DocumentError as error:
            raise ModelError(f"a {type(self.processor).__name__} does not fit the {self._model}: {error}") from None

    def digest(self) -> str:
        """Return the digest of what decides the features."""
        return processor_digest(self.processor)

    def media(self, documents: Sequence[Any], positions: Sequence[int]) -> list[Image | Audio]:
        """Return what callers gave as images or audio; ``DocumentError`` names the position of what is none."""
        found: list[Image | Audio] = []
        for document, position in zip(documents, positions, strict=True):
            with _of_position(position):
                if isinstance(document, Audio if self.images else Image):
                    raise DocumentError(f"it is {document.what}, and a {self._model} takes {self.name}")
                found.append(image_of(document, self.key_by) if self.images else audio_of(document, self.key_by))
        return found

    def keys(self, documents: Sequence[Any], first: int = 0) -> list[bytes]:
        """Return the documents' keys; a ``DocumentError`` names the position, from ``first``, of one that has none."""
        keys = []
        positions = range(first, first + len(documents))
        for one, position in zip(self.media(documents, positions), positions, strict=True):
            with _of_position(position):
                keys.append(one.key())
        return keys

    def encode(self, documents: Sequence[Any], positions: Sequence[int] | None = None) -> list[list[Features]]:
        """Return each document's features, as the one entry that it makes.

        Args:
            positions: of the documents in the caller's own sequence, for errors; 0, 1, ... by default.

        Raises:
            DocumentError: a document is no image or audio, cannot be decoded, or has another rate than the model's.
            DocumentTooLongError: audio is too long and the policy is to refuse.
            ModelError: the processor makes what the model does not take.
        """
        names = range(len(documents)) if positions is None else positions
        result = []
        for one, position in zip(self.media(documents, names), names, strict=True):
            with _of_position(position):
                result.append([self._encoded(one, cut=self.too_long == "truncate")])
        return result

    def canary_features(self) -> list[Features]:
        """Return the features of ``canaries``, cut where they are too long."""
        return [self._encoded(one, cut=True) for one in self.canaries()]

    def _encoded(self, document: Image | Audio, *, cut: bool) -> Features:
        made = self._of_image(document) if isinstance(document, Image) else self._of_audio(document, cut=cut)
        values = np.ascontiguousarray(made[self.name][0], np.float32)
        if not np.isfinite(values).all():
            raise DocumentError(f"{document!r} comes out of the {type(self.processor).__name__} with NaN or infinity")
        features = Features(self.name, values, 0)
        if values.shape not in self._lengths:
            try:
                self._lengths[values.shape] = self._rows_of(features)
            except ModelError as error:
                raise DocumentError(f"{document!r} cannot be computed: {error}") from None
        return replace(features, length=self._lengths[values.shape])

    def _of_image(self, document: Image) -> Any:
        image = document.decoded()
        if self._channels in (None, 3) and image.mode != "RGB":
            image = image.convert("RGB")
        elif self._channels == 1 and image.mode != "L":
            image = image.convert("L")
        return self.processor(images=image, return_tensors="np")

    def _of_audio(self, document: Audio, *, cut: bool) -> Any:
        samples, rate = document.decoded()
        wanted = self.processor.sampling_rate
        if rate != wanted:
            raise DocumentError(
                f"{document!r} has {rate:,} samples a second, and the {type(self.processor).__name__} takes "
                f"{wanted:,}: resample it first"
            )
        longest = self._longest
        if longest is not None and len(samples) > longest and not cut:
            raise DocumentTooLongError(
                f"{document!r} is {len(samples) / rate:.1f} s long, and the {type(self.processor).__name__} keeps "
                f"{longest / rate:.1f} s: give too_long='truncate', or cut it"
            )
        return self.processor(samples, sampling_rate=rate, return_tensors="np")

    @cached_property
    def _longest(self) -> int | None:
        """Samples that the feature extractor keeps; None where it has no limit."""
        if (samples := getattr(self.processor, "n_samples", None)) is not None:  # Whisper's
            return int(samples)
        frames = getattr(self.processor, "max_length", None)  # of 25 ms each, every 10 ms (AST's)
        if isinstance(frames, int) and self.name == "input_values":
            return int(self.processor.sampling_rate * (0.01 * (frames - 1) + 0.025)) + 1
        return None

    def canaries(self) -> list[Image | Audio]:
        """Return the fixed documents of ``actcache.models.canary``: part of format version 1, they never change."""
        if self.images:
            return [Image(_canary_pixels(*size)) for size in ((96, 128), (240, 180), (64, 64))]
        rate = int(self.processor.sampling_rate)
        return [Audio(_canary_samples(int(rate * seconds), i), rate) for i, seconds in enumerate((1.0, 0.6, 0.35))]


def _canary_pixels(height: int, width: int) -> NDArray[np.uint8]:
    """Return an image of edges, slopes and noise that is made of whole numbers alone, and so is the same everywhere."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    noise = (x * 7919 + y * 104729 + x * y * 31) % 61
    bands = (x * 192 // width + noise, (x // 16 + y // 16) % 2 * 160 + noise, y * 128 // height + (x * y // 64) % 128)
    pixels: NDArray[np.uint8] = np.stack(bands, axis=-1).clip(0, 255).astype(np.uint8)
    return pixels


def _canary_samples(count: int, kind: int) -> NDArray[np.float32]:
    """Return a rising tone of triangles with noise, of whole numbers before they are scaled, which is exact."""
    n = np.arange(count, dtype=np.int64)
    phase = (n * (200 + 57 * kind) + n * n // (40 + 11 * kind)) % 16384
    tone = np.minimum(phase, 16384 - phase) * 2 - 8192
    noise = (n * 7919 + n * n * 31) % 2039 - 1019
    samples: NDArray[np.float32] = (tone + noise).astype(np.float32) / np.float32(32768)
    return samples


class _of_position:
    """Has errors of a document name its position."""

    def __init__(self, position: int) -> None:
        self._position = position

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> Literal[False]:
        if isinstance(error, DocumentError) and not str(error).startswith("document "):
            raise type(error)(f"document {self._position}: {error}") from None
        return False

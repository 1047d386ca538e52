"""Images and audio as documents: where they come from, how they are decoded, and their keys.

A key is made from what was decoded, so that the same picture has the same key as a PNG, a PIL image or an array; or, by
``"bytes"``, from the bytes of its file, which is faster, and another name for each form of the same picture. Decoding
images needs Pillow (the extra ``images``). WAV files of whole numbers are read by Python's own ``wave``; other audio
files by soundfile, where it is installed (the extra ``audio``).
"""

from __future__ import annotations

import io
import os
import sys
import wave
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ActcacheError, DocumentError, MissingExtraError, ShapeError, requires_extra
from actcache.format.arguments import check_choice, is_whole, to_numpy
from actcache.format.keys import audio_file_key, audio_key, image_file_key, image_key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image as PILImage

#: What a key is made from: what is decoded, or the file's bytes.
By = Literal["content", "bytes"]
BY: tuple[By, ...] = ("content", "bytes")

_FILES = (str, os.PathLike, bytes)
#: Pillow's modes of images whose pixels are not numbers of 8 bits, and what keys and models see instead of them.
_PLAIN = {"1": "L", "P": "RGB", "PA": "RGBA", "RGBa": "RGBA", "La": "LA", "RGBX": "RGB"}
_DEEP = ("I", "F")  # and "I;16", ...: numbers of 16 or 32 bits
_OF_BANDS = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


class _FromFile:
    """A document that is decoded when it is asked for, and not kept."""

    what: str

    def __init__(self, source: Any, by: By) -> None:
        check_choice("by", by, BY)
        if by == "bytes" and not isinstance(source, _FILES):
            raise DocumentError(
                f"{self.what} that is decoded already ({type(source).__name__}) has no file, whose bytes could be its "
                "key: give the path or the file's bytes, or take by='content'"
            )
        self.source, self.by = source, by

    def content(self) -> bytes:
        """Return the bytes of its file; raises ``DocumentError`` where it cannot be read."""
        if isinstance(self.source, bytes):
            return self.source
        try:
            return Path(self.source).read_bytes()
        except OSError as error:
            raise DocumentError(f"cannot read {os.fspath(self.source)}: {error.strerror or error}") from None
        except ValueError as error:  # a null character
            raise DocumentError(f"{self.source!r:.80} names no file: {error}") from None

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Have whatever a decoder raises say whose file it is."""
        try:
            yield
        except ActcacheError:
            raise
        except Exception as error:  # decoders raise under all of Python's names
            said = str(error).strip().partition("\n")[0] or type(error).__name__
            raise DocumentError(f"{self} cannot be decoded as {self.what}: {said}") from None

    def __str__(self) -> str:
        if isinstance(self.source, bytes):
            return f"a file of {len(self.source):,} bytes"
        if isinstance(self.source, str | os.PathLike):
            return os.fspath(self.source)
        return f"a {type(self.source).__name__}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self}>"


class Image(_FromFile):
    """An image as a document. Immutable; its pixels are decoded at each call.

    Args:
        source: a PIL image; an array or tensor uint8, ``[height, width]`` or ``[height, width, bands]`` with 1 to 4
            bands (grey, grey and alpha, RGB, RGBA); a path; or a file's bytes. A file is turned as its EXIF data says;
            of an animation it is the first frame.
        by: what its key is made from: ``"content"``, its mode, size and pixels; or ``"bytes"``, its file's bytes.

    Raises:
        DocumentError: the source is none of these, or ``by`` is ``"bytes"`` and there is no file.
    """

    what = "an image"

    def __init__(self, source: Any, by: By = "content") -> None:
        if not isinstance(source, _FILES) and not _is_pil(source):
            source = _pixel_array(source)
        super().__init__(source, by)

    def decoded(self) -> PILImage:
        """Return it as a PIL image of one of the modes L, LA, RGB, RGBA, CMYK, YCbCr, LAB and HSV.

        Raises:
            DocumentError: it cannot be read, is damaged, or has more than 8 bits a band.
            MissingExtraError: Pillow is not installed.
        """
        with requires_extra("images", "images need Pillow"):
            from PIL import Image as pil
            from PIL import ImageOps
        if isinstance(self.source, np.ndarray):
            bands = 1 if self.source.ndim == 2 else self.source.shape[2]
            flat = self.source[..., 0] if bands == 1 and self.source.ndim == 3 else self.source
            height, width = flat.shape[:2]
            return pil.frombytes(_OF_BANDS[bands], (width, height), np.ascontiguousarray(flat).tobytes())
        with self._decoding():
            if isinstance(self.source, _FILES):
                with pil.open(io.BytesIO(self.content())) as opened:
                    opened.load()
                    image: PILImage = ImageOps.exif_transpose(opened) or opened
            else:
                image = self.source
                image.load()
            if image.mode.startswith(_DEEP):
                raise DocumentError(
                    f"{self} has pixels of mode {image.mode!r}, of more than 8 bits: scale them to 0..255 and give an "
                    "array uint8, for converting would cut them off"
                )
            plain = _PLAIN.get(image.mode, image.mode)
            if plain != image.mode and "transparency" in image.info:
                plain = "RGBA"
            return image if plain == image.mode else image.convert(plain)

    def key(self) -> bytes:
        """Return its key; raises as ``decoded`` does."""
        if self.by == "bytes":
            return image_file_key(self.content())
        image = self.decoded()
        return image_key(image.mode, *image.size, image.tobytes())


class Audio(_FromFile):
    """Mono audio as a document. Immutable; files are decoded at each call.

    Args:
        source: samples ``[n]``, a floating point array or tensor, about -1 to 1 (kept as float32); a path; or a file's
            bytes.
        rate: samples a second, of samples; files say their own.
        by: what its key is made from: ``"content"``, its samples and rate; or ``"bytes"``, its file's bytes.

    Raises:
        DocumentError: the source is none of these, or ``by`` is ``"bytes"`` and there is no file.
    """

    what = "audio"

    def __init__(self, source: Any, rate: int | None = None, by: By = "content") -> None:
        if isinstance(source, _FILES):
            if rate is not None:
                raise DocumentError("an audio file says its rate itself: leave rate out")
        else:
            source = _sample_array(source)
            if not is_whole(rate) or rate < 1:
                raise DocumentError(
                    f"samples need their rate, a whole number a second (rate=16000), not {rate!r:.80}: "
                    "actcache.Audio(samples, rate)"
                )
        super().__init__(source, by)
        self._rate = 0 if rate is None else int(rate)

    def decoded(self) -> tuple[NDArray[np.float32], int]:
        """Return its samples, float32 ``[n]``, and their rate.

        Raises:
            DocumentError: it cannot be read, is damaged, empty, or has more than one channel.
            MissingExtraError: it is no WAV file of whole numbers, and soundfile is not installed.
        """
        if isinstance(self.source, np.ndarray):
            return self.source, self._rate
        content = self.content()
        with self._decoding():
            channels, rate = _wave_of(content) if _is_plain_wave(content) else _other_of(content, str(self))
        if channels.shape[1] != 1:
            raise DocumentError(
                f"{self} has {channels.shape[1]} channels, and models hear one: mix it (samples.mean(axis=1)) and give "
                "actcache.Audio(samples, rate)"
            )
        return _sample_array(channels[:, 0]), rate

    def key(self) -> bytes:
        """Return its key; raises as ``decoded`` does."""
        if self.by == "bytes":
            return audio_file_key(self.content())
        samples, rate = self.decoded()
        return audio_key(rate, samples)


def image_of(value: Any, by: By = "content") -> Image:
    """Return what a caller gave for an image as one: also the ``{"bytes", "path"}`` of a data set's column.

    Raises:
        DocumentError: it is none.
    """
    if isinstance(value, Image):
        return value
    value = _of_column(value)
    if isinstance(value, str) and not _is_file(value):
        raise _no_file(value, "images")
    return Image(value, by)


def audio_of(value: Any, by: By = "content") -> Audio:
    """Return what a caller gave for audio as it: also ``(samples, rate)``, and the ``{"bytes", "path"}``,
    ``{"array", "sampling_rate"}`` or decoder of a data set's column.

    Raises:
        DocumentError: it is none.
    """
    if isinstance(value, Audio):
        return value
    value = _of_column(value)
    if isinstance(value, Mapping) and {"array", "sampling_rate"} <= value.keys():
        return Audio(value["array"], value["sampling_rate"], by)
    if isinstance(value, tuple) and len(value) == 2 and is_whole(value[1]):
        return Audio(*value, by=by)
    if hasattr(value, "get_all_samples"):  # torchcodec's decoder, which datasets hands out
        found = value.get_all_samples()
        channels = to_numpy(found.data)
        return Audio(channels[0] if len(channels) == 1 else channels, int(found.sample_rate), by)
    if isinstance(value, str) and not _is_file(value):
        raise _no_file(value, "audio")
    return Audio(value, by=by)


def _of_column(value: Any) -> Any:
    """Return the file that a data set's column of images or audio holds; other values as they are."""
    if hasattr(value, "as_py"):
        value = value.as_py()
    if isinstance(value, Mapping) and "path" in value and "bytes" in value:
        return value["path"] if value["bytes"] is None else value["bytes"]
    return value


def _is_file(name: str) -> bool:
    try:
        return os.path.exists(name)
    except ValueError:  # a null character
        return False


def _no_file(value: str, kind: str) -> DocumentError:
    what = "a text" if any(map(str.isspace, value)) else "a path"
    return DocumentError(f"{value!r:.60} ({what}?) names no file, and this model's documents are {kind}")


def _is_pil(source: object) -> bool:
    pil = sys.modules.get("PIL.Image")  # who has such an image has imported it
    return pil is not None and isinstance(source, pil.Image)


def _pixel_array(source: Any) -> NDArray[np.uint8]:
    array = _array(source, "an image is a PIL image, an array uint8, a path or a file's bytes")
    if array.dtype != np.uint8:
        raise DocumentError(
            f"the array of an image holds {array.dtype}, and pixels are uint8, 0 to 255: give the image before it was "
            "scaled or normalized, which the model's processor does"
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in _OF_BANDS) or not array.size:
        raise DocumentError(
            f"the array of an image is [height, width] or [height, width, 1 to 4 bands], not {list(array.shape)}"
        )
    return array


def _sample_array(source: Any) -> NDArray[np.float32]:
    array = _array(source, "audio is samples with their rate, a path or a file's bytes")
    if array.dtype.kind != "f":
        raise DocumentError(
            f"samples are floating point numbers, about -1 to 1, not {array.dtype}: divide them by their largest "
            "(32768 for int16)"
        )
    if array.ndim != 1 or not array.size:
        raise DocumentError(f"samples of one channel are [n], at least one, not {list(array.shape)}")
    if not np.isfinite(array).all():
        raise DocumentError("the samples hold NaN or infinity")
    return np.ascontiguousarray(array, np.float32)


def _array(source: Any, what: str) -> NDArray[Any]:
    if not isinstance(source, np.ndarray) and not hasattr(source, "__dlpack__"):
        given = "a missing value" if source is None else f"a {type(source).__name__}"
        raise DocumentError(f"{given} is no such document: {what}")
    try:
        return to_numpy(source)
    except ShapeError as error:
        raise DocumentError(f"the document cannot be read: {error}") from None


def _is_plain_wave(content: bytes) -> bool:
    """Return whether Python's ``wave`` reads it: a WAV file of whole numbers, or one that says nothing of them."""
    at = content.find(b"fmt ", 12, 4096)
    return content[:4] == b"RIFF" and content[8:12] == b"WAVE" and (at < 0 or content[at + 8 : at + 10] == b"\x01\0")


def _wave_of(content: bytes) -> tuple[NDArray[np.float32], int]:
    """Return the samples ``[n, channels]`` of a WAV file of whole numbers, and their rate."""
    with wave.open(io.BytesIO(content)) as file:
        channels, width, rate, frames, *_ = file.getparams()
        data = np.frombuffer(file.readframes(frames), np.uint8)
    if len(data) != frames * channels * width:
        raise DocumentError(f"it says that it holds {frames:,} samples, and ends before that: it is cut off")
    if width not in _WIDTHS:
        raise DocumentError(f"it has samples of {width} bytes")
    return _WIDTHS[width](data).reshape(-1, channels), rate


def _of_24_bits(data: NDArray[np.uint8]) -> NDArray[np.float32]:
    wide = np.zeros((len(data) // 3, 4), np.uint8)
    wide[:, 1:] = data.reshape(-1, 3)
    return (wide.view("<i4").reshape(-1) / np.float64(1 << 31)).astype(np.float32)


#: By the bytes of a sample: a file's bytes as numbers from -1 to 1.
_WIDTHS: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.float32]]] = {
    1: lambda data: (data.astype(np.float32) - np.float32(128)) / np.float32(128),
    2: lambda data: data.view("<i2").astype(np.float32) / np.float32(32768),
    3: _of_24_bits,
    4: lambda data: (data.view("<i4") / np.float64(1 << 31)).astype(np.float32),
}


def _other_of(content: bytes, where: str) -> tuple[NDArray[np.float32], int]:
    try:
        import soundfile
    except ImportError as error:
        raise MissingExtraError(
            f"{where} is no WAV file of whole numbers; FLAC, Ogg, MP3 and other WAV files need soundfile: "
            f"pip install 'actcache[audio]' ({error})"
        ) from None
    samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    return samples, int(rate)

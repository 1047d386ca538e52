"""Images and audio: how they are decoded, and their keys."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
import soundfile
from PIL import Image as pil

import actcache
from actcache.errors import DocumentError, MissingExtraError
from actcache.format.media import audio_of, image_of
from tests.support.media import pictures, sounds, write_wave


def digest(kind: str, *parts: bytes) -> bytes:
    """The definition of docs/format.md, written anew."""
    whole = hashlib.blake2b(digest_size=32, person=b"actcache/" + kind.encode())
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.digest()


def saved(image: pil.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def test_the_vectors_of_the_format():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    samples = np.array([0.0, 0.5, -1.0], np.float32)
    keys = {
        "image": actcache.document_key(actcache.Image(pixels)),
        "imgfile": actcache.document_key(actcache.Image(b"not looked into", by="bytes")),
        "audio": actcache.document_key(actcache.Audio(samples, 16_000)),
        "audfile": actcache.document_key(actcache.Audio(b"not looked into", by="bytes")),
    }
    size = (4).to_bytes(8, "little") + (2).to_bytes(8, "little")
    assert keys["image"] == digest("image", b"RGB", size, bytes(range(24)))
    assert keys["imgfile"] == digest("imgfile", b"not looked into")
    assert keys["audio"] == digest("audio", (16_000).to_bytes(8, "little"), samples.tobytes())
    assert keys["audfile"] == digest("audfile", b"not looked into")
    assert {name: key.hex()[:16] for name, key in keys.items()} == {
        "image": "4d6967a69ff33e6f",
        "imgfile": "50e3a1bd2cfeeb7e",
        "audio": "ecd624a1239fc01f",
        "audfile": "1e11e2acc660ec96",
    }


def test_one_picture_has_one_key_however_it_comes(tmp_path):
    image = pictures()[0]
    path = tmp_path / "a.png"
    path.write_bytes(saved(image, "PNG"))
    ways = [image, np.asarray(image), path, str(path), path.read_bytes(), saved(image, "BMP"), saved(image, "TIFF")]
    ways += [{"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}]
    assert len({image_of(one).key() for one in ways}) == 1
    by_bytes = {image_of(one, "bytes").key() for one in ways[2:5]}
    assert len(by_bytes) == 1
    assert by_bytes.isdisjoint({image_of(image).key(), image_of(saved(image, "BMP"), "bytes").key()})


def test_mode_and_size_are_part_of_the_key():
    grey = np.arange(12, dtype=np.uint8)
    arrays = [
        grey.reshape(3, 4),
        grey.reshape(4, 3),
        grey.reshape(2, 2, 3),
        grey.reshape(2, 3, 2),
        grey.reshape(1, 3, 4),
    ]
    assert len({actcache.Image(array).key() for array in arrays}) == len(arrays)
    assert actcache.Image(grey.reshape(3, 4, 1)).key() == actcache.Image(grey.reshape(3, 4)).key()
    assert [actcache.Image(array).decoded().mode for array in arrays] == ["L", "L", "RGB", "LA", "RGBA"]


def test_palettes_and_bits_are_decoded():
    image = pictures()[1]
    paletted = image.quantize(16)
    assert image_of(saved(paletted, "PNG")).key() == image_of(paletted.convert("RGB")).key()
    assert image_of(image.convert("1")).decoded().mode == "L"


def test_a_photograph_is_turned_as_it_says():
    image = pictures()[4]
    exif = pil.Exif()
    exif[0x0112] = 6  # rotate by 270 degrees
    data = saved(image, "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(image_of(data).decoded()), np.asarray(image.rotate(270, expand=True)))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (b"GIF89a and no more", "cannot be decoded"),
        (b"", "cannot be decoded"),
        (saved(pictures()[0], "PNG")[:200], "cannot be decoded"),
        (saved(pil.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)), "PNG"), "more than 8 bits"),
        (np.zeros((8, 8, 3), np.float32), "pixels are uint8"),
        (np.zeros((3, 8, 8), np.uint8), "bands"),
        (np.zeros((0, 8, 3), np.uint8), "bands"),
        ("a photograph of a cat", "names no file"),
        (None, "a missing value"),
        (17, "a int is no such document"),
    ],
)
def test_what_is_no_image_is_one_named_error(source, says):
    with pytest.raises(DocumentError, match=says):
        image_of(source).key()


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DocumentError, match=r"cannot read .*absent\.png: No such file"):
        image_of(tmp_path / "absent.png").key()
    with pytest.raises(DocumentError, match="decoded already"):
        actcache.Image(pictures()[0], by="bytes")


def test_without_pillow_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'actcache\[images\]'"):
        actcache.Image(np.zeros((4, 4), np.uint8)).key()
    assert actcache.Image(b"any", by="bytes").key()  # which decodes nothing


def test_waves_are_what_soundfile_reads(tmp_path):
    rng = np.random.default_rng(0)
    for width, subtype in ((1, "PCM_U8"), (2, "PCM_16"), (3, "PCM_24"), (4, "PCM_32")):
        path = tmp_path / f"{width}.wav"
        soundfile.write(path, rng.uniform(-1, 1, 1001), 8_000, subtype=subtype)
        samples, rate = actcache.Audio(path).decoded()
        expected, expected_rate = soundfile.read(path, dtype="float32")
        np.testing.assert_array_equal(samples, expected)
        assert rate == expected_rate == 8_000
        assert samples.dtype == np.float32


def test_one_sound_has_one_key_however_it_comes(tmp_path):
    whole = np.round(sounds()[1][0] * 32_767).astype("<i2")
    path = write_wave(tmp_path / "a.wav", whole)
    samples = whole.astype(np.float32) / 32_768
    soundfile.write(tmp_path / "a.flac", whole, 16_000, subtype="PCM_16")
    soundfile.write(tmp_path / "float.wav", samples, 16_000, subtype="FLOAT")
    ways = [path, str(path), path.read_bytes(), (samples, 16_000), tmp_path / "a.flac", tmp_path / "float.wav"]
    ways += [{"array": samples, "sampling_rate": 16_000}, {"bytes": path.read_bytes(), "path": "x.wav"}]
    ways += [actcache.Audio(samples.astype(np.float64), 16_000)]
    assert len({audio_of(one).key() for one in ways}) == 1
    assert audio_of((samples, 8_000)).key() != audio_of((samples, 16_000)).key()


def test_what_is_no_audio_is_one_named_error(tmp_path):
    stereo = write_wave(tmp_path / "stereo.wav", np.zeros(20, "<i2"), channels=2)
    cut = tmp_path / "cut.wav"
    cut.write_bytes(write_wave(tmp_path / "whole.wav", np.zeros(2_000, "<i2")).read_bytes()[:1_000])
    empty = write_wave(tmp_path / "empty.wav", np.zeros(0, "<i2"))
    for source, says in (
        (stereo, "2 channels"),
        (cut, "cut off"),
        (empty, "at least one"),
        (b"no sound at all", "cannot be decoded"),
        (np.zeros(10, np.float32), "samples need their rate"),
        ((np.zeros(10, np.int16), 16_000), "32768 for int16"),
        ((np.zeros((2, 10), np.float32), 16_000), "one channel"),
        ((np.full(3, np.nan, np.float32), 16_000), "NaN"),
        ("a song", "names no file"),
        (tmp_path / "absent.wav", "No such file"),
    ):
        with pytest.raises(DocumentError, match=says):
            audio_of(source).key()


def test_without_soundfile_the_extra_is_named(monkeypatch, tmp_path):
    soundfile.write(tmp_path / "a.flac", np.zeros(100), 16_000)
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'actcache\[audio\]'"):
        actcache.Audio(tmp_path / "a.flac").key()


def test_a_text_model_says_what_an_image_is_not():
    from actcache.format.keys import normal_form

    with pytest.raises(DocumentError, match="the document is an image"):
        normal_form(actcache.Image(pictures()[0]))

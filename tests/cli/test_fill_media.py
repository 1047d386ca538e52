"""``cachectl`` on folders of images and audio: filled, forecast, pruned, repaired."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import h5py
import numpy as np
import pytest
import torch
import transformers

import actcache
from actcache.cli import corpus
from actcache.errors import DocumentError
from actcache.models.families import base_model_of
from tests.cli.running import cachectl
from tests.support.media import pictures, processor, sounds, task_model, write_wave

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def saved(kind: str, folder: Path) -> Path:
    base_model_of(task_model(kind)).save_pretrained(folder)
    processor(kind).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("vit", tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Nine pictures in folders by their classes, one in none, and what is no picture."""
    root = tmp_path / "photos"
    for i, picture in enumerate(pictures()[:9]):
        folder = root / ("icons", "circles", "stripes")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{i}.png")
    pictures()[9].save(root / "loose.PNG")
    (root / "icons" / "notes.md").write_text("not a picture")
    (root / ".hidden.png").write_bytes(b"")
    return root


def damage(store: Path) -> None:
    """Change a bit of the rows of a segment's first entry."""
    (path,) = [path for path in store.rglob("*.h5") if path.stat().st_size]
    with h5py.File(path) as file:
        begin = file["values"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[begin] ^= 1
    path.write_bytes(data)


NAMES = [
    *("circles/1.png", "circles/4.png", "circles/7.png", "icons/0.png", "icons/3.png", "icons/6.png", "loose.PNG"),
    *("stripes/2.png", "stripes/5.png", "stripes/8.png"),
]


def test_a_folder_of_images_is_filled_by_labels_and_ids(vit: Path, photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    given = [store, photos, "--model", vit, "--layer", 2, "--dtype", "float32", "--device", "cpu", "--json"]
    forecast = cachectl("fill", *given, "--dry-run").json()
    assert (forecast["documents"], forecast["present"]) == (10, 0)
    assert forecast["tokens"] == 10 * 17  # patches and CLS
    assert not store.exists()
    done = cachectl("fill", *given, "--collection", "photos").json()
    assert (done["documents"], done["computed"]) == (10, 10)
    assert done["labels"] == {"circles": 3, "icons": 3, "stripes": 3}
    assert cachectl("fill", *given, "--dry-run").json()["present"] == 10
    assert cachectl("fill", *given).json()["present"] == 10
    with actcache.open(store, mode="r") as opened:
        assert opened.collection("photos").ids == NAMES
        (fingerprint,) = opened.fingerprints()
        entries = opened[fingerprint[:8]].get(opened.collection("photos").keys)
    model, found = base_model_of(task_model("vit")), []
    hook = model.layers[2].register_forward_pre_hook(lambda module, args: found.append(args[0].numpy().copy()))
    order = [int(name.rpartition("/")[2][0]) if "/" in name else 9 for name in NAMES]
    with torch.no_grad():
        for i in order:
            model(processor("vit")(images=pictures()[i], return_tensors="pt")["pixel_values"])
    hook.remove()
    for entry, rows in zip(entries, found, strict=True):
        np.testing.assert_allclose(entry.activations, rows[0], rtol=2e-6, atol=2e-6)
    text = cachectl("fill", *given[:-1]).err + cachectl("fill", *given[:-1]).out
    assert "3 labels: circles 3, icons 3, stripes 3" in text


@pytest.mark.parametrize("by", ["content", "bytes"])
def test_what_is_gone_from_a_folder_is_pruned_from_the_store(by: str, vit: Path, photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    given = [store, photos, "--model", vit, "--layer", 2, "--device", "cpu", "--key-by", by, "--json"]
    cachectl("fill", *given).json()
    for name in ("circles/4.png", "loose.PNG"):
        (photos / name).unlink()
    plan = cachectl("prune", store, "--keep-only", photos, "--idle", 0, "--dry-run", "--json").json()
    assert len(plan["plan"]["spaces"]) == 1
    cachectl("prune", store, "--keep-only", photos, "--idle", 0, "--yes", "--json").json()
    assert cachectl("fill", *given, "--dry-run").json()["present"] == 8
    with actcache.open(store, mode="r") as opened:
        assert sum(len(opened[name]) for name in opened.fingerprints()) == 8


def test_a_folder_of_sounds_is_filled(tmp_path: Path) -> None:
    whisper = tmp_path / "whisper"
    transformers.WhisperModel(task_model("whisper").config).save_pretrained(whisper)
    processor("whisper").save_pretrained(whisper)
    folder = tmp_path / "sounds" / "tones"
    folder.mkdir(parents=True)
    for i, (samples, _) in enumerate(sounds()[:3]):
        write_wave(folder / f"{i}.wav", (samples * 32767).astype("<i2"))
    given = [tmp_path / "store", tmp_path / "sounds", "--model", whisper, "--layer", 2, "--device", "cpu", "--json"]
    assert cachectl("fill", *given).json()["computed"] == 3
    pattern = [given[0], folder / "*.wav", *given[2:]]
    assert cachectl("fill", *pattern).json()["present"] == 3


def test_what_cannot_be_is_said_before_the_work(vit: Path, photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    model = ["--model", vit, "--layer", 2, "--device", "cpu"]
    for options, code, says in (
        (["--field", "image"], 2, "images have no fields: leave --field"),
        (["--devices", "cpu,cpu"], 2, "several --devices are for texts"),
        (["--max-length", 7], 2, "for texts"),
        (["--format", "audio"], 6, "holds no audio: their names end in .wav"),
        (["--too-long", "windows", "--max-length", 7], None, "windows|for texts"),
    ):
        said = cachectl("fill", store, photos, *model, *options)
        assert code is None or said.code, said.err
        assert any(one in said.err for one in says.split("|")), said.err
        assert "Traceback" not in said.err
    (photos / "stripes" / "0.png").write_bytes(b"\x89PNG broken")
    assert "stripes/0.png" in cachectl("fill", store, photos, *model).err
    (photos / "circles" / "1.png").write_bytes(b"\x89PNG broken")  # the first one
    assert "cannot be decoded as an image" in cachectl("fill", tmp_path / "none", photos, *model).err
    assert not (tmp_path / "none").exists()
    assert (
        "--key-by is for images"
        in cachectl("fill", store, __file__, *model, "--key-by", "bytes", "--format", "text").err
    )
    assert "texts are wanted here" in cachectl("plan", photos, *model[:4]).err


def test_documents_of_a_folder_in_python(photos: Path) -> None:
    with corpus.find_media(photos) as media:
        assert media is not None
        documents = list(media.documents())
    assert [one.id for one in documents] == NAMES
    assert [one.label for one in documents[:7]] == ["circles"] * 3 + ["icons"] * 3 + [None]
    assert documents[0].content.key() == actcache.Image(pictures()[1]).key()
    (photos / "labels.csv").write_text("name,label\n")
    with corpus.find_media(photos) as media:
        assert media is None  # a corpus of texts, as it was before there were others
    with corpus.find_media(photos, "images") as media:
        assert media is not None
        assert len(media) == 10
    (photos / "labels.csv").unlink()
    write_wave(photos / "icons" / "one.wav", np.zeros(10, "<i2"))
    with (
        pytest.raises(DocumentError, match=r"several kinds.*10 images, 1 audio.*--format images"),
        corpus.find_media(photos),
    ):
        pass
    with pytest.raises(DocumentError, match="texts are wanted here"):
        next(corpus.read(photos, format="images"))


@pytest.mark.parametrize("by", ["content", "bytes"])
def test_corrupt_entries_of_images_are_computed_again_from_their_folder(
    by: str, vit: Path, photos: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    given = [store, photos, "--model", vit, "--layer", 2, "--device", "cpu", "--key-by", by, "--json"]
    cachectl("fill", *given).json()
    with actcache.open(store, mode="r") as opened:
        (fingerprint,) = opened.fingerprints()
        keys = opened[fingerprint[:8]].key_array()
        before = [entry.activations for entry in opened[fingerprint[:8]].get(keys)]
    damage(store)
    refused = cachectl("repair", store, "--model", vit, "--device", "cpu")
    assert refused.code == 5
    assert "cachectl repair --corpus FOLDER" in refused.out
    done = cachectl("repair", store, "--corpus", photos, "--model", vit, "--device", "cpu", "--json")
    (found,) = done.json()["spaces"]
    assert len(found["recomputed"]) == 1
    assert not found["missing"]
    with actcache.open(store, mode="r") as opened:
        for entry, rows in zip(opened[fingerprint[:8]].get(keys), before, strict=True):
            np.testing.assert_allclose(entry.activations, rows, atol=2e-3)
    assert cachectl("fill", *given).json()["present"] == 10

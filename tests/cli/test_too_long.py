"""``cachectl fill`` and documents that are too long: said before, and nothing empty stays."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import numpy as np
import pytest
import torch
import transformers

import actcache
from actcache import Recycler, document_key
from actcache.errors import DocumentError, DocumentTooLongError, RecipeError
from actcache.models.partition import share_of
from tests.cli.running import cachectl
from tests.support.tiny import save_tiny

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", words=["la", "li"])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Ten documents, of which numbers 3 and 7 are longer than the model takes, by their words."""
    path = tmp_path / "corpus.txt"
    path.write_text("".join(" ".join(["la"] * (600 if i in (3, 7) else 5 + i)) + f" {i}\n" for i in range(10)))
    return path


def test_it_is_said_before_and_nothing_empty_is_left(tiny, corpus, tmp_path):
    fill = ["fill", tmp_path / "s", corpus, "--model", tiny, "--layer", 1, "--quiet"]
    for options in ([], ["--layer", 2]):
        said = cachectl(*fill, *options).refused(2)
        assert "document 3 " in said
        assert "--too-long truncate" in said
        assert "too_long=" not in said
    assert "dtype 'wide'" in cachectl(*fill, "--dtype", "wide").refused(2)
    assert not (tmp_path / "s").exists()
    ahead = cachectl(*fill, "--dry-run", "--json").json()
    assert (ahead["too_long"], ahead["first_too_long"], ahead["documents"]) == (2, 3, 10)
    said = cachectl(*fill, "--dry-run").out
    assert f"2 documents longer than the {ahead['max_length']} tokens" in said
    assert "--too-long truncate" in said
    assert "will be cut" in cachectl(*fill, "--dry-run", "--too-long", "truncate").out
    assert cachectl(*fill, "--too-long", "truncate").code == 0
    assert cachectl(*fill, "--too-long", "truncate", "--dry-run", "--json").json()["too_long"] == 0  # they are there
    with actcache.open(tmp_path / "s", mode="r") as store:
        (space,) = store.spaces()
        assert len(space) == 10


def test_windows_are_as_long_as_the_model_takes(tiny, corpus, tmp_path):
    fill = ["fill", tmp_path / "s", corpus, "--model", tiny, "--layer", 1, "--quiet", "--too-long", "windows"]
    assert cachectl(*fill, "--stride", 4, "--collection", "all", "--json").json()["computed"] == 10
    with actcache.open(tmp_path / "s", mode="r") as store, store.spaces()[0] as space:
        most = space.recipe.max_length
        assert int(space.lengths(space.key_array()).max()) == most
        assert len(store.collection("all").keys) == len(space) > 10
        text = corpus.read_text().splitlines()[3]
        wanted = actcache.windows(most, 4).key(document_key(text), 0, last=False)
        assert wanted in space
        with Recycler.from_pretrained(tiny, layer=1, store=store, too_long=actcache.windows(stride=4)) as recycler:
            assert recycler.recipe.fingerprint == space.recipe.fingerprint
            assert not recycler.missing([text])


def test_progress_ends_with_all_documents_and_is_told_once(tiny, tmp_path):
    (tmp_path / "three.txt").write_text("la\nli\nla li\n")
    done = cachectl("fill", tmp_path / "s", tmp_path / "three.txt", "--model", tiny, "--layer", 1)
    told = [line for line in done.err.splitlines() if line.startswith("fill: ")]
    assert [line.partition(",")[0] for line in told] == ["fill: 3/3 documents"]


@pytest.mark.parametrize("stride", [0, 16])
def test_what_is_said_of_windows_before_is_what_is_stored(tiny, corpus, tmp_path, stride):
    options = ["--model", tiny, "--layer", 1, "--too-long", "windows", "--max-length", 64, "--stride", stride]
    fill = ["fill", tmp_path / "s", corpus, *options, "--json"]
    ahead = cachectl(*fill, "--dry-run").json()
    done = cachectl(*fill, "--quiet").json()
    assert (ahead["documents"], ahead["tokens"]) == (10, done["tokens"])
    assert done["tokens"] > 1300  # two documents of 602 are among them, and none is cut short
    with actcache.open(tmp_path / "s", mode="r") as store, store.spaces()[0] as space:
        assert space.usage().tokens == done["tokens"]
        rows = done["tokens"] * space.recipe.row_bytes
        assert rows <= ahead["nbytes"] < 3 * rows  # beside the rows, what is stored with each token and entry


def test_windows_of_a_model_that_has_no_limit(tiny):
    with pytest.raises(DocumentError, match="whole number"):
        actcache.windows(stride=1.5)  # type: ignore[call-overload]
    with pytest.raises(DocumentError, match="cannot overlap"):
        actcache.windows(stride=8).of(8)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    from actcache.models.tokenizing import DocumentEncoder

    with pytest.raises(RecipeError, match="max_length"):
        DocumentEncoder(tokenizer, None, "windows")


def test_options_take_what_people_type(tiny, tmp_path):
    """The same space, whoever says its dtype and layer; what is none of them names those that there are."""
    same = {"layer": np.int64(1), "dtype": torch.float32}, {"layer": "1", "dtype": "torch.float32"}, {"layer": -4}
    same[2]["dtype"] = "fp32"
    found = set()
    for options in ({"layer": 1, "dtype": "float32"}, *same):
        with Recycler.from_pretrained(tiny, store=tmp_path / "s", **options) as recycler:
            found.add(recycler.recipe.fingerprint)
            recycler.fill(["la li"], progress=False)
            batch = next(iter(recycler.reader(["la li"], batch_size=1, device="cpu", dtype=torch.float16)))
            assert batch.activations.dtype == torch.float16
            (entry,) = recycler.space.get([document_key("la li")], dtype=torch.float32)
            assert entry.activations.dtype == np.float32
    assert len(found) == 1
    with Recycler.from_pretrained(tiny, store=tmp_path / "s", layer=1, compute_dtype=torch.bfloat16) as other:
        assert other.recipe.compute_dtype == "bfloat16"
    with actcache.Recyclers.from_pretrained(tiny, store=tmp_path / "s", layers=2) as one:
        assert list(one) == [2]


@pytest.mark.parametrize("several", ["partition", pytest.param("devices", marks=pytest.mark.long)])
def test_fills_by_several_leave_nothing_empty(tiny, corpus, tmp_path, several):
    share = share_of(document_key(corpus.read_text().splitlines()[3]), 2)  # that of a document which is too long
    options = ["--partition", f"{share}/2"] if several == "partition" else ["--devices", "cpu,cpu"]
    fill = ["fill", tmp_path / "s", corpus, "--model", tiny, "--layers", "1,2", "--quiet", *options]
    assert "--too-long truncate" in cachectl(*fill).refused(2)
    assert not (tmp_path / "s").exists()
    assert cachectl(*fill, "--too-long", "truncate").code == 0
    with actcache.open(tmp_path / "s", mode="r") as store:
        assert len(store) == 2


@pytest.mark.parametrize("scheme", ["", "zarr:", "lmdb:"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_space_comes_to_be_with_its_first_documents(tiny, corpus, tmp_path, scheme, dtype):
    """In Python, too: what was refused leaves no space behind; until then it reads as an empty one."""
    texts = corpus.read_text().splitlines()
    with (
        actcache.open(f"{scheme}{tmp_path / 's'}") as store,
        Recycler.from_pretrained(tiny, layer=1, store=store, dtype=dtype) as recycler,
    ):
        assert recycler.space.created
        assert recycler.missing(texts) == list(range(10))
        with pytest.raises(DocumentTooLongError, match="document 3 "):
            recycler.fill((text for text in texts), progress=False)
        with pytest.raises(DocumentTooLongError, match="document 7 "):
            recycler.fill(texts, progress=False, partition=_of(texts[7], but=texts[3]))
        assert (len(recycler.space), len(store), list(store)) == (0, 0, [])
        assert recycler.fill(iter(texts[:3]), progress=False).computed == 3
        assert store.fingerprints() == [recycler.recipe.fingerprint]
        with Recycler.from_pretrained(tiny, layer=1, store=store, dtype=dtype) as again:
            assert not again.space.created
            assert again.missing(texts[:3]) == []


def _of(text: str, *, but: str) -> tuple[int, int]:
    """Return a share that has one text, and not another."""
    of = next(n for n in range(2, 50) if share_of(document_key(text), n) != share_of(document_key(but), n))
    return share_of(document_key(text), of), of

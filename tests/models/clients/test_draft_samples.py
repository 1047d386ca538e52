"""Samples of draft models in a store, and in other programs' files: there and back, and what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

import actcache
from actcache.admin.exchange import draft_samples as exchange
from actcache.errors import (
    CorruptEntryError,
    FormatError,
    MissingEntryError,
    NonFiniteError,
    ShapeError,
    SpaceNotFoundError,
    UsageError,
)
from actcache.models.clients.draft_samples import DraftSamples, layers_of
from tests.models.zoo import KINDS
from tests.support import segment_files
from tests.support.tiny import save_tiny

HIDDEN, COUNT = 8, 6
LAYERS = [2, 5, 8, 12]
CREATED: dict[str, Any] = {"model": "tiny", "hidden_size": HIDDEN, "dtype": "bfloat16", "source": "tests"}
IDS = [np.random.default_rng(n).integers(0, 1000, 3 + n) for n in range(COUNT)]
ROWS = [torch.randn(len(ids), 4, HIDDEN, generator=torch.Generator().manual_seed(len(ids))).bfloat16() for ids in IDS]
MASKS = [np.arange(len(ids)) % 2 == 0 for ids in IDS]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    with actcache.open(tmp_path / "store") as store:
        yield store


@pytest.fixture
def samples(store: Any) -> Iterator[DraftSamples]:
    with DraftSamples.create(store, LAYERS, **CREATED) as made:
        made.put(IDS, ROWS)
        made.flush()
        yield made


def test_samples_are_found_by_their_tokens(store: Any, samples: DraftSamples) -> None:
    for ids, rows in zip(IDS, ROWS, strict=True):
        for given in (ids, ids.tolist(), torch.from_numpy(ids)):
            found = samples.get(given)
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, rows)
    assert samples.get([1, 2, 3]) is None
    assert samples.put([IDS[0], IDS[0]], [ROWS[0], ROWS[0]]) == 0
    assert samples.prenorm
    with DraftSamples.find(store, LAYERS) as again, DraftSamples.find(store, LAYERS[::3], model="tiny") as two:
        assert torch.equal(again.get(IDS[2]), ROWS[2])
        assert torch.equal(two.get(IDS[2]), ROWS[2][:, ::3])
        assert two.put([[7, 8]], [torch.ones(2, 2, HIDDEN)]) == 1
        two.flush()
    assert samples.get([7, 8]) is None  # two layers have it, two have not
    names = [space.recipe.fingerprint for space in samples.spaces]
    with DraftSamples.find(store, [], spaces=names[::-1]) as turned:
        assert torch.equal(turned.get(IDS[1]), ROWS[1].flip(1))


@pytest.mark.filterwarnings("ignore")  # of the model, whose tokenizer is another's
def test_a_recyclers_spaces_are_samples(store: Any, tmp_path: Path) -> None:
    """One pass records all layers, the last one before and after the norm; samples are found by their tokens."""
    model = KINDS["qwen3"].make(AutoModel, None, vocab_size=128).eval()
    tokenizer = AutoTokenizer.from_pretrained(save_tiny(tmp_path / "tiny"))
    count, ids = model.config.num_hidden_layers, [one % model.config.vocab_size for one in IDS]
    seen: list[Any] = []
    for module in (*model.layers, model.norm):
        module.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    options: dict[str, Any] = {"store": store, "dtype": "float32", "check_canaries": False}
    with (
        actcache.Recyclers(model, tokenizer, layers=range(1, count + 1), **options) as recyclers,
        actcache.Recycler(model, tokenizer, site="norm", **options) as last,
    ):
        recyclers.fill(ids, progress=False)
        last.fill(ids, progress=False)
        for layers in ([1, 2, count], [1, 2, "norm"]):
            with DraftSamples.find(store, layers) as samples:
                assert samples.prenorm == (layers[-1] == count)
                for one in ids:
                    seen.clear()
                    model(torch.from_numpy(one)[None])
                    expected = [seen[-1 if layer == "norm" else layer - 1][0] for layer in layers]
                    torch.testing.assert_close(samples.get(one), torch.stack(expected, 1), atol=1e-5, rtol=1e-5)


def test_spaces_that_do_not_belong_together(store: Any, samples: DraftSamples) -> None:
    with pytest.raises(SpaceNotFoundError, match="no space for 3; it has tiny at layer 12"):
        DraftSamples.find(store, [2, 3])
    with pytest.raises(SpaceNotFoundError):
        DraftSamples.find(store, LAYERS, model="another")
    with pytest.raises(UsageError, match="two spaces"):
        DraftSamples.find(store, LAYERS[:1])
    with DraftSamples.create(store, [2, 5], **{**CREATED, "dtype": "float32"}) as others:
        others.put([[1, 2]], [torch.ones(2, 2, HIDDEN)])
        with pytest.raises(UsageError, match="several spaces for 2"):
            DraftSamples.find(store, LAYERS)
        with pytest.raises(ShapeError, match="hold other documents"):
            DraftSamples([samples.spaces[0], others.spaces[1]])
    with (
        DraftSamples.create(store, [1, 2], **{**CREATED, "hidden_size": 4}) as small,
        pytest.raises(ShapeError, match="not of one model"),
    ):
        DraftSamples([samples.spaces[0], small.spaces[1]])
    with pytest.raises(ShapeError, match=r"\[3, 4, hidden\]"):
        samples.put([IDS[0]], [ROWS[1]])
    assert layers_of("2, 16,norm") == [2, 16, "norm"]
    with pytest.raises(UsageError, match="separated by commas"):
        layers_of("2,,3")


def test_a_flipped_byte(store: Any, samples: DraftSamples) -> None:
    file = segment_files(Path(store.url) / "spaces" / samples.spaces[1].recipe.fingerprint)[0]
    content = bytearray(file.read_bytes())
    content[content.index(ROWS[3][:, 1].contiguous().view(torch.int16).numpy().tobytes())] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptEntryError):
        samples.get(IDS[3])
    assert samples.get(IDS[4]) is not None
    samples.put([IDS[3]], [ROWS[3]], overwrite=True)
    assert torch.equal(samples.get(IDS[3]), ROWS[3])


def test_speculators_there_and_back(store: Any, samples: DraftSamples, tmp_path: Path) -> None:
    order = [3, 0, 5, 1]
    assert exchange.export_speculators(samples, [IDS[i] for i in order], tmp_path / "out") == 4
    first = load_file(tmp_path / "out" / "hs_0.safetensors")
    assert torch.equal(first["hidden_states"], ROWS[3])
    assert torch.equal(first["token_ids"], torch.from_numpy(IDS[3]))
    told: list[Any] = []
    with actcache.open(tmp_path / "other") as other:
        for stored in (4, 0):
            done = exchange.import_speculators(
                other, tmp_path / "out", LAYERS, model="tiny", progress=lambda *done: told.append(done)
            )
            assert (done.samples, done.stored) == (4, stored)
        assert told[0] == ("import", 4, 4)
        with DraftSamples.find(other, LAYERS) as found:
            assert [space.recipe.fingerprint for space in found.spaces] == done.spaces
            for i in order:
                assert torch.equal(found.get(IDS[i]), ROWS[i])
    with pytest.raises(UsageError, match="stands already"):
        exchange.export_speculators(samples, IDS, tmp_path / "out")
    with pytest.raises(MissingEntryError, match="sample 1"):
        exchange.export_speculators(samples, [IDS[0], [1, 2, 3]], tmp_path / "half")


def test_specforge(samples: DraftSamples, tmp_path: Path) -> None:
    norm = torch.nn.LayerNorm(HIDDEN, dtype=torch.bfloat16)
    assert exchange.export_specforge(samples, IDS, tmp_path / "out", loss_masks=MASKS, norm=norm) == COUNT
    for i, file in enumerate(sorted((tmp_path / "out").iterdir())):
        raw = torch.load(file, weights_only=True)
        assert file.suffix == ".ckpt"
        assert torch.equal(raw["input_ids"], torch.from_numpy(IDS[i]))
        assert raw["loss_mask"].tolist() == MASKS[i].astype(int).tolist()
        assert torch.equal(raw["aux_hidden_state"], ROWS[i][:, :3].reshape(1, -1, 3 * HIDDEN))
        assert torch.equal(raw["hidden_state"], norm(ROWS[i][:, 3])[None])
        assert file.stat().st_size < 8 * ROWS[i].numel() + 8000  # no more of the storage than its rows
    with pytest.raises(UsageError, match="give it as norm="):
        exchange.export_specforge(samples, IDS, tmp_path / "other", loss_masks=MASKS)
    with pytest.raises(ShapeError, match="loss masks"):
        exchange.export_specforge(samples, IDS, tmp_path / "other", loss_masks=MASKS[:-1], norm=norm)
    with pytest.raises(UsageError, match="without a loss mask"):
        exchange.export_specforge(samples, IDS, tmp_path / "other", norm=norm)


def dumped(folder: Path, name: str = "a.pt", **changes: Any) -> Path:
    """A file as Model-Optimizer dumps it."""
    folder.mkdir(exist_ok=True)
    sample = {
        "input_ids": torch.from_numpy(IDS[0]),
        "hidden_states": ROWS[0][:, 3].clone(),
        "aux_hidden_states": ROWS[0][:, :3].reshape(len(IDS[0]), -1),
        "loss_mask": torch.from_numpy(MASKS[0]).long(),
        "hidden_states_prenorm": True,
        "conversation_id": "a",
    }
    torch.save({key: value for key, value in {**sample, **changes}.items() if value is not None}, folder / name)
    return folder


def test_model_optimizer_after_the_norm(store: Any, tmp_path: Path) -> None:
    folder = dumped(tmp_path / "in", hidden_states_prenorm=None)  # what older releases dumped
    layers = [2, 5, 8, "norm"]
    exchange.import_model_optimizer(store, folder, layers, model="tiny")
    with DraftSamples.find(store, layers) as found:
        assert torch.equal(found.get(IDS[0]), ROWS[0])
        assert not found.prenorm
        assert exchange.export_specforge(found, IDS[:1], tmp_path / "out") == 1
        (file,) = (tmp_path / "out").iterdir()
        assert torch.load(file, weights_only=True)["loss_mask"].tolist() == MASKS[0].astype(int).tolist()
        with pytest.raises(UsageError, match="before the model's final norm"):
            exchange.export_speculators(found, IDS[:1], tmp_path / "other")
    with pytest.raises(FormatError, match="by its number"):
        exchange.import_model_optimizer(store, dumped(tmp_path / "in"), layers, model="tiny")


class Executed:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/tmp/actcache-was-executed").write_text, ("x",))


def test_model_optimizer(store: Any, tmp_path: Path) -> None:
    done = exchange.import_model_optimizer(store, dumped(tmp_path / "in"), LAYERS, model="tiny")
    assert (done.samples, done.stored) == (1, 1)
    dumped(tmp_path / "in", "b.pt", input_ids=torch.tensor([3, 1, 2]), loss_mask=None)
    done = exchange.import_model_optimizer(store, tmp_path / "in", LAYERS, model="tiny")
    assert (done.samples, done.stored, done.loss_masks) == (2, 1, 1)
    with DraftSamples.find(store, LAYERS) as found:
        assert found.loss_mask(IDS[0]).tolist() == MASKS[0].tolist()
        assert found.loss_mask([3, 1, 2]) is None
        assert torch.equal(found.get(IDS[0]), ROWS[0])


BAD: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "pickled": (FormatError, "would execute it", {"x": Executed()}),
    "no ids": (FormatError, "no input_ids", {"input_ids": None}),
    "text": (FormatError, "no input_ids", {"input_ids": "1 2 3"}),
    "negative": (FormatError, "0 or more", {"input_ids": torch.tensor([1, -2, 3])}),
    "no rows": (FormatError, "no aux_hidden_states", {"aux_hidden_states": None}),
    "whole numbers": (FormatError, "no hidden_states", {"hidden_states": torch.ones(3, HIDDEN).long()}),
    "two layers": (FormatError, "3 inner layers", {"aux_hidden_states": torch.ones(3, 2 * HIDDEN).bfloat16()}),
    "fewer rows": (FormatError, "3 tokens", {"hidden_states": torch.ones(2, HIDDEN).bfloat16()}),
    "mask": (FormatError, "one number a token", {"loss_mask": torch.ones(2)}),
    "dtypes": (FormatError, "float32", {"hidden_states": torch.ones(3, HIDDEN)}),
    "after the norm": (FormatError, "after the final norm", {"hidden_states_prenorm": False}),
    "NaN": (
        NonFiniteError,
        "holds nan",
        {"hidden_states": torch.full((3, HIDDEN), float("nan")).bfloat16()},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_refused(store: Any, tmp_path: Path, name: str) -> None:
    error, why, changes = BAD[name]
    folder = dumped(tmp_path / "in", **changes)
    with pytest.raises(error, match=why):
        exchange.import_model_optimizer(store, folder, LAYERS, model="tiny")
    assert not Path("/tmp/actcache-was-executed").exists()


def test_files_that_are_truncated_or_foreign(store: Any, samples: DraftSamples, tmp_path: Path) -> None:
    """What came before such a file is stored, and importing goes on once it is out of the way."""
    exchange.export_speculators(samples, IDS, tmp_path / "out")
    good, files = tmp_path / "out" / "hs_0.safetensors", {}
    whole = good.read_bytes()
    files["no whole safetensors"] = whole[: len(whole) // 2]
    files["safetensors file"] = pickle.dumps({"a": 1})
    for why, content in files.items():
        good.write_bytes(content)
        with actcache.open(tmp_path / f"other {len(content)}") as other, pytest.raises(FormatError, match=why):
            exchange.import_speculators(other, tmp_path / "out", LAYERS, model="tiny")
    save_file({"hidden_states": ROWS[0][:, :2].contiguous(), "token_ids": torch.from_numpy(IDS[0])}, good)
    with actcache.open(tmp_path / "other") as other, pytest.raises(ShapeError, match="2 layers, and 4 are named"):
        exchange.import_speculators(other, tmp_path / "out", LAYERS, model="tiny")
    folder = dumped(tmp_path / "in")
    content = (folder / "a.pt").read_bytes()
    for broken in (content[: len(content) // 2], b"", b"nothing of the kind"):
        (folder / "a.pt").write_bytes(broken)
        with pytest.raises(FormatError, match=r"no whole file|more than tensors"):
            exchange.import_model_optimizer(store, folder, LAYERS, model="tiny")
    torch.save([1, 2], folder / "a.pt")
    with pytest.raises(FormatError, match="holds a list"):
        exchange.import_model_optimizer(store, folder, LAYERS, model="tiny")
    with pytest.raises(UsageError, match="no samples"):
        exchange.import_speculators(store, folder, LAYERS, model="tiny")
    with pytest.raises(UsageError, match="no folder"):
        exchange.import_speculators(store, tmp_path / "nowhere", LAYERS, model="tiny")
    with pytest.raises(UsageError, match="by its number"):
        exchange.import_speculators(store, tmp_path / "out", [2, 5, 8, "norm"], model="tiny")

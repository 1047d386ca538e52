"""Lightning and Fabric as they are: a reader is a loader for them, and goes on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import actcache
from actcache.entries.batch import Batch, PackedBatch
from tests.support import key, length, put, recipe, rows

lightning = pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own: few workers, few batches

COUNT, BATCH = 30, 4
STEPS = -(-COUNT // BATCH)
KEYS = [key(n) for n in range(COUNT)]


@pytest.fixture
def space(tmp_path: Path) -> Iterator[Any]:
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        put(space, range(COUNT))
        space.flush()
        yield space


def reading(space: Any, **options: Any) -> actcache.Reader:
    return space.reader(KEYS, **{"labels": np.arange(COUNT) % 2, "batch_size": BATCH, "device": "cpu", **options})


class Module(lightning.LightningModule):
    """A linear head over the mean of a document's rows; it remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(recipe().hidden_size, 2)
        self.trained: list[list[int]] = []
        self.validated: list[int] = []

    def loss(self, batch: Batch) -> torch.Tensor:
        assert isinstance(batch, Batch)
        assert isinstance(batch.activations, torch.Tensor)
        mask = batch.attention_mask[..., None].to(self.head.weight.dtype)
        mean = (batch.activations.to(self.head.weight.dtype) * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.cross_entropy(self.head(mean), batch.labels)

    def training_step(self, batch: Batch, number: int) -> torch.Tensor:
        self.trained.append(batch.documents.tolist())
        return self.loss(batch)

    def validation_step(self, batch: Batch, number: int) -> None:
        self.validated += batch.documents.tolist()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder: Path, **options: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"enable_checkpointing": False, **options},
    )


def expected(space: Any, epochs: int) -> list[list[int]]:
    reader = reading(space, shuffle=True, seed=3)
    return [batch.documents.tolist() for _ in range(epochs) for batch in reader]


@pytest.mark.parametrize("device", ["cpu", None])
def test_it_trains_on_the_readers_epochs(space: Any, device: str | None, tmp_path: Path) -> None:
    """The losses are those of a plain loop; NumPy batches become tensors on the way."""
    module, plain = Module(), Module()
    trainer(tmp_path, max_epochs=3).fit(module, reading(space, shuffle=True, seed=3, device=device))
    assert module.trained == expected(space, 3)
    optimizer = plain.configure_optimizers()
    for which in module.trained:
        optimizer.zero_grad()
        plain.loss(
            next(iter(space.reader([KEYS[n] for n in which], labels=np.array(which) % 2, batch_size=9, device="cpu")))
        ).backward()
        optimizer.step()
    torch.testing.assert_close(module.head.weight, plain.head.weight)


@pytest.mark.parametrize("step", [3, STEPS, STEPS + 3, 2 * STEPS])
def test_it_goes_on_where_its_checkpoint_was(space: Any, step: int, tmp_path: Path) -> None:
    """In the middle of an epoch, and at its end, where Lightning saves by default."""
    first, second = Module(), Module()
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=step, save_top_k=-1)
    options = {"max_steps": step, "callbacks": [saving], "enable_checkpointing": True}
    trainer(tmp_path, **options).fit(first, reading(space, shuffle=True, seed=3))
    trainer(tmp_path, max_epochs=3).fit(
        second, reading(space, shuffle=True, seed=3), ckpt_path=saving.best_model_path, weights_only=True
    )
    assert len(first.trained) == step
    assert first.trained + second.trained == expected(space, 3)


def test_validation_sees_each_document_each_time(space: Any, tmp_path: Path) -> None:
    """Lightning first looks at two batches (the sanity check), and leaves it there."""
    module = Module()
    trainer(tmp_path, max_epochs=2).fit(module, reading(space, shuffle=True), reading(space))
    assert module.validated == [*range(2 * BATCH), *range(COUNT), *range(COUNT)]
    few = Module()
    trainer(tmp_path, max_epochs=2, limit_val_batches=3, num_sanity_val_steps=0).fit(
        few, reading(space), reading(space)
    )
    assert few.validated == [*range(3 * BATCH)] * 2


def test_a_precision_that_converts_batches(space: Any, tmp_path: Path) -> None:
    module = Module()
    trainer(tmp_path, max_epochs=1, precision="64-true").fit(module, reading(space))
    assert module.head.weight.dtype == torch.float64
    assert sum(map(len, module.trained)) == COUNT


def test_overfitting_on_a_few_batches(space: Any, tmp_path: Path) -> None:
    module = Module()
    trainer(tmp_path, max_epochs=2, overfit_batches=2).fit(module, reading(space))
    assert module.trained == expected_in_order()[:2] * 2


def expected_in_order() -> list[list[int]]:
    return [list(range(i, min(i + BATCH, COUNT))) for i in range(0, COUNT, BATCH)]


def test_fabric(space: Any) -> None:
    """It takes loaders of torch alone, so ``dataset()``; a reader's batches are moved by ``to_device``."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    module = Module()
    _, optimizer = fabric.setup(module, module.configure_optimizers())
    data = reading(space).dataset()
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=BATCH, collate_fn=data.collate))
    seen = []
    for inputs in loader:
        mean = (inputs["activations"].float().sum(1)) / inputs["attention_mask"].sum(1, keepdim=True)
        fabric.backward(torch.nn.functional.cross_entropy(module.head(mean), inputs["labels"]))
        optimizer.step()
        seen += inputs["attention_mask"].sum(1).tolist()
    assert seen == [length(n) for n in range(COUNT)]
    for layout, device in (("padded", None), ("packed", None), ("padded", "cpu"), ("packed", "cpu")):
        moved = [fabric.to_device(batch) for batch in reading(space, layout=layout, device=device)]
        assert [n for batch in moved for n in batch.documents.tolist()] == list(range(COUNT))


@pytest.mark.parametrize("device", ["cpu", None])
def test_batches_move(space: Any, device: str | None) -> None:
    """To another device all tensors go, and nothing else changes; the batch that is moved stays what it was."""
    for layout, kind in (("padded", Batch), ("packed", PackedBatch)):
        batch = next(iter(reading(space, layout=layout, device=device)))
        before = dict(vars(batch))
        moved, there = batch.to("meta"), batch.to(torch.device("cpu"), non_blocking=True)
        assert type(moved) is type(there) is kind
        assert moved.keys == there.keys == batch.keys
        assert all(vars(batch)[name] is value for name, value in before.items())
        for name, value in before.items():
            if isinstance(value, np.ndarray | torch.Tensor) and name != "key_array":
                assert getattr(moved, name).device.type == "meta"
                np.testing.assert_array_equal(getattr(there, name), value)
                assert str(getattr(there, name).dtype).endswith(str(value.dtype).rpartition(".")[2])
        first = there.activations[0, : length(0)] if kind is Batch else there.activations[: length(0)]
        np.testing.assert_array_equal(first.numpy(), rows(0))


def test_batches_are_pinned(space: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device that it would be for, torch refuses: here it only marks what it is asked to pin."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *device: (asked.append(self.shape), self.clone())[1])
    batch = next(iter(reading(space)))
    pinned = torch.utils.data._utils.pin_memory.pin_memory([batch])[0]
    assert type(pinned) is Batch
    assert len(asked) == 6  # all but the keys
    assert pinned.activations is not batch.activations
    assert torch.equal(pinned.activations, batch.activations)


def test_the_end_of_an_epoch_need_not_be_asked_for(space: Any) -> None:
    """Who counts batches, as trainers do, gets the next epoch next; who peeks, or only asks whether, loses nothing."""
    reader = reading(space, shuffle=True, seed=3)
    seen = []
    for _ in range(3):
        iter(reader)
        iterator = iter(reader)
        seen += [next(iterator).documents.tolist() for _ in range(len(reader))]
        assert reader.state_dict()["consumed"] == COUNT
    assert seen == expected(space, 3)
    reader.set_epoch(1)
    next(iter(reader))
    reader.set_epoch(1)  # from its beginning: no state was loaded
    assert [batch.documents.tolist() for batch in reader] == expected(space, 2)[STEPS:]
    unbegun = iter(reader)
    reader.set_epoch(0)
    assert [batch.documents.tolist() for batch in unbegun] == expected(space, 1)

"""Verification by recomputing: what is right passes, and what is wrong is found and named."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForQuestionAnswering, AutoModelForSequenceClassification, PreTrainedModel

import actcache
from actcache import Recycler
from actcache.errors import LowerHalfMismatchError, MissingEntryError, ModelError, UsageError, VerificationError
from actcache.models.verification import AMPLIFICATION, ROUNDING

TEXTS = [f"document {i} says " + "la " * (i % 13) + "." for i in range(40)]

Make = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make(make_model: Make, tokenizer: Any, tmp_path: Path) -> Iterator[Callable[..., Recycler]]:
    opened = []

    def recycler(texts: Any = TEXTS, **options: Any) -> Recycler:
        model = make_model(AutoModel, type_vocab_size=2)
        made = Recycler(model, tokenizer, **{"layer": 2, "store": tmp_path / "store", **options})
        opened.append(made)
        made.fill(texts, progress=False)
        return made

    yield recycler
    for one in opened:
        one.close()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_was_recorded_passes(make: Any, make_model: Make, dtype: str) -> None:
    recycler = make(dtype=dtype)
    for head in (AutoModelForSequenceClassification, AutoModelForQuestionAnswering):
        task = make_model(head)
        task.base_model.load_state_dict(recycler.agreement.lower.base_model.state_dict(), strict=False)
        report = recycler.verify(25, task_model=task)
        assert report.ok
        assert report.documents == 25
        assert report.tolerance == ROUNDING[dtype] + 1e-4
        assert report.error <= report.tolerance
        assert 0 < report.output_error <= report.output_tolerance == AMPLIFICATION * report.tolerance
        if dtype != "float32":
            assert report.error > ROUNDING[dtype] / 10  # it compares with what was computed, not with what was stored
            assert report.output_largest > 1e-5
    assert recycler.verify(1000).documents == len(TEXTS)
    assert recycler.verify(7, texts=TEXTS[:10], seed=3).documents == 7


def spoil(recycler: Recycler, text: str, change: Callable[[np.ndarray], np.ndarray], **others: Any) -> bytes:
    [key] = recycler.keys([text])
    [entry] = recycler.space.get([key])
    ids = others.get("token_ids", entry.token_ids)
    recycler.space.put([key], [change(entry.activations)], [ids], overwrite=True)
    recycler.space.flush()
    return key


@pytest.mark.parametrize(
    ("dtype", "change"),
    [
        ("float32", lambda rows: rows * np.float32(1.0005)),
        ("float16", lambda rows: rows * np.float16(1.005)),
        ("float16", lambda rows: rows[::-1]),
        ("bfloat16", lambda rows: rows * 1.05),
    ],
)
def test_one_wrong_entry_is_found_among_the_others(make: Any, dtype: str, change: Any) -> None:
    recycler = make(dtype=dtype)
    key = spoil(recycler, TEXTS[17], change)
    with pytest.raises(VerificationError, match="1 entries wrong") as caught:
        recycler.verify()
    report = caught.value.report
    assert not report.ok
    assert report.failed == [key]
    assert report.documents == len(TEXTS)
    recycler.space.delete(report.failed)
    recycler.fill(TEXTS, progress=False)
    assert recycler.verify().ok


def test_entries_of_another_text_are_found(make: Any) -> None:
    recycler = make()
    [other] = recycler.space.get(recycler.keys([TEXTS[3]]))
    key = spoil(recycler, TEXTS[17], lambda rows: other.activations, token_ids=other.token_ids)
    assert recycler.verify().ok  # the rows are those of the tokens beside them
    with pytest.raises(VerificationError) as caught:
        recycler.verify(texts=TEXTS)
    assert caught.value.report.failed == [key]


def test_a_lower_half_that_changed_is_found(make: Any) -> None:
    recycler = make()
    layer = recycler.agreement.lower.base_model.encoder.layer[0]
    handle = layer.register_forward_hook(lambda module, args, output: output * 1.01)
    with pytest.raises(VerificationError) as caught:
        recycler.verify(10)
    assert len(caught.value.report.failed) == 10
    handle.remove()
    assert recycler.verify(10).ok
    with torch.no_grad():
        layer.output.dense.weight.mul_(float("nan"))
    with pytest.raises(VerificationError):
        recycler.verify(10)


def test_outputs_are_compared(make: Any, make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recycler, task = make(dtype="float16"), make_model(AutoModelForSequenceClassification)
    monkeypatch.setattr("actcache.models.verification.AMPLIFICATION", 1e-6)
    with pytest.raises(VerificationError, match="0 entries wrong; outputs: relative error") as caught:
        recycler.verify(10, task_model=task)
    assert caught.value.report.failed == []


@pytest.mark.parametrize("extras", [(), ("type_ids",)])
def test_documents_of_two_texts_need_no_stored_type_ids(make: Any, make_model: Make, extras: Any) -> None:
    pairs = [(f"a question of number {i}", "and its answer " * (1 + i % 4)) for i in range(6)]
    recycler = make([*pairs, *TEXTS[:8]], extras=extras, dtype="float32")
    task = make_model(AutoModelForSequenceClassification)
    assert recycler.verify(task_model=task).documents == len(pairs) + 8
    assert recycler.verify(texts=pairs, task_model=task).documents == len(pairs)
    # its rows are far from those of one text with a separator in it
    key = spoil(recycler, pairs[3], lambda rows: rows + np.float32(0.01))
    with pytest.raises(VerificationError) as caught:
        recycler.verify()
    assert caught.value.report.failed == [key]


def test_windows_are_verified(make: Any) -> None:
    text = "many words " * 40
    recycler = make([text], too_long=actcache.windows(32, stride=8))
    count = len(recycler.keys([text]))
    assert count > 2
    assert recycler.verify(texts=[text]).documents == count
    assert recycler.verify().documents == count
    keys = recycler.keys([text])
    short = recycler.space.get(keys[:1])[0]
    last = actcache.windows(32, stride=8).key(actcache.document_key(text), 1, last=True)
    recycler.space.delete(keys[1:])
    recycler.space.put([last], [short.activations], [short.token_ids])
    with pytest.raises(VerificationError, match=f"makes {count} windows, and 2 are stored"):
        recycler.verify(texts=[text])


def test_what_cannot_be_verified_is_refused(make: Any, make_model: Make) -> None:
    recycler = make()
    with pytest.raises(UsageError, match="a sample of 0"):
        recycler.verify(0)
    with pytest.raises(UsageError, match="no texts"):
        recycler.verify(texts=[])
    with pytest.raises(MissingEntryError, match="1 of 2"):
        recycler.verify(texts=["unknown", TEXTS[0]])
    task = make_model(AutoModelForSequenceClassification)
    with pytest.raises(ModelError, match="train mode"):
        recycler.verify(task_model=copy.deepcopy(task).train())
    with pytest.raises(LowerHalfMismatchError):
        recycler.verify(task_model=make_model(AutoModelForSequenceClassification, seed=1))
    key = actcache.document_key("rows alone")
    recycler.space.put([key], [np.zeros((2, 32), np.float32)])
    with pytest.raises(UsageError, match="without token ids"):
        recycler.verify()
    recycler.space.delete(list(recycler.space.keys()))
    with pytest.raises(UsageError, match="empty"):
        recycler.verify()

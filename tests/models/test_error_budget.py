"""What storing does to a model's numbers: measured, kept, refused, chosen."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch
from transformers import AutoModel

import actcache
from actcache import Recycler
from actcache.errors import ErrorBudgetError, FormatError, UsageError
from actcache.format import codec
from actcache.store.stored_errors import StoredErrors
from tests.cli.running import cachectl

TEXTS = [f"text number {n} of a small corpus, with {n % 7} more words" for n in range(12)]


@pytest.fixture
def made(make_model, tokenizer, tmp_path):
    def make(dtype, layer=1):
        model = make_model(AutoModel, type_vocab_size=2)
        return Recycler(model, tokenizer, layer=layer, store=tmp_path / "store", dtype=dtype)

    return make


def test_fill_measures_what_a_scaling_codec_does(made):
    with made("int8") as recycler:
        assert recycler.measured is None
        recycler.fill(TEXTS, progress=False)
        found = recycler.measured
        assert found.documents == len(TEXTS)
        entries = recycler.space.get(recycler.keys(TEXTS))
        assert found.tokens == sum(len(entry.token_ids) for entry in entries)
        exact = recycler.agreement.lower.run([entry.token_ids for entry in entries])
        off = np.concatenate([entry.activations - rows for entry, rows in zip(entries, exact, strict=True)])
        norm = np.linalg.norm(np.concatenate(exact))
        assert found.rows == pytest.approx(np.linalg.norm(off) / norm, rel=1e-3)
        assert found.rows <= found.worst < 0.05
        assert 0 < found.hidden < 0.05
        assert found.logits is None
    with made("float16") as recycler:
        recycler.fill(iter(TEXTS), progress=False)
        assert recycler.measured is None  # what rounding does is known


def test_bits_of_compressed_rows_are_those_of_their_frames(made, tmp_path):
    with made("float16+zstd") as recycler:
        recycler.fill(TEXTS, progress=False)
        found, space = recycler.measure(TEXTS), recycler.space
        assert 8 < found.bits < 16
        frames = 0
        for path in (tmp_path / "store").rglob("*.h5"):
            with h5py.File(path) as file:
                frames += file["payload"].size
        assert found.bits == pytest.approx(8 * frames / (found.tokens * space.recipe.hidden_size))


def test_an_iterator_loses_nothing_to_the_sample(made):
    with made("int8") as recycler:
        report = recycler.fill((text for text in TEXTS), progress=False)
        assert (report.documents, report.computed) == (len(TEXTS), len(TEXTS))


@pytest.mark.parametrize("metric", ["rows", "hidden"])
def test_a_codec_above_the_budget_is_refused_before_anything_is_stored(made, metric):
    with made("float8_e4m3") as recycler:
        with pytest.raises(ErrorBudgetError, match=rf"float8_e4m3 changes {metric} by .*Nothing was stored"):
            recycler.fill(TEXTS, progress=False, max_error=1e-4, metric=metric)
        assert len(recycler.space) == 0
        recycler.fill(TEXTS, progress=False, max_error=0.2, metric=metric)
        assert len(recycler.space) == len(TEXTS)
        with pytest.raises(UsageError, match="metric is 'rows' or 'hidden'"):
            recycler.fill(TEXTS, progress=False, max_error=1, metric="taste")


def test_the_cheapest_within_a_budget_is_chosen(made):
    with made("float16") as recycler:
        sizes = {dtype: codec.get(dtype).width(64) * codec.get(dtype).stored.itemsize for dtype in codec.names()}
        for budget in (1e-7, 1e-3, 0.02, 1.0):
            choice = recycler.choose(TEXTS, max_error=budget, metric="rows")
            within = {dtype: found for (_, dtype), found in choice.tried.items() if found.rows <= budget}
            assert choice.dtype in within
            assert sizes[choice.dtype] == min(sizes[dtype] for dtype in within)
        assert recycler.choose(TEXTS, max_error=1.0, layers=[1, 2]).layer == 2
        assert str(choice).startswith(f"layer {choice.layer} as {choice.dtype}: rows within ")
        zstd = recycler.choose(TEXTS, max_error=1e-3, dtypes=("float16", "float16+zstd", "float32"))
        assert zstd.dtype == "float16+zstd"  # by the bytes of its frames
        with pytest.raises(ErrorBudgetError, match="nothing that was tried"):
            recycler.choose(TEXTS, max_error=0.0, metric="rows", dtypes=("int8", "float16"))
        with pytest.raises(UsageError, match="logits cannot be measured"):
            recycler.choose(TEXTS, max_error=1.0, metric="logits")
        with pytest.raises(UsageError, match="no texts"):
            recycler.choose([], max_error=1.0)
        assert len(recycler.space) == 0


def test_what_was_measured_is_shown_and_a_damaged_note_is_refused(made, tmp_path):
    with made("int8") as recycler:
        recycler.fill(TEXTS, progress=False)
        found, space = recycler.measured, recycler.space
        shown = cachectl("inspect", tmp_path / "store", "--space", space.recipe.fingerprint[:8])
        assert f"storing changes rows by {found.rows:.2g}" in shown.out
        space.put_blob("errors.json", b'{"format_version": 1, "rows": "many"}', replace=True)
        with pytest.raises(FormatError, match=r"errors.json .* is damaged"):
            StoredErrors.read(space)
        shown = cachectl("inspect", tmp_path / "store", "--space", space.recipe.fingerprint[:8])
        assert shown.code == 0  # the space is whole
        assert "errors.json of space" in shown.out
        assert "is damaged" in shown.out
        assert f"{len(TEXTS)} entries" in shown.out
        page = cachectl("inspect", tmp_path / "store", "--html", tmp_path / "page.html")
        assert page.code == 0
        assert "its entries do not need it" in (tmp_path / "page.html").read_text()
        found = cachectl("inspect", tmp_path / "store", "--space", space.recipe.fingerprint[:8], "--json").json()
        assert (found["spaces"][0]["errors"], found["unreadable"]) == (None, {})
        assert "is damaged" in found["spaces"][0]["errors_damaged"]


def test_replay_sees_what_was_measured(made):
    """A computed miss is delivered as it is stored: the first epoch equals the second."""
    with made("int8") as recycler:
        first, second = (
            [batch.activations for batch in recycler.reader(TEXTS, batch_size=5, on_missing="compute")]
            for _ in range(2)
        )
        assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
        assert recycler.verify(sample=5).ok
    assert actcache.Recipe(model="m", layer=1, hidden_size=8, dtype="int8").row_bytes == 12

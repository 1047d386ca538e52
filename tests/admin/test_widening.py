"""``migrate --dtype`` of a recycler's space: no recycler takes digits for its own that were rounded away before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import actcache
from actcache import Recycler
from actcache.errors import ShapeError
from actcache.models.verification import ROUNDING
from tests.cli.running import by_space, cachectl
from tests.support.tiny import save_tiny

TEXTS = [f"Document {i} says {'la ' * (i % 11)}to whoever reads it" for i in range(12)]
KEYS = [actcache.document_key(text) for text in TEXTS]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> tuple[Any, Any]:
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def fill(model: Any, store: Path, dtype: str) -> tuple[int, actcache.Recipe, list[np.ndarray]]:
    """What a user does; return how many were computed, the recipe, and the rows as float32."""
    with Recycler(*model, layer=2, store=store, dtype=dtype) as recycler:
        report = recycler.fill(TEXTS, progress=False)
        rows = [entry.activations.astype(np.float32) for entry in recycler.space.get(KEYS)]
        return report.computed, recycler.recipe, rows


def recomputed(store: Path, code: int = 0) -> Any:
    result = cachectl("verify", store, "--recompute", 100, "--json")
    assert result.code == code, result.err
    return {name: one["recomputed"] for name, one in by_space(result.json()).items()}


@pytest.mark.parametrize(("narrow", "wide"), [("float16", "float32"), ("bfloat16", "float32"), ("float16", "bfloat16")])
def test_a_fill_after_a_migration_computes_its_own(model: Any, tmp_path: Path, narrow: str, wide: str) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    _, recipe, given = fill(model, old, narrow)
    shown = cachectl("migrate", old, new, "--dtype", wide)
    rounded = recipe.stored_again(wide)
    assert shown.code == 0, shown.err
    assert f"stored as {wide} via {narrow}" in shown.out
    computed, direct, rows = fill(model, new, wide)
    assert computed == len(TEXTS)
    assert direct.fingerprint != rounded.fingerprint
    elsewhere = fill(model, tmp_path / "fresh", wide)[2]
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(rows, elsewhere, strict=True))
    # Both spaces hold what they say.
    found = recomputed(new)
    assert {name: (one["ok"], one["entries"]) for name, one in found.items()} == {
        direct.fingerprint: (True, len(TEXTS)),
        rounded.fingerprint: (True, len(TEXTS)),
    }
    assert found[rounded.fingerprint]["tolerance"] == pytest.approx(1e-4 + ROUNDING[narrow] + ROUNDING[wide])
    assert found[rounded.fingerprint]["error"] > found[direct.fingerprint]["error"]
    with actcache.open(new, "r") as store, store.space(rounded) as space:
        for entry, one in zip(space.get(KEYS), given, strict=True):
            if wide == "float32":
                np.testing.assert_array_equal(entry.activations, one)
            else:
                expected = torch.from_numpy(one).to(torch.bfloat16).float().numpy()
                np.testing.assert_array_equal(entry.activations, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrowing_and_going_back_are_found(model: Any, tmp_path: Path, dtype: str) -> None:
    """float32 to a smaller dtype is what a fill with that dtype stores, and so is there and back again."""
    fill(model, tmp_path / "wide", "float32")
    _, direct, rows = fill(model, tmp_path / "narrow", dtype)
    assert cachectl("migrate", tmp_path / "wide", tmp_path / "one", "--dtype", dtype).code == 0
    assert cachectl("migrate", tmp_path / "narrow", tmp_path / "two", "--dtype", "float32").code == 0
    assert cachectl("migrate", tmp_path / "two", tmp_path / "three", "--dtype", dtype).code == 0
    for store in (tmp_path / "one", tmp_path / "three"):
        computed, recipe, found = fill(model, store, dtype)
        assert (computed, recipe) == (0, direct)
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(found, rows, strict=True))
        assert recomputed(store)[direct.fingerprint]["ok"]


def test_rounded_rows_are_not_put_under_a_recyclers_recipe(model: Any, tmp_path: Path) -> None:
    """Below migrate: what was float16 once comes by no other way under the recipe of a float32 fill."""
    _, _, rows = fill(model, tmp_path / "old", "float16")
    with Recycler(*model, layer=2, store=tmp_path / "new", dtype="float32") as recycler:
        with pytest.raises(ShapeError, match="float16"):
            recycler.space.put(KEYS, [one.astype(np.float16) for one in rows])
        assert len(recycler.space) == 0
    assert cachectl("export", tmp_path / "old", tmp_path / "file.npz").code == 0
    assert cachectl("import", tmp_path / "new", tmp_path / "file.npz").code == 0
    assert fill(model, tmp_path / "new", "float32")[0] == len(TEXTS)


def test_repair_rounds_what_it_computes(model: Any, folder: Path, tmp_path: Path) -> None:
    """An entry of a widened space that is computed again has the bits that it had."""
    _, recipe, _ = fill(model, tmp_path / "old", "float16")
    new = tmp_path / "new"
    assert cachectl("migrate", tmp_path / "old", new, "--dtype", "float32").code == 0
    rounded = recipe.stored_again("float32")
    with actcache.open(new, "r") as store, store.space(rounded) as space:
        before = space.get(KEYS)
    (segment,) = new.glob("spaces/*/segments/*")
    data = bytearray(segment.read_bytes())
    data[data.index(before[3].activations.tobytes())] ^= 1
    segment.write_bytes(data)
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    done = cachectl("repair", new, "--corpus", tmp_path / "corpus.txt", "--model", folder, "--json")
    assert by_space(done.json())[rounded.fingerprint]["recomputed"] == [KEYS[3].hex()], done.err
    with actcache.open(new, "r") as store, store.space(rounded) as space:
        after = space.get(KEYS)[3].activations
    np.testing.assert_array_equal(after, after.astype(np.float16))
    np.testing.assert_allclose(after, before[3].activations, rtol=2e-3, atol=1e-4)  # another batch, another last digit


def test_every_command_that_shows_a_dtype_shows_the_lineage(model: Any, tmp_path: Path) -> None:
    _, recipe, _ = fill(model, tmp_path / "old", "float16")
    new = tmp_path / "new"
    done = cachectl("migrate", tmp_path / "old", new, "--dtype", "float32", "--json").json()
    assert [(one["stored_as"], one["via"]) for one in done["spaces"]] == [("float32 via float16", ["float16"])]
    name = recipe.stored_again("float32").fingerprint
    for command in (
        ["ls", new],
        ["ls", new, "--json"],
        ["ls", new, "--tree"],
        ["inspect", new, "--text", TEXTS[0]],
        ["inspect", new, "--text", TEXTS[0], "--json"],
    ):
        assert "float32 via float16" in cachectl(*command).out, command
    assert cachectl("inspect", new, "--json").json()["spaces"][0]["identity"]["via"] == ["float16"]
    assert "via" in cachectl("inspect", new, "--space", name).out
    assert "float32 via float16" in " ".join(cachectl("inspect", new).out.split())
    assert cachectl("inspect", new, "--html", tmp_path / "page.html").code == 0
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("float32 via float16") >= 2
    planned = cachectl("prune", new, "--where", "via=float16", "--idle", "0", "--dry-run", "--json").json()
    assert name in str(planned)
    with actcache.open(new, "r") as store, pytest.raises(actcache.errors.SpaceNotFoundError, match="via"):
        store.space(recipe)

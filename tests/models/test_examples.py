"""examples: each runs, here on a tiny model; its page in the docs has its cells, and what they printed."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import matplotlib
import pytest

from bench.examples import EXAMPLES, PAGES, Cell, cells, page_of, render, run
from tests.support import ROOT
from tests.support.tiny import save_tiny

SAYS = {"every_layer": "texts at 5 layers", "quickstart": "256 were there", "sparse_autoencoder": "after 20 steps"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("agg")
    monkeypatch.setattr("bench.examples.PAGES", tmp_path)
    for name, value in {"MODEL": tiny, "STORE": tmp_path / "store", "EACH": 6, "STEPS": 20}.items():
        monkeypatch.setenv(name, str(value))
    assert SAYS[path.stem] in render(path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_its_page_is_of_it(path: Path) -> None:
    """Made again after a change: ``python -m bench.examples``."""
    page = page_of(path).read_text()
    for cell in cells(path):
        assert cell.text in page
    assert "```text\n" in page
    assert f"examples/{page_of(path).stem}" in (ROOT / "docs" / "index.md").read_text()


def test_cells_run_as_in_a_notebook(tmp_path: Path) -> None:
    path = tmp_path / "one.py"
    path.write_text("# %% [markdown]\n# # Title\n#\n# Some text.\n\n# %%\na = 20\nprint('said')\n\n# %%\na + 1\n")
    found = cells(path)
    assert found == [Cell(True, "# Title\n\nSome text."), Cell(False, "a = 20\nprint('said')"), Cell(False, "a + 1")]
    names: dict[str, object] = {}
    assert [run(cell, names) for cell in found[1:]] == ["said\n", "21\n"]
    assert PAGES.is_dir()

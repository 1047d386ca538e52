"""docs/recipes: each script runs, here on tiny models, and each page shows how."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.tiny import save_tiny

FOLDER = ROOT / "docs" / "recipes"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")
NEEDS = {"probe_layers": "sklearn", "embed_and_retrieve": "sentence_transformers"}
SAYS = {
    "embed_and_retrieve": "merged into SentenceTransformer",
    "fine_tune": "merged into a BertForSequenceClassification",
    "probe_layers": "layer 3: accuracy",
    "train_crosscoder": "features write to both",
    "train_eagle3": "epoch 3: loss",
    "train_sae": "step 100: explained variance",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs(name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.syspath_prepend(str(FOLDER))
    options = {"model": tiny, "documents": 12 if name == "train_eagle3" else 40, "store": tmp_path / "store"}
    given = [part for option, value in options.items() for part in (f"--{option}", str(value))]
    monkeypatch.setattr(sys, "argv", [name, *given])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out


def test_each_has_a_page() -> None:
    index = (FOLDER / "README.md").read_text()
    for name in SCRIPTS:
        page = name.replace("_", "-") + ".md"
        assert f"python docs/recipes/{name}.py" in (FOLDER / page).read_text()
        assert f"({page})" in index

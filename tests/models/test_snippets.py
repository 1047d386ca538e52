"""What the README and the quickstart say runs as it stands, but for the name of the model, which has to be at hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.mark.parametrize("page", ["README.md", pytest.param("docs/quickstart.md", marks=pytest.mark.long)])
def test_it_runs(page, minilm_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    code = "\n".join(blocks)
    assert MODEL in code
    exec(compile(code.replace(MODEL, str(minilm_path)), page, "exec"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines() if re.match(r"[012] ", line)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]

"""The snippets of docs/pruning.md run, one after another, and say what they say."""

from __future__ import annotations

import re
import tempfile

from tests.support import ROOT


def test_the_snippets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    text = (ROOT / "docs" / "pruning.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 5
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/pruning.md", "exec"), names)
    printed = capsys.readouterr().out
    (shown,) = re.findall(r"# <Pruned ...: (.*)", text)
    assert shown in printed
    assert "29145 ('zebra')" in printed

"""docs/inspecting.md: its commands run, and so does its program."""

from __future__ import annotations

import re
import shlex

import numpy as np

import actcache
from tests.cli.running import cachectl
from tests.support import ROOT, make_store, recipe

TEXT = "Call me later."
PAGE = (ROOT / "docs" / "inspecting.md").read_text()


def test_the_page_is_right(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_store("./activations", range(5))
    with actcache.open("./activations") as store, store.space(recipe()) as space:
        space.put([actcache.document_key(TEXT)], [np.ones((3, 8), np.float32)])
    key = actcache.document_key(TEXT).hex()
    commands = re.findall(r"^\$ cachectl (.*?)(?:  +#.*)?$", PAGE, re.MULTILINE)
    assert len(commands) == 7
    for command in commands:
        result = cachectl(*shlex.split(command.replace("62410d73", recipe().fingerprint[:8])))
        assert result.code == 0, (command, result.err)
    assert f"--key {key[:6]} " in PAGE
    (tmp_path / "report.html").unlink()
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(program, "inspecting.md", "exec"), {})
    assert capsys.readouterr().out.startswith("tests 8 ")
    assert (tmp_path / "report.html").stat().st_size > 10_000

"""docs/corpora.md: its program runs, and its commands are commands."""

from __future__ import annotations

import json
import re
import shlex

import actcache
from actcache.cli.corpus import Kind
from actcache.cli.corpus.files import COMPRESSIONS, form
from actcache.cli.corpus.media import kind_of
from tests.cli.running import cachectl
from tests.support import ROOT

PAGE = (ROOT / "docs" / "corpora.md").read_text()


def test_the_program_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for number in range(3):
        (tmp_path / "data" / f"{number}.jsonl").write_text(json.dumps({"text": f"text {number}"}) + "\n")
    (program,) = re.findall(r"(?<!<!-- not run -->\n)```python\n(.*?)```", PAGE, re.DOTALL)
    found: dict[str, object] = {}
    exec(compile(program, "corpora.md", "exec"), found)
    texts = list(found["texts"])
    assert texts == ["text 0", "text 1", "text 2"]
    assert [key.tobytes() for key in found["keys"]] == [actcache.document_key(text) for text in texts]


def test_the_commands_are_commands(tmp_path, monkeypatch):
    """Each fails for want of the corpus, and of nothing else."""
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^cachectl (.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 8
    for command in commands:
        if "s3://" not in command:
            assert "cannot read" in (line := cachectl(*shlex.split(command)).refused(2)) or "no file matches" in line


def test_every_format_and_compression_is_there():
    table = PAGE.partition("## Files")[2].partition("## Folders")[0]
    for kind in Kind:
        assert f"`{kind}`" in table or f"`.{kind}`" in table
    for suffix in re.findall(r"`(\.[a-z0-9]+)`", table.partition("Text is UTF-8")[0]):
        assert suffix in COMPRESSIONS or form(f"a{suffix}").kind is not None or kind_of(f"a{suffix}") is not None

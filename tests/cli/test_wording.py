"""Errors in the shell say what to do in the shell."""

from __future__ import annotations

import ast
import re

import pytest

import actcache
from actcache.cli.shell import SHELL_WORDS, in_shell
from tests.cli.running import cachectl
from tests.support import ROOT

SOURCE = ROOT / "src" / "actcache"
PYTHON = re.compile(
    r"mode='|\bdevice='|flush again|too_long=\"|\b(?:space|recycler|store|reader)\.\w+\(|\bopen_store\b"
)
#: Errors that no command can come upon.
NOT_IN_SHELL = (
    "was opened with mode='r'",  # commands write to no store that they opened so
    "flush again once the store is back",  # commands close their spaces, and then it is another error
    "recycler.",  # of recyclers that were made with a model of the user's own
    "space.delete(error.report.failed)",
    "a reader reads ahead by a thread of its own",  # commands make no DataLoader
)


def said_by_the_library() -> list[str]:
    """Return the texts of errors that are in Python's words."""
    found = []
    for path in SOURCE.rglob("*.py"):
        if "cli" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                for part in (inner for given in node.args for inner in ast.walk(given)):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str) and PYTHON.search(part.value):
                        found.append(part.value)
    return found


def test_advice_of_the_library_has_words_for_the_shell():
    said = said_by_the_library()
    assert len(said) >= 5
    for text in said:
        if not any(never in text for never in NOT_IN_SHELL):
            assert not PYTHON.search(in_shell(text)), text
    for phrase in SHELL_WORDS:
        assert any(phrase in text for text in said), f"nobody says {phrase!r} any more"


@pytest.mark.parametrize(
    "given",
    [
        ["ls", "{}"],
        ["du", "{}"],
        ["inspect", "{}"],
        ["verify", "{}"],
        ["repair", "{}"],
        ["compact", "{}"],
        ["migrate", "{}", "new"],
        ["export", "{}", "new.safetensors"],
        ["prune", "{}", "--older-than", "1d"],
        ["pin", "{}", "abc"],
        ["unpin", "{}", "abc"],
    ],
    ids=lambda given: given[0],
)
def test_a_store_that_is_not_there(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = cachectl(*[word.format(tmp_path / "nope") for word in given])
    assert ended.code == 3
    assert f"there is no store at {tmp_path / 'nope'}; cachectl fill makes one" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_store_and_a_corpus_that_changed_places(tmp_path):
    with actcache.open(tmp_path / "store"):
        (tmp_path / "corpus.txt").write_text("one\n")
    given = str(tmp_path / "corpus.txt"), str(tmp_path / "store")
    said = cachectl("fill", *given, "--model", "m", "--layer", "3").refused(2)
    assert said.endswith(f"the store comes first: cachectl fill {given[1]} {given[0]}")


def test_what_to_do_with_long_documents_has_words_for_the_shell():
    text = 'give too_long="truncate" or too_long="windows", or leave it out'
    assert text.removeprefix("give ") in (SOURCE / "models" / "tokenizing.py").read_text()
    assert in_shell(text) == "give --too-long truncate or --too-long windows, or leave it out"

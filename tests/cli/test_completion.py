"""What bash, zsh and fish complete: spaces, pins, collections, dtypes; nothing, silently, where there is nothing."""

from __future__ import annotations

import pytest
from typer._completion_classes import BashComplete, FishComplete, ZshComplete
from typer.main import get_command

import actcache
from actcache.cli import app
from actcache.format import codec
from tests.cli.running import cachectl
from tests.support import key, recipe, rows


@pytest.fixture
def store(tmp_path):
    with actcache.open(tmp_path / "s") as opened:
        for layer in (1, 2):
            with opened.space(recipe(layer=layer)) as space:
                space.put([key(1)], [rows(1)])
        opened.put_collection("all", [key(1)])
        opened.put_collection("some", [key(1)])
    return tmp_path / "s"


def completed(*words: object) -> list[str]:
    """Return what the last word may become."""
    *before, last = map(str, words)
    return [item.value for item in BashComplete(get_command(app), {}, "cachectl", "").get_completions(before, last)]


@pytest.mark.parametrize("command", [["ls"], ["inspect"], ["verify"], ["prune"], ["compact"]])
def test_spaces_of_an_option(store, command):
    spaces = [recipe(layer=layer).fingerprint for layer in (1, 2)]
    assert sorted(completed(*command, store, "--space", "")) == sorted(spaces)
    assert completed(*command, store, "--space", spaces[0][:4]) == [one for one in spaces if one[:4] == spaces[0][:4]]


def test_spaces_that_are_arguments(store):
    assert len(completed("pin", store, "")) == 2
    assert len(completed("pin", store, recipe(layer=2).fingerprint[:8], "")) == 2


def test_those_that_are_pinned(store):
    assert completed("unpin", store, "") == []
    assert cachectl("pin", store, recipe(layer=2).fingerprint).code == 0
    assert completed("unpin", store, "") == [recipe(layer=2).fingerprint]
    assert completed("unpin", store, recipe(layer=1).fingerprint[:4]) == []


@pytest.mark.parametrize("shell", [BashComplete, ZshComplete, FishComplete], ids=lambda shell: shell.name)
def test_each_shell_is_answered_in_its_own_way(store, shell, monkeypatch):
    """As the scripts that ``--install-completion`` writes ask: by variables of the environment."""

    def answered(*words: object) -> str:
        line = " ".join(map(str, ("cachectl", *words)))
        given = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        given |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        return shell(get_command(app), {}, "cachectl", "_CACHECTL_COMPLETE").complete()

    names = [recipe(layer=layer).fingerprint for layer in (1, 2)]
    assert cachectl("pin", store, names[1]).code == 0
    found = answered("ls", store, "--space", "")
    assert all(name in found for name in names)
    if shell is not BashComplete:  # which has no place for them
        assert "layer 1" in found
    pinned = answered("unpin", store, names[1][:3])
    assert names[1] in pinned
    assert names[0] not in pinned
    assert "some" in answered("prune", store, "--keep-collection", "so")
    assert "int8" in answered("fill", store, "corpus.txt", "--dtype", "in")
    assert "cachectl" in shell(get_command(app), {}, "cachectl", "_CACHECTL_COMPLETE").source()


def test_collections_and_dtypes(store):
    assert completed("prune", store, "--keep-collection", "") == ["all", "some"]
    assert completed("fill", store, "corpus.txt", "--collection", "s") == ["some"]
    assert completed("fill", store, "corpus.txt", "--dtype", "") == codec.names()
    assert completed("migrate", store, "other", "--dtype", "int8") == [n for n in codec.names() if n.startswith("int8")]


@pytest.mark.parametrize("what", ["absent", "a file"])
def test_nothing_and_no_error_where_there_is_no_store(tmp_path, what, capsys):
    (tmp_path / "a file").write_text("no store")
    assert completed("ls", tmp_path / what, "--space", "") == []
    assert completed("prune", tmp_path / what, "--keep-collection", "") == []
    assert capsys.readouterr() == ("", "")

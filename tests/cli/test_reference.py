"""docs/cli.md says what the commands say of themselves, and every command says what it should."""

from __future__ import annotations

import re

import pytest

import actcache
from actcache.cli import COMMANDS
from actcache.cli.common import _Console
from actcache.cli.reference import reference_text
from tests.cli.running import cachectl
from tests.support import ROOT, ids, key, recipe, rows


def test_the_reference_is_up_to_date():
    assert (ROOT / "docs" / "cli.md").read_text() == reference_text(), "python -m actcache.cli.reference docs/cli.md"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_command_describes_itself(command):
    name = command.__name__
    shown = cachectl(name, "--help")
    assert shown.code == 0
    assert f"Example: cachectl {name} " in shown.out
    assert "--json" in shown.out
    assert shown.out == cachectl(name, "-h").out
    options = [line for line in shown.out.splitlines() if line.lstrip("│* ").startswith("--") and "--help" not in line]
    assert not [line for line in options if re.search(r"<(list|str|int|path|bool)", line)], "types of Python's"
    assert name in cachectl("--help").out


def test_every_option_is_in_the_reference():
    text = reference_text()
    for option in (
        "--max-length",
        "`--json`",
        "`--quiet`, `-q`",
        "`--space` TEXT",
        "`--too-long` refuse&#124;",
    ):
        assert option in text


def test_help_is_no_markup():
    """What stands in brackets is shown: the name of an extra, say."""
    for command in COMMANDS:
        said = " ".join(cachectl(command.__name__, "--help").out.replace("│", " ").split())
        for name in re.findall(r"actcache\[(\w+)\]", command.__doc__ or ""):
            assert f"actcache[{name}]" in said
    assert "needs the extra plots" in " ".join(cachectl("bench", "--help").out.replace("│", " ").split())
    assert "needs the extra ray" in " ".join(cachectl("fill", "--help").out.replace("│", " ").split())


def test_recipes_are_in_the_style_of_the_other_tables(tmp_path):
    with actcache.open(tmp_path / "s") as store, store.space(recipe()) as space:
        space.put([key(1)], [rows(1)])
    for options in ([], ["--space", recipe().fingerprint]):
        said = cachectl("inspect", tmp_path / "s", *options).out
        assert "weights" in said
        assert not set(said) & set("┏┌│┃")


def test_usage_errors_name_the_help():
    assert "--help" in cachectl("ls").refused(2)
    assert "--help" in cachectl("ls", "x", "--nonsense").refused(2)
    assert "--help" in cachectl("nonsense").refused(2)


def test_the_version():
    assert cachectl("--version").out == f"cachectl {actcache.__version__}\n"


def test_inspect_fits_into_80_columns(tmp_path, monkeypatch):
    """And neither numbers nor the model's name are lost."""
    monkeypatch.setattr("actcache.cli.inspect.console", lambda: _Console(width=80))
    made = recipe(model="sentence-transformers/all-MiniLM-L6-v2-of-a-long-name", layer=11)
    with actcache.open(tmp_path / "store") as store, store.space(made) as space:
        space.put([key(i) for i in range(1200)], [rows(1)] * 1200, [ids(1)] * 1200)
    lines = cachectl("inspect", str(tmp_path / "store")).out.splitlines()
    summary = "".join(line.replace(" ", "") for line in lines[:9])
    assert "1,200" in summary
    assert f"{1200 * len(rows(1)):,}" in summary
    assert "all-MiniLM" in summary
    assert "…" not in summary
    assert max(map(len, lines[:9])) <= 80

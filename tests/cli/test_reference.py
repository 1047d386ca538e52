"""docs/cli.md says what the commands say of themselves, and every command says what it should."""

from __future__ import annotations

import pytest

from actcache.cli import COMMANDS
from actcache.cli.reference import reference_text
from tests.cli.running import cachectl
from tests.support import ROOT


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


def test_usage_errors_name_the_help():
    assert "--help" in cachectl("ls").refused(2)
    assert "--help" in cachectl("ls", "x", "--nonsense").refused(2)
    assert "--help" in cachectl("nonsense").refused(2)

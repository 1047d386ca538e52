"""docs/cli.md, made from the commands themselves: ``python -m actcache.cli.reference docs/cli.md``."""

from __future__ import annotations

import enum
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from typer.models import ArgumentInfo, OptionInfo

from actcache.cli import COMMANDS, EXIT_CODES
from actcache.cli.options import is_list, value_name

_HEAD = """# cachectl

The store from the shell. Made from the commands' own descriptions by `python -m actcache.cli.reference docs/cli.md`; a
test compares. `cachectl --help` and `cachectl COMMAND --help` say the same, `cachectl --install-completion` completes
commands and options in your shell.

Every command takes `-h`, and `--json`, which prints one JSON value and nothing else ([its shape](cli-json.md)). What
takes longer than a second shows its progress on stderr: a bar on a terminal, else a line every ten seconds; `--quiet`
does without. A failure is one line on stderr that says what to do.

All commands can be ended at any time and run again: by Ctrl-C (SIGINT), by what batch systems and containers send
(SIGTERM), by closing the terminal (SIGHUP). What is computed is stored first, files that are half written are removed,
processes of `--devices` end too; the exit code is 128 and the signal's number, as shells have it. A second SIGINT or
SIGTERM, more than a second later, ends the command at once: nothing is partial, but what was not stored is lost.
Signals that are ignored when the command starts (`nohup`, jobs that `sh` runs in the background) stay ignored. Killed
without warning (`kill -9`, no memory), a fill loses what it computed in its last minute, and no more than 512 MiB a
layer.

"""

_EXAMPLE = "Example: "


def reference_text() -> str:
    """Return docs/cli.md."""
    codes = EXIT_CODES.removeprefix("Exit codes: ").rstrip(".").split(", ")
    rows = "".join(f"| {code} | {what} |\n" for code, _, what in (one.partition(" ") for one in codes))
    sections = (_section(command) for command in COMMANDS)
    return f"{_HEAD}| exit code | |\n| --- | --- |\n{rows}{''.join(sections)}"


def _section(command: Callable[..., None]) -> str:
    parts = [part for part in inspect.cleandoc(command.__doc__ or "").split("\n\n") if part]
    example = next(part.removeprefix(_EXAMPLE) for part in parts if part.startswith(_EXAMPLE))
    text = "\n\n".join(part for part in parts if not part.startswith(_EXAMPLE))
    arguments, options = [], []
    usage = []
    for name, info, kind, default in _parameters(command):
        if isinstance(info, ArgumentInfo):
            shown = info.metavar or name.upper()
            shown += "..." if is_list(kind) else ""
            usage.append(shown if default is inspect.Parameter.empty else f"[{shown}]")
            arguments.append(f"| `{shown}` | | {info.help or ''} |\n")
        else:
            names = ", ".join(f"`{one}`" for one in _names(name, info))
            options.append(f"| {names}{_value(kind)} | {_default(default)} | {info.help or ''} |\n")
    table = "".join(["| argument, option | default | |\n| --- | --- | --- |\n", *arguments, *options])
    name = command.__name__
    return (
        f"\n## {name}\n\n```\ncachectl {' '.join([name, *usage])} [OPTIONS]\n```\n\n{text}\n\n"
        f"```\n{example}\n```\n\n{table}"
    )


def _parameters(command: Callable[..., None]) -> Iterator[tuple[str, Any, Any, Any]]:
    """Yield name, typer's description, type and default of each parameter."""
    hints = typing.get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        kind, info = typing.get_args(hints[name])[:2]
        assert isinstance(info, ArgumentInfo | OptionInfo)
        yield name, info, kind, parameter.default


def _names(name: str, info: OptionInfo) -> list[str]:
    """Return how an option is written; typer takes the first name of an annotated one for its default."""
    first = [info.default] if isinstance(info.default, str) else []
    return [*first, *(info.param_decls or ())] or [f"--{name.replace('_', '-')}"]


def _value(kind: Any) -> str:
    name = value_name(kind).replace("|", "&#124;")
    return f" {name}" if name else ""


def _default(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return "required"
    if default is None or default is False:
        return ""
    return f"`{default.value if isinstance(default, enum.Enum) else default}`"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(reference_text(), encoding="utf-8")
    else:
        print(reference_text(), end="")

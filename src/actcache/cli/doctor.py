"""``cachectl doctor``: what a bug report needs, to copy and paste."""

from __future__ import annotations

from typing import Annotated

import typer

from actcache.admin.doctor import diagnose
from actcache.cli import options
from actcache.cli.common import ExitCode, print_json, say


def doctor(
    store: Annotated[
        str | None, typer.Argument(help="Path or URL of a store, or of where one is to be.", show_default=False)
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show versions, extras, backends, and what is particular about a place; for bug reports.

    Tells no credentials. Exit code 3 where a place is given that cannot be used.

    Example: cachectl doctor ./activations
    """
    found = diagnose(store)
    if as_json:
        print_json(found)
    else:
        for section, facts in found.facts.items():
            say(f"{section}:")
            for name, value in facts.items():
                say(f"  {name}: {value}")
        for warning in found.warnings:
            say(f"warning: {warning}")
    if not found.usable:
        raise typer.Exit(ExitCode.STORE)

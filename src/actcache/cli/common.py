"""What the commands share: how results are shown, and models that are asked for only where somebody needs them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from actcache.admin.display import as_json, clean
from actcache.cli.shell import as_shown
from actcache.errors import UsageError, requires_extra


class ExitCode(IntEnum):
    STORE = 3
    DAMAGED = 4
    MODEL = 5


SHORT = 12  # characters of a fingerprint in tables


class _Console(Console):
    """Prints texts as they are: a model's name is no markup, and has no say in what the terminal does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        # First what is no character (a file name's bytes), then what stands for one that is no text.
        visible = as_shown(clean(as_shown(text, self.encoding)), self.encoding)
        return super().render_str(visible, **options)


def console() -> Console:
    """Return where results are printed: stdout, with a fixed width where that is no terminal."""
    terminal = _Console()
    return terminal if terminal.is_terminal else _Console(width=120)


def say(text: str) -> None:
    """Print a line of a result."""
    console().print(text, highlight=False, soft_wrap=True)


def notice(text: str) -> None:
    """Print a line beside the result, on stderr: what is no failure, and perhaps not what was meant."""
    _Console(stderr=True).print(text, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a result for machines; see ``as_json``."""
    print(json.dumps(as_json(value), indent=1))


def by_space(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what is known of spaces, by fingerprint, as JSON has it everywhere: a list, each with its ``space``."""
    return [{"space": fingerprint, **as_json(one)} for fingerprint, one in found.items()]


def say_failures(failures: Mapping[str, str], what: str) -> None:
    """Print a line for each space, by fingerprint, of which something cannot be told or done, and why."""
    for fingerprint, why in failures.items():
        say(f"{fingerprint[:SHORT]}: {what}: {why}")


def say_rest(unreadable: Mapping[str, str], collections: Iterable[str]) -> None:
    """Print what a store has beside its spaces that can be read."""
    for fingerprint, what in unreadable.items():
        say(f"unreadable {fingerprint}: {what}")
    if collections:
        say(f"collections: {', '.join(collections)}")


def table(title: str, left: Iterable[str], right: Iterable[str] = ()) -> Table:
    """Return a table whose last columns, ``right``, hold numbers."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in left:
        made.add_column(name, no_wrap=True)
    for name in right:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def quieten_transformers() -> None:
    """Have the library say nothing but errors: its messages would bury the command's few."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def place_of(layer: str | None, site: str | None) -> int | str | None:
    """Return where rows are taken, of the two options; None where neither was given."""
    if layer is None or site is not None:
        if layer is not None:
            raise UsageError("--layer and --site at once: give one of them")
        return site
    try:
        return layer if layer == "last" else int(layer)
    except ValueError:
        raise UsageError(f"--layer {layer!r} is none: give one layer, a number or last; a module is a --site") from None


def recorded_models(model: str | None, device: str | None) -> tuple[Any, Any]:
    """Return the library's part, which needs torch, and the models that it is to find."""
    with requires_extra("models", "computing entries again needs torch and transformers"):
        quieten_transformers()
        from actcache.admin import recompute
    return recompute, recompute.RecordedModels(model, device=device)

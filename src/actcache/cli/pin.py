"""``cachectl pin`` and ``cachectl unpin``: spaces that no pruning takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from actcache.admin import retention
from actcache.cli import options
from actcache.cli.common import print_json, say
from actcache.store.store import Store, open_standing

_HELP = "Fingerprints of spaces, or how they begin."
_Spaces = Annotated[list[str], typer.Argument(help=_HELP, show_default=False, autocompletion=options.complete_spaces)]
_Pinned = Annotated[list[str], typer.Argument(help=_HELP, show_default=False, autocompletion=options.complete_pinned)]


def pin(store: options.Store, spaces: _Spaces, as_json: options.Json = False) -> None:
    """Protect spaces from every prune, until they are unpinned.

    Example: cachectl pin ./activations 3f2a
    """
    _change(store, "pinned", retention.pin, spaces, as_json)


def unpin(store: options.Store, spaces: _Pinned, as_json: options.Json = False) -> None:
    """Take the protection of pinned spaces away.

    Example: cachectl unpin ./activations 3f2a
    """
    _change(store, "unpinned", retention.unpin, spaces, as_json)


def _change(
    store: str, what: str, change: Callable[[Store, list[str]], list[str]], spaces: list[str], as_json: bool
) -> None:
    with open_standing(store) as opened:
        fingerprints = change(opened, spaces)
    if as_json:
        pinned = what == "pinned"
        print_json({"store": store, "spaces": [{"space": one, "pinned": pinned} for one in fingerprints]})
        return
    for fingerprint in fingerprints:
        say(f"{what} {fingerprint}")

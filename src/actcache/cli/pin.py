"""``cachectl pin`` and ``cachectl unpin``: spaces that no pruning takes."""

from __future__ import annotations

from typing import Annotated

import typer

from actcache.admin import retention
from actcache.cli import options
from actcache.cli.common import print_json, say
from actcache.store.store import open_standing

_Prefixes = Annotated[list[str], typer.Argument(help="Fingerprints of spaces, or how they begin.", show_default=False)]


def pin(store: options.Store, spaces: _Prefixes, as_json: options.Json = False) -> None:
    """Protect spaces from every prune, until they are unpinned.

    Example: cachectl pin ./activations 3f2a
    """
    with open_standing(store) as opened:
        found = retention.pin(opened, spaces)
    _show(store, "pinned", found, as_json)


def unpin(store: options.Store, spaces: _Prefixes, as_json: options.Json = False) -> None:
    """Take the protection of pinned spaces away.

    Example: cachectl unpin ./activations 3f2a
    """
    with open_standing(store) as opened:
        found = retention.unpin(opened, spaces)
    _show(store, "unpinned", found, as_json)


def _show(store: str, what: str, fingerprints: list[str], as_json: bool) -> None:
    if as_json:
        print_json({"store": store, what: fingerprints})
        return
    for fingerprint in fingerprints:
        say(f"{what} {fingerprint}")

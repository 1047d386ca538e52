"""``cachectl du``: where the bytes are."""

from __future__ import annotations

from typing import Annotated

import typer

from actcache.admin.display import binary
from actcache.cli import options
from actcache.cli.common import SHORT, console, print_json, table
from actcache.store.footprint import footprint_of
from actcache.store.store import open_store


def du(
    store: options.Store,
    as_json: options.Json = False,
    in_bytes: Annotated[bool, typer.Option("--bytes", help="Show bytes, not KiB, MiB, ...")] = False,
) -> None:
    """Show how many bytes each space takes, by its parts, and what else there is.

    Example: cachectl du ./activations
    """
    with open_store(store, mode="r") as opened:
        found = footprint_of(opened.driver.listing())
    if as_json:
        rest = {"collections": found.collections, "temporary": found.temporary, "other": found.other}
        spaces = [{"space": name, "nbytes": found.of_space(name), "parts": one} for name, one in found.spaces.items()]
        print_json({"store": store, "nbytes": found.total, "parts": rest, "spaces": spaces})
        return

    def shown(nbytes: int) -> str:
        return f"{nbytes:,}" if in_bytes else binary(nbytes)

    parts = sorted({part for parts in found.spaces.values() for part in parts})
    listed = table(store, ("space",), (*parts, "total"))
    for name, held in found.spaces.items():
        listed.add_row(name[:SHORT], *(shown(held.get(part, 0)) for part in parts), shown(found.of_space(name)))
    rest = {"collections": found.collections, "temporary": found.temporary, "other": found.other, "all": found.total}
    for name, nbytes in rest.items():
        listed.add_row(name, *("" for _ in parts), shown(nbytes))
    console().print(listed)

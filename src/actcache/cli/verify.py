"""``cachectl verify``: is all of it intact?"""

from __future__ import annotations

from typing import Annotated

import typer

from actcache import inspection
from actcache.cli.common import (
    SHORT,
    JsonOption,
    QuietOption,
    SpaceOption,
    StoreArgument,
    binary,
    counted,
    print_json,
    say,
)
from actcache.cli.progress import Meter
from actcache.store import open_store

_DAMAGED = 4


def verify(
    store: StoreArgument,
    space: SpaceOption = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Read so many entries of each space, drawn at random, instead of all.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Read all entries and compare them with their checksums. Changes nothing; exit code 4 where something is damaged.

    Example: cachectl verify ./activations
    """
    with open_store(store, mode="r") as opened, Meter("verify", "entries", show=not quiet) as meter:
        found = inspection.verify(opened, space or (), sample=sample, progress=meter)
    if as_json:
        spaces = {
            name: {
                "entries": one.entries,
                "nbytes": one.nbytes,
                "intact": one.intact,
                "corrupt": [key.hex() for key in one.corrupt],
                "damaged": one.damaged,
            }
            for name, one in found.spaces.items()
        }
        print_json({"store": store, "intact": found.intact, "spaces": spaces, "unreadable": found.unreadable})
    else:
        for name, one in found.spaces.items():
            state = "intact" if one.intact else f"{counted(len(one.corrupt), 'corrupt entry', 'corrupt entries')}"
            say(f"{name[:SHORT]}: {counted(one.entries, 'entry', 'entries')}, {binary(one.nbytes)} read: {state}")
            for segment, what in one.damaged.items():
                say(f"  damaged {segment}: {what}")
        for name, what in found.unreadable.items():
            say(f"{name[:SHORT]}: unreadable: {what}")
        if not found.intact:
            say(f"cachectl repair {store} takes what is corrupt out of the way; a fill computes it again")
    if not found.intact:
        raise typer.Exit(_DAMAGED)

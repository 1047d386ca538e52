"""``cachectl repair``: what is corrupt goes out of the way, so that a fill computes it again."""

from __future__ import annotations

import typer

from actcache import inspection
from actcache.cli.common import SHORT, JsonOption, QuietOption, SpaceOption, StoreArgument, counted, print_json, say
from actcache.cli.progress import Meter
from actcache.store import open_standing

_DAMAGED = 4


def repair(
    store: StoreArgument, space: SpaceOption = None, as_json: JsonOption = False, quiet: QuietOption = False
) -> None:
    """Verify all entries, and quarantine what is corrupt: it becomes a miss, its bytes are kept aside.

    A fill with the same model computes it again. Exit code 4 where a whole space cannot be read: it is left alone.

    Example: cachectl repair ./activations
    """
    with open_standing(store) as opened, Meter("verify", "entries", show=not quiet) as meter:
        done = inspection.repair(opened, space or (), progress=meter)
    if as_json:
        spaces = {
            name: {"quarantined": [key.hex() for key in one.quarantined], "set_aside": one.set_aside}
            for name, one in done.spaces.items()
        }
        print_json({"store": store, "spaces": spaces, "unreadable": done.unreadable})
    else:
        for name, one in done.spaces.items():
            entries = counted(len(one.quarantined), "entry", "entries")
            changed = f"{entries} quarantined, {counted(len(one.set_aside), 'segment')} set aside"
            say(f"{name[:SHORT]}: {changed if one.quarantined or one.set_aside else 'intact'}")
        for name, what in done.unreadable.items():
            say(f"{name[:SHORT]}: left alone: {what}")
    if done.unreadable:
        raise typer.Exit(_DAMAGED)

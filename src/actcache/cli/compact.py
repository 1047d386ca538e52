"""``cachectl compact``: fewer, larger segments, and back the space of what was deleted."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Annotated

import typer

from actcache.admin.inspection import chosen, opened
from actcache.backend import GRACE_SECONDS
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
from actcache.errors import DataError
from actcache.io.progress import Meter
from actcache.reader.checks import nbytes_of
from actcache.store.space import COMPACT_BYTES
from actcache.store.store import open_standing

_DAMAGED = 4


def compact(
    store: StoreArgument,
    space: SpaceOption = None,
    target: Annotated[str, typer.Option(help="Bytes of rows that a merged segment gets at most, about.")] = str(
        f"{COMPACT_BYTES >> 30}GiB"
    ),
    waste: Annotated[
        float, typer.Option(min=0, max=1, help="Rewrite a segment of which so large a share is deleted or overwritten.")
    ] = 0.1,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds for which what was replaced stays, for readers that still use it.")
    ] = GRACE_SECONDS,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Join small segments, and give back the space of deleted and overwritten entries, while others read and write.

    What is replaced is removed by a later run, once the grace period is over.

    Example: cachectl compact ./activations --target 4GiB
    """
    target_bytes = nbytes_of("--target", target)
    done, unreadable = {}, {}
    with open_standing(store) as opened_store, Meter("compact", amount=binary, show=not quiet) as meter:
        names = chosen(opened_store, space or ())
        for name in names:
            try:
                with opened(opened_store, name) as one:
                    done[name] = one.compact(
                        target_bytes=target_bytes, waste=waste, grace=grace, progress=partial(meter, name)
                    )
            except DataError as error:
                unreadable[name] = str(error)
    if as_json:
        spaces = {name: dataclasses.asdict(one) for name, one in done.items()}
        print_json({"store": store, "spaces": spaces, "unreadable": unreadable})
    else:
        for name, result in done.items():
            merged = f"{counted(result.segments_merged, 'segment')} merged into {result.segments_written:,}"
            say(f"{name[:SHORT]}: {merged}, {result.segments_removed:,} removed, {binary(result.bytes_freed)} freed")
        for name, what in unreadable.items():
            say(f"{name[:SHORT]}: left alone: {what}")
    if unreadable:
        raise typer.Exit(_DAMAGED)

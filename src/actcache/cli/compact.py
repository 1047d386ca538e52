"""``cachectl compact``: fewer, larger segments, and back the space of what was deleted."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from actcache.admin.display import binary, counted, fields_as_json, span
from actcache.admin.inspection import each_space, open_space
from actcache.backend import GRACE_SECONDS
from actcache.cli import options
from actcache.cli.common import SHORT, ExitCode, by_space, print_json, say, say_failures
from actcache.format.arguments import nbytes_of
from actcache.io.progress import Meter
from actcache.store.footprint import segments_in
from actcache.store.space import COMPACT_BYTES
from actcache.store.store import open_standing


def compact(
    store: options.Store,
    space: options.Spaces = None,
    target: Annotated[str, typer.Option(help="Bytes of rows that a merged segment gets at most, about.")] = str(
        f"{COMPACT_BYTES >> 30}GiB"
    ),
    waste: Annotated[
        float, typer.Option(min=0, max=1, help="Rewrite a segment of which so large a share is deleted or overwritten.")
    ] = 0.1,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds for which what was replaced stays, for readers that still use it.")
    ] = GRACE_SECONDS,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Join small segments, and give back the space of deleted and overwritten entries, while others read and write.

    What is replaced stays for ten minutes (--grace), since readers that are at work may still use it: until then a
    store whose segments are all joined takes its bytes twice. The next run after that removes it.

    Example: cachectl compact ./activations --target 4GiB
    """
    target_bytes = nbytes_of("--target", target)
    with open_standing(store) as opened, Meter("compact", amount=binary, show=not quiet) as meter:
        done, unreadable = each_space(
            opened,
            space or (),
            lambda one: one.compact(
                target_bytes=target_bytes, waste=waste, grace=grace, progress=partial(meter, one.recipe.fingerprint)
            ),
        )
        files, kept = opened.driver.listing(), {}
        for name in done if grace else ():
            held = sum(file.nbytes for file in segments_in(files, name).values())
            with open_space(opened, name) as one:
                kept[name] = max(0, held - one.usage().nbytes)
    if as_json:
        described = {name: fields_as_json(result) for name, result in done.items()}
        for name, told in described.items():
            told |= {"freed": told.pop("bytes_freed"), "replaced": kept.get(name, 0)}
        spaces = by_space(described)
        print_json({"store": store, "spaces": spaces, "unreadable": unreadable})
    else:
        for name, result in done.items():
            merged = f"{counted(result.segments_merged, 'segment')} merged into {result.segments_written:,}"
            say(f"{name[:SHORT]}: {merged}, {result.segments_removed:,} removed, {binary(result.bytes_freed)} freed")
            if kept.get(name):
                say(
                    f"  {binary(kept[name])} that were replaced stay for {span(grace)}, for readers that use them; "
                    f"then cachectl compact {store} removes them"
                )
        say_failures(unreadable, "left alone")
    if unreadable:
        raise typer.Exit(ExitCode.DAMAGED)

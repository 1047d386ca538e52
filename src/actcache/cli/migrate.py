"""``cachectl migrate``: the same entries in another backend, at another place, in another dtype."""

from __future__ import annotations

from typing import Annotated

import typer

from actcache.admin import migration
from actcache.admin.display import binary, entries, fields_as_json
from actcache.admin.migration import Migration
from actcache.cli import options
from actcache.cli.common import SHORT, ExitCode, print_json, say, say_failures
from actcache.entries.writer import SEGMENT_BYTES
from actcache.errors import UsageError
from actcache.format.arguments import nbytes_of
from actcache.io.progress import Meter
from actcache.store.store import open_store


def migrate(
    source: Annotated[str, typer.Argument(help="Path or URL of the store to read.", show_default=False)],
    target: Annotated[
        str, typer.Argument(help="Path or URL of the store to write; made where it is absent.", show_default=False)
    ],
    space: options.Spaces = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Store rows as float16, int8, int8+zstd, ... (docs/codecs.md); by default as the source does.",
            autocompletion=options.complete_dtypes,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Let a codec that scales rows take what another such one has left of them.")
    ] = False,
    segment_bytes: Annotated[
        str, typer.Option(help="Bytes of rows of a segment; two are in memory. What is published survives a kill.")
    ] = f"{SEGMENT_BYTES >> 20}MiB",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Copy a store's spaces and collections into another store, of any backend at any place, and prove it.

    What is there already is skipped: run it again where it was interrupted. The source is never changed. Every entry is
    compared with its checksum when it is read and again when it is read back; the digests over all keys and checksums
    of both ends are printed. Exit code 4 where they differ.

    With --dtype, float32 becomes just what a fill with that dtype stores. What was float16 or bfloat16 before has lost
    digits: it gets a recipe that says so (float32 via float16), which a fill for float32 never takes for its own. Where
    two spaces would become one, nothing is copied: choose with --space.

    Example: cachectl migrate ./activations zarr:s3://bucket/activations
    """
    nbytes = nbytes_of("--segment-bytes", segment_bytes)
    prefixes = space or ()
    with open_store(source, mode="r") as old:  # first: nothing is made where there is nothing to read
        for collision in migration.collisions(old, target, prefixes=prefixes, dtype=dtype):
            raise UsageError(f"{collision}: choose one with --space, and migrate the other to another TARGET")
        with open_store(target, mode="a") as new, Meter("migrate", "entries", show=not quiet) as meter:
            done = migration.migrate(
                old, new, prefixes=prefixes, dtype=dtype, force=force, segment_bytes=nbytes, progress=meter
            )
    if as_json:
        spaces = [fields_as_json(one, "equal") for one in done.spaces]
        for one in spaces:
            one |= {"space": one.pop("source"), "target_space": one.pop("target")}
        moved = [{"collection": name, "state": state} for name, state in done.collections.items()]
        rest = {"unreadable": done.unreadable, "collection_list": moved, "equal": done.equal}
        print_json({"source": source, "target": target, "spaces": spaces, **rest})
    else:
        _show(done)
    if not done.equal:
        raise typer.Exit(ExitCode.DAMAGED)


def _show(done: Migration) -> None:
    for one in done.spaces:
        new = "" if one.target == one.source else f" -> {one.target[:SHORT]}"
        say(f"{one.source[:SHORT]}{new}: {entries(one.entries)}, {one.copied:,} copied ({binary(one.nbytes)} read)")
        say(f"  should hold {one.digest}")
        say(f"  does hold   {one.target_digest}  {'equal' if one.equal else 'NOT EQUAL'}")
        if one.via:
            say(f"  stored as {one.stored_as}: a space of its own, for a fill would compute other digits")
        for name, what in one.damaged.items():
            say(f"  damaged in the source: {name}: {what}")
        if one.corrupt:
            say(f"  {entries(len(one.corrupt))} corrupt in the source, the first {one.corrupt[0].hex()}")
        if one.differing:
            many, first = entries(len(one.differing)), one.differing[0].hex()
            state = "stand in the target with other numbers, or were deleted meanwhile"
            say(f"  {many} {state}, the first {first}: run it again, or delete them there")
    say_failures(done.unreadable, "left out")
    for name, state in done.collections.items():
        say(f"collection {name}: {state}")

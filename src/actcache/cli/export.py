"""``cachectl export`` and ``cachectl import``: a space as one file, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actcache.admin.display import binary, counted, entries, fields_as_json
from actcache.admin.exchange import export_space, import_file
from actcache.admin.inspection import open_space, select_spaces
from actcache.cli import options
from actcache.cli.common import SHORT, ExitCode, print_json, say
from actcache.errors import UsageError
from actcache.io.progress import Meter
from actcache.store.store import open_store


def export(
    store: options.Store,
    file: Annotated[
        Path,
        typer.Argument(help="To write: .safetensors, .npz, or .parquet of keys and token ids.", show_default=False),
    ],
    space: Annotated[str | None, typer.Option(help="How its fingerprint begins, where there are several.")] = None,
    collection: Annotated[str | None, typer.Option(help="Only this collection's entries, in its order.")] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a space's entries to one file that other programs read.

    A .safetensors or .npz holds all of the entries: values, offsets, keys, checksums and, each where all entries have
    it, token_ids, spans, word_ids, type_ids (docs/format.md). A .parquet holds a row an entry: key (hexadecimal), the
    collection's id, length, token_ids; it needs pyarrow.

    Exit code 4 where an entry fails its checksum: nothing is written.

    Example: cachectl export ./activations activations.safetensors
    """
    with open_store(store, mode="r") as opened, Meter("export", "entries", show=not quiet) as meter:
        names = select_spaces(opened, [space] if space is not None else [])
        if len(names) != 1:
            raise UsageError(f"{store} has {counted(len(names), 'space')}: choose one with --space")
        listed = None if collection is None else opened.collection(collection)
        keys, ids = (None, None) if listed is None else (listed.keys, listed.ids)
        with open_space(opened, names[0]) as one:
            done = export_space(one, file, keys, ids=ids, progress=meter)
    if as_json:
        print_json({"store": store, "space": names[0], "file": str(file), **fields_as_json(done)})
        return
    say(f"{entries(done.entries)} of {names[0][:SHORT]} in {file}, {binary(done.nbytes)}")
    for name, count in done.left_out.items():
        say(f"{name} of {entries(count)} left out, for the others have none; a migration takes them")


def import_(
    store: options.NewStore,
    file: Annotated[Path, typer.Argument(help="A .safetensors or .npz that export wrote.", show_default=False)],
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Store the entries of an exported file; what is there already is skipped.

    Each entry is compared with its checksum first. Exit code 4 where some fail it: those are left out.

    Example: cachectl import ./activations activations.safetensors
    """
    if not file.is_file():
        raise UsageError(f"cannot read {file}: there is no such file")  # before a store is made
    with open_store(store, mode="a") as opened, Meter("import", "entries", show=not quiet) as meter:
        done = import_file(opened, file, progress=meter)
    if as_json:
        found = fields_as_json(done)
        print_json({"store": store, "space": found.pop("fingerprint"), "file": str(file), **found})
    else:
        there = done.entries - done.stored - len(done.corrupt)
        say(f"{entries(done.entries)}: {done.stored:,} stored in {done.fingerprint[:SHORT]}, {there:,} were there")
        if done.corrupt:
            say(f"{entries(len(done.corrupt))} corrupt in {file}, the first {done.corrupt[0].hex()}")
    if done.corrupt:
        raise typer.Exit(ExitCode.DAMAGED)


import_.__name__ = "import"  # the command's name, which Python keeps for itself

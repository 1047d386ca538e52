"""``cachectl verify``: is all of it intact, and is it what the model computes?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from actcache.admin import inspection
from actcache.admin.display import attributes_as_json, binary, counted, entries, fields_as_json
from actcache.cli import options
from actcache.cli.common import SHORT, ExitCode, by_space, print_json, recorded_models, say, say_failures
from actcache.errors import UsageError
from actcache.io.progress import Meter
from actcache.store.store import open_store


def verify(
    store: options.Store,
    space: options.Spaces = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Read so many entries of each space, drawn at random, instead of all.")
    ] = None,
    recompute: Annotated[
        int | None,
        typer.Option(
            min=1, help="Also compute so many entries of each space again, drawn at random, from their token ids."
        ),
    ] = None,
    model: options.Model = None,
    device: options.Device = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Read all entries and compare them with their checksums, on all processors. Changes nothing.

    With --recompute also compare a sample with what the model computes: an entry may be off by what other kernels do in
    its compute dtype and by its stored dtype's rounding (relative error 6e-4 for float16 computed in float32). The
    model is the one that the recipe names: of a store that you do not trust, say with --model which one to load.

    Exit codes: 4 where something is damaged or further off, 5 where a space could not be computed again (no model, or
    another one).

    Example: cachectl verify ./activations --recompute 100 --model ./bert-base-uncased
    """
    if recompute is None and (model is not None or device is not None):
        raise UsageError("--model and --device are for --recompute N")
    with open_store(store, mode="r") as opened:
        # First, for a model that is not there is told sooner than a large store is read.
        again: Any = None
        if recompute is not None:
            with Meter("recompute", "entries", show=not quiet) as meter:
                recomputing, models = recorded_models(model, device)
                again = recomputing.verify_by_recomputing(opened, models, space or (), sample=recompute, progress=meter)
        with Meter("verify", "entries", show=not quiet) as meter:
            found = inspection.verify(opened, space or (), sample=sample, progress=meter)
    intact = found.intact and (again is None or again.ok)
    if as_json:
        spaces = by_space({name: fields_as_json(one, "intact") for name, one in found.spaces.items()})
        for one in spaces if again is not None else ():
            name = one["space"]
            one["recomputed"] = _recomputed(again.spaces[name]) if name in again.spaces else None
            one["not_recomputed"] = again.unable.get(name)
        print_json({"store": store, "intact": intact, "spaces": spaces, "unreadable": found.unreadable})
    else:
        _show(found, store)
        if again is not None:
            _show_recomputed(again)
    if not intact:
        raise typer.Exit(ExitCode.DAMAGED)
    if again is not None and again.unable:
        raise typer.Exit(ExitCode.MODEL)


def _recomputed(one: Any) -> dict[str, Any]:
    found = attributes_as_json(one, "ok", "error", "largest", "tolerance", "corrupt")
    return {**found, "entries": one.documents, "wrong": one.failed}


def _show(found: inspection.StoreIntegrityReport, store: str) -> None:
    for name, one in found.spaces.items():
        state = "intact" if one.intact else counted(len(one.corrupt), "corrupt entry", "corrupt entries")
        say(f"{name[:SHORT]}: {entries(one.entries)}, {binary(one.nbytes)} read: {state}")
        for segment, what in one.damaged.items():
            say(f"  damaged {segment}: {what}")
    say_failures(found.unreadable, "unreadable")
    if not found.intact:
        say(f"cachectl repair {store} takes what is corrupt out of the way; a fill, or --recompute, computes it again")


def _show_recomputed(again: Any) -> None:
    for name, one in again.spaces.items():
        say(
            f"{name[:SHORT]}: {entries(one.documents)} computed again: relative error at most "
            f"{one.error:.2g} (allowed {one.tolerance:.2g}), {len(one.failed)} wrong"
        )
        for key in one.failed:
            say(f"  wrong {key.hex()}")
        if one.failed:
            say("  their checksums are right: they were put so. In Python, space.delete(keys) makes them misses")
    say_failures(again.unable, "not computed again")

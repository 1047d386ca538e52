"""``cachectl ls``: what is there, in short."""

from __future__ import annotations

import dataclasses
from pathlib import PurePath
from typing import Annotated, Any

import typer
from rich.tree import Tree

from actcache.admin import inspection
from actcache.admin.inspection import Coverage, SpaceReport
from actcache.admin.report import Overview, SegmentReport, overview
from actcache.backend import StoredFile
from actcache.cli.common import (
    SHORT,
    JsonOption,
    SpaceOption,
    StoreArgument,
    binary,
    console,
    counted,
    print_json,
    say,
    span,
    table,
)
from actcache.store.footprint import segments_in, written
from actcache.store.store import open_store

_MOST = 20  # segments of a space in a tree


def ls(
    store: StoreArgument,
    space: SpaceOption = None,
    tree: Annotated[bool, typer.Option("--tree", help="Show each space's segments and collections as a tree.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the spaces and collections of a store; with --space, that space's segments and what it has of each.

    Example: cachectl ls ./activations
    """
    with open_store(store, mode="r") as opened:
        if tree:
            found = overview(opened, space or ())
            if as_json:
                print_json(found.to_json())
            else:
                console().print(_tree(store, found))
            return
        report = inspection.inspect(opened, space or ())
        files = opened.driver.listing()
        rows = [_row(one, files) for one in report.spaces]
        if space:
            for row in rows:
                held = segments_in(files, row["fingerprint"])
                row["segment_bytes"] = {name: file.nbytes for name, file in held.items()}
                row["collections"] = inspection.coverage(opened, row["fingerprint"])
    if as_json:
        for row in rows:
            held = row.get("collections", {})
            row["collections"] = {n: dataclasses.asdict(c) for n, c in held.items() if isinstance(c, Coverage)}
        result = {"spaces": rows, "unreadable": report.unreadable, "collections": report.collections}
        print_json({"store": store, **result})
        return
    text = ("space", "model", "layer", "dtype")
    listed = table(store, text, ("entries", "tokens", "bytes", "written"))
    for row in rows:
        model = PurePath(row["model"]).name
        numbers = (f"{row['entries']:,}", f"{row['tokens']:,}", binary(row["nbytes"]))
        ago = "" if row["written"] is None else f"{span(row['written'])} ago"
        listed.add_row(row["fingerprint"][:SHORT], model, str(row["layer"]), row["stored_as"], *numbers, ago)
    console().print(listed)
    for row in rows:
        for segment, what in row["damaged"].items():
            say(f"damaged {row['fingerprint'][:SHORT]}: {segment}: {what}")
        _details(row)
    for name, what in report.unreadable.items():
        say(f"unreadable {name[:SHORT]}: {what}")
    if report.collections:
        say(f"collections: {', '.join(report.collections)}")


def _tree(store: str, found: Overview) -> Tree:
    root = Tree(store)
    for branch in found.spaces:
        recipe, usage = branch.report.recipe, branch.report.usage
        size = f"{counted(usage.entries, 'entry', 'entries')}, {binary(usage.nbytes)}"
        name = f"{PurePath(recipe.model).name} layer {recipe.layer} {recipe.stored_as}"
        space = root.add(f"space {recipe.fingerprint[:SHORT]}  {name}: {size}")
        for segment in branch.segments[:_MOST]:
            space.add(_segment(segment))
        if len(branch.segments) > _MOST:
            space.add(f"and {counted(len(branch.segments) - _MOST, 'more segment')}")
        for collection, held in branch.collections.items():
            has = f"{held.present:,} of {counted(held.documents, 'document')}" if isinstance(held, Coverage) else held
            space.add(f"collection {collection}: {has}")
    for fingerprint, what in found.unreadable.items():
        root.add(f"space {fingerprint[:SHORT]}  unreadable: {what}")
    for collection, documents in found.collections.items():
        many = documents if isinstance(documents, str) else counted(documents, "document")
        root.add(f"collection {collection}: {many}")
    return root


def _segment(segment: SegmentReport) -> str:
    if segment.damaged is not None:
        return f"{segment.name}  damaged: {segment.damaged}"
    size = "" if segment.nbytes is None else f", {binary(segment.nbytes)}"
    ago = "" if segment.age is None else f", {span(segment.age)} ago"
    held = counted(segment.entries, "entry", "entries") if segment.entries else segment.state
    return f"{segment.name}  {held}{size}{ago}"


def _row(report: SpaceReport, files: dict[str, StoredFile]) -> dict[str, Any]:
    recipe = report.recipe
    return {
        "fingerprint": recipe.fingerprint,
        "model": recipe.model,
        "layer": recipe.layer,
        "dtype": recipe.dtype,
        "stored_as": recipe.stored_as,
        **dataclasses.asdict(report.usage),
        "damaged": report.damaged,
        "written": written(files, recipe.fingerprint),
    }


def _details(row: dict[str, Any]) -> None:
    for segment, nbytes in row.get("segment_bytes", {}).items():
        say(f"  {segment}  {binary(nbytes)}")
    for name, held in row.get("collections", {}).items():
        has = f"{held.present:,} of {counted(held.documents, 'document')}" if isinstance(held, Coverage) else held
        say(f"  collection {name}: {has}")

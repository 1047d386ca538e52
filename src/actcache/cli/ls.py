"""``cachectl ls``: what is there, in short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.tree import Tree

from actcache.admin import inspection
from actcache.admin.display import ago, attributes_as_json, binary, counted, entries, fields_as_json, model_name
from actcache.admin.inspection import Coverage, SpaceReport
from actcache.admin.report import Overview, SegmentReport, coverage_as_json, overview
from actcache.admin.retention import is_pinned
from actcache.backend import StoredFile
from actcache.cli import options
from actcache.cli.common import SHORT, console, print_json, say, say_rest, table
from actcache.format.recipe import Recipe
from actcache.store.footprint import age_of_last_write, segments_in
from actcache.store.store import open_store

_MOST = 20  # segments of a space in a tree
_DIGITS = 12  # of a digest that is shown


def ls(
    store: options.Store,
    space: options.Spaces = None,
    tree: Annotated[bool, typer.Option("--tree", help="Show each space's segments and collections as a tree.")] = False,
    as_json: options.Json = False,
) -> None:
    """List the spaces and collections of a store; with --space, that space's segments and what it has of each.

    Example: cachectl ls ./activations
    """
    with open_store(store, mode="r") as opened:
        if tree:
            found = overview(opened, space or ())
            if as_json:
                print_json(found)
            else:
                console().print(_tree(store, found))
            return
        report = inspection.inspect(opened, space or ())
        files = opened.driver.listing()
        rows = [_row(one, files) for one in report.spaces]
        if space:
            for row in rows:
                held = segments_in(files, row["space"])
                row["segment_bytes"] = {name: file.nbytes for name, file in held.items()}
                with inspection.open_space(opened, row["space"]) as one:
                    row["collections"] = inspection.coverage(opened, one)
    if as_json:
        for row in rows:
            if space:
                row["coverage"] = coverage_as_json(row.pop("collections"))
                sizes = row.pop("segment_bytes")
                row["segment_list"] = [{"name": name, "nbytes": nbytes} for name, nbytes in sizes.items()]
        print_json({"store": store, **fields_as_json(report), "spaces": rows})
        return
    listed = table(store, ("space", "model", "layer", "dtype"), ("entries", "tokens", "bytes", "written"))
    for row, of in zip(rows, report.spaces, strict=True):
        numbers = (f"{row['entries']:,}", f"{row['tokens']:,}", binary(row["nbytes"]))
        words = (
            row["space"][:SHORT],
            model_name(of.recipe),
            str(row["site"] or row["layer"]),
            row["stored_as"],
        )
        listed.add_row(*words, *numbers, ago(row["written"]))
    console().print(listed)
    for fingerprint, fields in _telling_apart(report.spaces).items():
        say(f"{fingerprint[:SHORT]}: {fields}")
    for row in rows:
        if row["pinned"]:
            say(f"pinned {row['space'][:SHORT]}")
        for segment, what in row["damaged"].items():
            say(f"damaged {row['space'][:SHORT]}: {segment}: {what}")
        for segment, nbytes in row.get("segment_bytes", {}).items():
            say(f"  {segment}  {binary(nbytes)}")
        for name, held in row.get("collections", {}).items():
            say(f"  collection {name}: {_coverage(held)}")
    say_rest({name[:SHORT]: what for name, what in report.unreadable.items()}, report.collections)


def _tree(store: str, found: Overview) -> Tree:
    root = Tree(store)
    for branch in found.spaces:
        recipe, usage = branch.report.recipe, branch.report.usage
        size = f"{entries(usage.entries)}, {binary(usage.nbytes)}"
        name = f"{model_name(recipe)} {recipe.site_name} {recipe.stored_as}"
        space = root.add(f"space {recipe.fingerprint[:SHORT]}  {name}: {size}")
        for segment in branch.segments[:_MOST]:
            space.add(_segment(segment))
        if len(branch.segments) > _MOST:
            space.add(f"and {counted(len(branch.segments) - _MOST, 'more segment')}")
        for collection, held in branch.collections.items():
            space.add(f"collection {collection}: {_coverage(held)}")
    for fingerprint, what in found.unreadable.items():
        root.add(f"space {fingerprint[:SHORT]}  unreadable: {what}")
    for collection, documents in found.collections.items():
        many = documents if isinstance(documents, str) else counted(documents, "document")
        root.add(f"collection {collection}: {many}")
    return root


def _segment(segment: SegmentReport) -> str:
    if segment.damaged is not None:
        return f"{segment.name}  damaged: {segment.damaged}"
    held = entries(segment.entries) if segment.entries else segment.state
    return ", ".join(filter(None, (f"{segment.name}  {held}", binary(segment.nbytes), ago(segment.age))))


def _coverage(held: Coverage | str) -> str:
    if isinstance(held, str):
        return held
    if held.passages is None:
        return f"{held.present:,} of {counted(held.documents, 'document')}"
    missing = held.documents - held.present
    return f"{held.passages.told()}{f'; {missing:,} are missing' if missing else ''}"


def _row(report: SpaceReport, files: dict[str, StoredFile]) -> dict[str, Any]:
    return {
        "space": report.recipe.fingerprint,
        **attributes_as_json(report.recipe, "model", "layer", "site", "dtype", "stored_as"),
        **fields_as_json(report.usage),
        "damaged": report.damaged,
        "written": age_of_last_write(files, report.recipe.fingerprint),
        "pinned": is_pinned(files, report.recipe.fingerprint),
    }


def _telling_apart(spaces: Sequence[SpaceReport]) -> dict[str, str]:
    """Return what tells spaces apart whose rows would read the same, by fingerprint."""
    alike: dict[Any, list[Recipe]] = {}
    for one in spaces:
        recipe = one.recipe
        alike.setdefault((model_name(recipe), recipe.site_name, recipe.stored_as), []).append(recipe)
    found = {}
    for recipes in alike.values():
        fields = sorted({name for other in recipes[1:] for name in recipes[0].differences(other)})
        for recipe in recipes if fields else ():
            mine = {name: mine for other in recipes for name, (mine, _) in recipe.differences(other).items()}
            found[recipe.fingerprint] = ", ".join(f"{name} {_shortened(mine[name])}" for name in fields if name in mine)
    return found


def _shortened(value: object) -> str:
    text = "none" if value is None else str(value)
    return f"{text[:_DIGITS]}..." if len(text) > 2 * _DIGITS else text

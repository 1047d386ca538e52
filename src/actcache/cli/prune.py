"""``cachectl prune``: what goes, shown first."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from actcache.admin import retention
from actcache.admin.display import attributes_as_json, binary, counted, entries
from actcache.admin.retention import IDLE_SECONDS, PINNED, Pruning, PruningPlan
from actcache.backend import GRACE_SECONDS
from actcache.cli import corpus, options
from actcache.cli.common import SHORT, notice, print_json, recorded_models, say
from actcache.cli.shell import text_of_argument
from actcache.errors import ModelError, OutOfSpaceError, UsageError
from actcache.format.arguments import nbytes_of
from actcache.format.keys import Keys
from actcache.format.passages import Passages
from actcache.format.recipe import Recipe
from actcache.io.progress import Meter
from actcache.store.store import SWEEP_SECONDS, open_standing, open_store

_MOST = 12  # values that are named where none fits

_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d|w)?")
_SECONDS = {None: 1, "s": 1, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}


def prune(
    store: options.Store,
    space: options.Spaces = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="Only spaces whose recipe says so: model=..., layer=6, config.NAME=..., dtype=float32 (as computed) "
            "or 'dtype=float32 via float16' (as ls shows it), via= (no lineage)."
        ),
    ] = None,
    older_than: Annotated[str | None, typer.Option(help="Only spaces made so long ago: 90d, 12h, 2w.")] = None,
    unused_for: Annotated[str | None, typer.Option(help="Only spaces that nobody used for so long.")] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(help="Only until the store takes no more than this (200GiB), what was not used longest first."),
    ] = None,
    keep_only: Annotated[
        str | None,
        typer.Option(help="Delete entries, not spaces: those of texts that this corpus (as of fill) does not hold."),
    ] = None,
    keep_collection: Annotated[
        str | None,
        typer.Option(
            help="Delete entries, not spaces: those that this collection does not name.",
            autocompletion=options.complete_collections,
        ),
    ] = None,
    field: options.Field = None,
    format: options.Format = None,
    stride: Annotated[
        int | None, typer.Option(help="With --keep-only: the stride of spaces that hold windows of documents.")
    ] = None,
    model: options.Model = None,
    passages: options.Passages = None,
    context: options.Context = None,
    cut_by: options.CutByOption = None,
    least: options.Least = None,
    idle: Annotated[
        str,
        typer.Option(help="Leave alone what was written to since, or read since an hour before; 0: nothing."),
    ] = f"{IDLE_SECONDS / 60:.0f}min",
    left_behind: Annotated[
        str | None,
        typer.Option(
            help="Remove temporary files and unfinished uploads that are so old (24h): killed writers left them. Less "
            "than a live writer takes for a segment endangers its work."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, and change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Delete spaces, or entries, that are no longer wanted, and what killed writers left behind.

    Without options only the latter. The options that choose spaces hold together: those that fit all of them go. A
    budget takes whole spaces, since an epoch reads all of one; --keep-only and --keep-collection make one smaller.
    Pinned spaces stay, and so does what somebody may be using. Read-only users leave no trace: pin what they read. Asks
    before anything is deleted; where there is no terminal it needs --yes. Exit code 3 where a budget could not be met.

    Example: cachectl prune ./activations --max-bytes 200GiB --dry-run
    """
    if keep_only is not None and keep_collection is not None:
        raise UsageError("--keep-only and --keep-collection at once: prune by one after the other")
    if keep_only is None and (field is not None or format is not None):
        raise UsageError("--field and --format are for --keep-only FILE")
    spec = options.passages_of(passages, context, cut_by, least)
    if keep_only is None and (spec is not None or model is not None):
        raise UsageError("--passages and --model are for --keep-only FILE: they say how its documents were cut")
    if spec is not None and keep_only is not None and corpus.is_stream(keep_only):
        raise UsageError("with --passages, --keep-only is read again for each space: give a file, no pipe")
    asked = _fields([text_of_argument(one) for one in where or []])
    keys = None if keep_only is None else _keys_of(keep_only, field, format)
    with open_store(store, mode="r") as opened:
        if keep_collection is not None:
            keys = opened.collection(keep_collection).keys
        plan = retention.plan_pruning(
            opened,
            prefixes=space or (),
            where=asked,
            older_than=_seconds("--older-than", older_than),
            unused_for=_seconds("--unused-for", unused_for),
            max_bytes=None if max_bytes is None else nbytes_of("--max-bytes", max_bytes),
            keep_only=keys,
            stride=stride,
            passages=None if keep_only is None else _passages_of(keep_only, field, format, spec, model),
            idle=_seconds("--idle", idle) or 0.0,
            left_behind=SWEEP_SECONDS if left_behind is None else _seconds("--left-behind", left_behind) or 0.0,
        )
    if plan.unfitting:
        notice(_nothing_fits(plan, asked))
    if not as_json:
        _show(plan)
    done: Pruning | None = None
    # What is unfinished in an object store cannot be seen before it is swept.
    if not dry_run and (plan.removals or plan.temporary or left_behind is not None):
        if not (yes or _agreed()):
            say("nothing was deleted")
            return
        with open_standing(store) as opened, Meter("prune", "spaces", show=not quiet) as meter:
            done = retention.prune(opened, plan, progress=meter)
    if as_json:
        print_json({"store": store, "plan": _json(plan), "done": _done(done)})
    elif done is not None:
        _tell(done)
    rest = plan.nbytes - plan.freed if done is None else done.nbytes
    if plan.max_bytes is not None and rest > plan.max_bytes:
        raise OutOfSpaceError(f"{binary(rest)} stay, more than --max-bytes {max_bytes}: {_why_not(plan, done)}")


def _keys_of(source: str, field: str | None, format: str | None) -> NDArray[np.uint8]:
    """Return the keys that a corpus's documents may have: of images and audio those of content and of bytes."""
    with corpus.find_media(source, format) as media:
        if media is None:
            return corpus.keys(source, field, format)
        if field is not None:
            raise UsageError(f"{media.kind} have no fields: leave --field out")
        return media.keys()


def _passages_of(
    source: str, field: str | None, format: str | None, spec: Passages | None, model: str | None
) -> Callable[[Recipe], Keys]:
    """Return what tells the keys of a corpus's passages, by a space's recipe."""

    def keys(recipe: Recipe) -> Keys:
        if spec is None:
            raise ModelError(
                "holds passages of documents: say how they were cut (--passages 128), or keep a collection"
            )
        _, models = recorded_models(model, None)
        from actcache.models.passages import outline_of

        texts = (one.text for one in corpus.read(source, field, format=format))
        return outline_of(models.cutter(recipe, spec), texts).keys

    return keys


def _why_not(plan: PruningPlan, done: Pruning | None) -> str:
    """Say what keeps a store from its budget, and what would help."""
    kept = {**plan.kept, **({} if done is None else done.skipped)}
    pinned = sum(reason == PINNED for reason in kept.values())
    reasons = []
    if pinned:
        reasons.append(f"{counted(pinned, 'space')} pinned (see cachectl unpin)")
    if len(kept) > pinned:
        reasons.append(f"{counted(len(kept) - pinned, 'space')} in use (prune again later, or with --idle 0)")
    return ", ".join(reasons) or "the rest is in spaces that these options do not choose, or in none"


def _agreed() -> bool:
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError("nobody to ask: add --yes to delete this, or --dry-run to look only")
    return typer.confirm("Delete this?", err=True)


def _fields(given: list[str]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise UsageError(f"--where takes FIELD=VALUE, such as layer=6, not {text!r}")
        if fields.setdefault(name, value) != value:
            both = f"{name}={fields[name]} and {text}"
            raise UsageError(f"--where {both}: no space is both; prune by one after the other")
    return fields


def _nothing_fits(plan: PruningPlan, asked: dict[str, str]) -> str:
    """Say why the fields chose no space, and what could be said instead."""
    missed = " and ".join(f"{name}={asked[name]}" for name in plan.unfitting)
    there = [f"{name}={value}" for name, values in plan.unfitting.items() for value in values]
    shown = ", ".join(there[:_MOST]) + (", ..." if len(there) > _MOST else "")
    return f"no space fits --where {missed}; there are {shown or 'none with such a field'}"


def _seconds(name: str, text: str | None) -> float | None:
    if text is None:
        return None
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{name} is a time such as 30d, 12h, 10min or 90s, not {text!r}")
    return float(match[1]) * _SECONDS[match[2]]


def _show(plan: PruningPlan) -> None:
    for removal in plan.removals:
        what = "all" if removal.keys is None else entries(len(removal.keys))
        say(f"delete {removal.fingerprint[:SHORT]}: {what}, {binary(removal.nbytes)} ({removal.why})")
    for fingerprint, why in plan.kept.items():
        say(f"keep   {fingerprint[:SHORT]}: {why}")
    if plan.temporary:
        say(f"delete temporary files: {binary(plan.temporary)}")
    say(f"{binary(plan.nbytes)} now, {binary(plan.nbytes - plan.freed)} afterwards")


def _tell(done: Pruning) -> None:
    for fingerprint, why in done.skipped.items():
        say(f"kept {fingerprint[:SHORT]}: {why}")
    deleted = sum(done.entries.values())
    if deleted:
        say(f"the bytes of deleted entries are given back by compaction; {GRACE_SECONDS:.0f} s later, what it replaced")
    parts = [counted(len(done.spaces), "space"), entries(deleted), counted(done.swept, "temporary file")]
    say(f"deleted {', '.join(parts)}; the store takes {binary(done.nbytes)}")


def _json(plan: PruningPlan) -> dict[str, Any]:
    removals = []
    for one in plan.removals:
        deleted = None if one.keys is None else len(one.keys)
        removals.append(
            {"space": one.fingerprint, **attributes_as_json(one, "nbytes", "why"), "entries": deleted, "removed": True}
        )
    kept = [{"space": fingerprint, "why": why, "removed": False} for fingerprint, why in plan.kept.items()]
    return {"spaces": [*removals, *kept], **attributes_as_json(plan, "temporary", "nbytes", "freed", "max_bytes")}


def _done(done: Pruning | None) -> dict[str, Any] | None:
    if done is None:
        return None
    gone = [{"space": fingerprint, "removed": True} for fingerprint in done.spaces]
    some = [{"space": fingerprint, "removed": True, "entries": count} for fingerprint, count in done.entries.items()]
    left = [{"space": fingerprint, "removed": False, "why": why} for fingerprint, why in done.skipped.items()]
    return {"spaces": [*gone, *some, *left], **attributes_as_json(done, "swept", "nbytes")}

"""``cachectl repair``: what is corrupt goes out of the way, and is computed again where the model is at hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from actcache.admin import inspection
from actcache.admin.display import attributes_as_json, counted, entries
from actcache.cli import corpus, options
from actcache.cli.common import SHORT, ExitCode, by_space, print_json, recorded_models, say, say_failures
from actcache.errors import UsageError
from actcache.io.progress import Meter
from actcache.store.store import open_standing


def repair(
    store: options.Store,
    space: options.Spaces = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Compute what is quarantined again; so does each option below.")
    ] = False,
    model: options.Model = None,
    device: options.Device = None,
    texts: Annotated[
        str | None, typer.Option("--corpus", help="Where the documents are, as for fill.", show_default=False)
    ] = None,
    field: options.Field = None,
    format: options.Format = None,
    stride: Annotated[
        int | None, typer.Option(min=0, help="Of the windows that documents were cut into.", show_default=False)
    ] = None,
    passages: options.Passages = None,
    context: options.Context = None,
    cut_by: options.CutByOption = None,
    least: options.Least = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Verify all entries, and quarantine what is corrupt: it becomes a miss, its bytes are kept aside.

    A fill with the same model computes it again. So does this command where the model is at hand (--recompute): from
    the texts of a --corpus, from token ids that another space of the store holds intact, or from the entry's own where
    they prove to be its document; never from token ids that nothing vouches for. It also looks at what was quarantined
    earlier.

    Exit codes: 4 where a whole space cannot be read (it is left alone), 5 where the model cannot be had or is another.

    Example: cachectl repair ./activations --model ./bert-base-uncased --corpus corpus.txt
    """
    spec = options.passages_of(passages, context, cut_by, least)
    if texts is None and spec is not None:
        raise UsageError("--passages says how documents of a --corpus FILE are cut")
    if texts is None and (field is not None or format is not None):
        raise UsageError("--field and --format are for --corpus FILE")
    if texts is not None:
        _check_corpus(texts, field, format)
    computed = recompute or any(one is not None for one in (model, device, texts, stride))
    if not computed:
        with open_standing(store) as opened, Meter("verify", "entries", show=not quiet) as meter:
            done: Any = inspection.repair(opened, space or (), progress=meter)
    else:
        recomputing, models = recorded_models(model, device)
        documents = None if texts is None else lambda: _documents(texts, field, format)
        with open_standing(store) as opened, Meter("repair", "entries", show=not quiet) as meter:
            done = recomputing.repair_by_recomputing(
                opened, models, space or (), texts=documents, stride=stride or 0, passages=spec, progress=meter
            )
    if as_json:
        spaces = by_space({name: _described(one, computed) for name, one in done.spaces.items()})
        print_json({"store": store, "spaces": spaces, "unreadable": done.unreadable})
    else:
        for name, one in done.spaces.items():
            _show(name[:SHORT], one, computed)
        say_failures(done.unreadable, "left alone")
    if done.unreadable:
        raise typer.Exit(ExitCode.DAMAGED)
    if computed and any(one.unable is not None for one in done.spaces.values()):
        raise typer.Exit(ExitCode.MODEL)


def _check_corpus(source: str, field: str | None, format: str | None) -> None:
    with corpus.find_media(source, format) as media:
        if media is not None:
            if field is not None:
                raise UsageError(f"{media.kind} have no fields: leave --field out")
            return
    if corpus.is_stream(source):
        raise UsageError("--corpus is read once for each space: give a file, no pipe and not standard input")
    corpus.check(source, field, format=format)


def _documents(source: str, field: str | None, format: str | None) -> Iterator[Any]:
    """Yield a corpus's documents; images and audio as they may be keyed, by content and by bytes."""
    with corpus.find_media(source, format) as media:
        if media is not None:
            yield from media.either()
            return
    yield from (one.text for one in corpus.read(source, field, format=format))


def _described(one: Any, computed: bool) -> dict[str, Any]:
    found = attributes_as_json(one, "quarantined", "set_aside")
    if computed:
        found |= {**attributes_as_json(one, "recomputed", "missing", "without_columns"), "not_recomputed": one.unable}
    return found


def _show(name: str, one: Any, computed: bool) -> None:
    if one.quarantined or one.set_aside:
        aside = counted(len(one.set_aside), "segment")
        say(f"{name}: {entries(len(one.quarantined))} quarantined, {aside} set aside")
        if one.set_aside:
            say("  nobody can read what these segments held: a fill of the corpus computes what is missing")
    elif not (computed and (one.recomputed or one.missing)):
        say(f"{name}: intact")
    if computed and (one.recomputed or one.missing):
        say(f"{name}: {len(one.recomputed):,} computed again, {len(one.missing):,} still missing")
        if one.unable is not None:
            say(f"  nothing could be computed: {one.unable}")
        elif one.without_columns:
            said = "their own columns are damaged, too: put them again with these"
            say(f"  {entries(len(one.without_columns))} not computed, for {said}")
        elif one.missing:
            say("  a fill computes them; so does --corpus here (with --stride or --passages, where documents were cut)")

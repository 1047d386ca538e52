"""``cachectl diff``: what a revision of a corpus costs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from actcache.admin.display import binary, fields_as_json
from actcache.cli import corpus, options
from actcache.cli.common import place_of, print_json, quieten_transformers, say
from actcache.errors import UsageError, requires_extra


def diff(
    old: Annotated[str, typer.Argument(help="The corpus as it was, as of fill.", show_default=False)],
    new: Annotated[str, typer.Argument(help="The corpus as it is now.", show_default=False)],
    model: Annotated[str, typer.Option(help="Model id or folder, whose tokenizer counts.")],
    layer: Annotated[
        str | None, typer.Option(help="The layer that is recorded; with --store it is needed, or --site.")
    ] = None,
    site: Annotated[str | None, typer.Option(help="In its place, a module: layers.5.mlp.")] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="A store that has to hold the old corpus, cut in the same way.",
            show_default=False,
        ),
    ] = None,
    passages: options.Passages = None,
    context: options.Context = None,
    cut_by: options.CutByOption = None,
    least: options.Least = None,
    field: options.Field = None,
    format: options.Format = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a document; default: what the model takes.")] = None,
    dtype: options.StoredDtype = None,
    as_json: options.Json = False,
) -> None:
    """Say what a revision of a corpus costs: which tokens are used again, which are computed, and their bytes.

    Whole documents are compared first (long ones in windows): one that has changed is computed anew. With --passages,
    then what is left where they are cut by their content. Nothing is computed, and nothing written. Exit code 3 where
    the old corpus is not in the --store.

    Example: cachectl diff docs-1.0.jsonl docs-1.1.jsonl --field text --model bert-base-uncased --passages 128
    """
    spec = options.passages_of(passages, context, cut_by, least)
    place = place_of(layer, site)
    if store is not None and place is None:
        raise UsageError("with a --store, say which --layer or --site of the model is recorded there")
    for source in (old, new):
        corpus.check(source, field, format=format)
        if corpus.is_stream(source) and spec is not None:
            raise UsageError(f"{source} is read twice: give a file, no pipe and not standard input")
    with requires_extra("models", "diff needs torch and transformers"):
        from actcache.admin.revision import revision

        quieten_transformers()

    def texts(source: str) -> Any:
        return (one.text for one in corpus.read(source, field, format=format))

    known: dict[str, Any] = {"layer": 1 if place is None else place, "dtype": dtype, "max_length": max_length}
    whole = revision(texts(old), texts(new), model, **known, store=None if spec is not None else store)
    cut = None
    if spec is not None:
        cut = revision(texts(old), texts(new), model, **known, too_long=spec, store=store)
    if as_json:
        found = {"whole": fields_as_json(whole, "reused_tokens", "reused")}
        print_json({**found, "passages": None if cut is None else fields_as_json(cut, "reused_tokens", "reused")})
        return
    say(f"{whole.documents:,} documents, {whole.unchanged:,} of them unchanged")
    _show("whole documents", whole)
    if cut is not None:
        _show(f"passages of {spec.max_length if spec is not None else 0} tokens", cut)


def _show(how: str, found: Any) -> None:
    say(
        f"{how}: {found.reused:.1%} of {found.tokens:,} tokens are used again; {found.new_tokens:,} to compute, "
        f"{binary(found.new_nbytes)}; {binary(found.old_nbytes)} of the old ones are used no more"
    )

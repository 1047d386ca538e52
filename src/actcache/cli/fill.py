"""``cachectl fill``: record a corpus."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from actcache import corpus
from actcache.cli.common import JsonOption, QuietOption, binary, say, span
from actcache.errors import DocumentError, MissingExtraError, UsageError
from actcache.store import Store, open_store
from actcache.windows import Windows


class TooLong(StrEnum):
    refuse = "refuse"
    truncate = "truncate"
    windows = "windows"


def fill(
    store: Annotated[
        str, typer.Argument(help="Path or URL of the store; made where it is absent.", show_default=False)
    ],
    source: Annotated[
        Path,
        typer.Argument(
            help="Text file (a document a line); with --field CSV or TSV, by its name, else JSON lines; - for stdin.",
            show_default=False,
        ),
    ],
    model: Annotated[str, typer.Option(help="Model id or folder.")],
    layer: Annotated[int, typer.Option(help="Record the output of this layer, 1 to N-1.")],
    dtype: Annotated[str | None, typer.Option(help="float16, float32 or bfloat16; default: the model's.")] = None,
    field: Annotated[str | None, typer.Option(help="The column or JSON field of the texts.")] = None,
    id_field: Annotated[str | None, typer.Option(help="The column or field of the documents' ids.")] = None,
    collection: Annotated[
        str | None, typer.Option(help="Keep the corpus's order, and ids, as a collection of this name.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a document; default: what the model takes.")] = None,
    too_long: Annotated[TooLong, typer.Option(help="What becomes of longer documents.")] = TooLong.refuse,
    stride: Annotated[int, typer.Option(help="With --too-long windows: tokens that neighbours share.")] = 0,
    token_budget: Annotated[int, typer.Option(help="Padded tokens of a batch.")] = 8192,
    device: Annotated[str | None, typer.Option(help="Where to compute, e.g. cuda:0.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is there, how many bytes and how long it takes; store nothing.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compute and store what is missing of a corpus.

    What is stored already is skipped: an interrupted fill goes on where it was when it is run again.

    Example: cachectl fill ./activations corpus.txt --model bert-base-uncased --layer 6
    """
    try:
        from actcache.forecast import forecast
        from actcache.models.collecting import put_collection
        from actcache.recycler import Recycler
    except ImportError as error:
        raise MissingExtraError(
            f"fill needs torch and transformers: pip install 'actcache[models]' ({error})"
        ) from None
    _quieten_transformers()
    limit: str | Windows = too_long.value
    if stride and too_long is not TooLong.windows:
        raise UsageError("--stride is for --too-long windows")
    if too_long is TooLong.windows:
        if max_length is None:
            raise DocumentError("--too-long windows needs --max-length, the tokens of a window")
        limit = Windows(max_length, stride)
    if collection is not None:
        Store.collection_blob(collection)  # a name that is none is refused before the work, not after it
    corpus.check(source, field, id_field)  # likewise a file that is not there
    documents = corpus.read(source, field, id_field)
    options: dict[str, Any] = {
        "layer": layer,
        "dtype": dtype,
        "device": device,
        "max_length": max_length,
        "too_long": limit,
    }
    if dry_run:
        found = forecast(store, [document.text for document in documents], model, **options)
        _show_forecast(found, as_json)
        return
    seen: list[corpus.Document] = []
    with Recycler.from_pretrained(model, store=store, **options) as recycler:  # the store after the model
        texts = (document.text for document in _noted(documents, seen if collection is not None else None))
        report = recycler.fill(texts, token_budget=token_budget, progress=not quiet)
        fingerprint = recycler.recipe.fingerprint
    if collection is not None:
        with open_store(store) as opened, opened.space(recycler.recipe) as space:
            put_collection(opened, space, collection, seen, limit if isinstance(limit, Windows) else None)
    if as_json:
        print(json.dumps({"space": fingerprint, **dataclasses.asdict(report), "collection": collection}))
        return
    rate = report.tokens / report.seconds if report.seconds else 0.0
    say(
        f"{report.documents:,} documents: {report.computed:,} computed ({report.tokens:,} tokens, "
        f"{rate:,.0f} tokens/s), {report.present:,} were there; space {fingerprint}"
    )


def _show_forecast(found: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
        return
    missing = found.documents - found.present
    say(f"{found.documents:,} documents: {found.present:,} are there, {missing:,} to compute")
    say(f"about {found.tokens:,} tokens, {binary(found.nbytes)}, {span(found.seconds)} of computing")


def _noted(documents: Iterator[corpus.Document], seen: list[corpus.Document] | None) -> Iterator[corpus.Document]:
    for document in documents:
        if seen is not None:
            seen.append(document)
        yield document


def _quieten_transformers() -> None:
    """The command's own messages are few; the library's would bury them."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

"""``cachectl fill``: record a corpus."""

from __future__ import annotations

import dataclasses
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from actcache import corpus
from actcache.cli.common import JsonOption, QuietOption
from actcache.errors import DocumentError, MissingExtraError, UsageError
from actcache.windows import Windows


class TooLong(StrEnum):
    refuse = "refuse"
    truncate = "truncate"
    windows = "windows"


def fill(
    store: Annotated[str, typer.Argument(help="Path or URL of the store; made where it is absent.")],
    source: Annotated[
        Path, typer.Argument(help="Text file (a document a line), JSON lines (with --field), or - for standard input.")
    ],
    model: Annotated[str, typer.Option(help="Model id or folder.")],
    layer: Annotated[int, typer.Option(help="Record the output of this layer, 1 to N-1.")],
    dtype: Annotated[str | None, typer.Option(help="float16, float32 or bfloat16; default: the model's.")] = None,
    field: Annotated[str | None, typer.Option(help="Lines are JSON objects; take this field.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a document; default: what the model takes.")] = None,
    too_long: Annotated[TooLong, typer.Option(help="What becomes of longer documents.")] = TooLong.refuse,
    stride: Annotated[int, typer.Option(help="With --too-long windows: tokens that neighbours share.")] = 0,
    token_budget: Annotated[int, typer.Option(help="Padded tokens of a batch.")] = 8192,
    device: Annotated[str | None, typer.Option(help="Where to compute, e.g. cuda:0.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compute and store what is missing of a corpus.

    What is stored already is skipped: an interrupted fill goes on where it was when it is run again.

    Example: cachectl fill ./activations corpus.txt --model bert-base-uncased --layer 6
    """
    try:
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
    with (
        corpus.opened(source) as file,
        Recycler.from_pretrained(
            model, layer=layer, store=store, dtype=dtype, device=device, max_length=max_length, too_long=limit
        ) as recycler,
    ):
        report = recycler.fill(corpus.documents(file, field), token_budget=token_budget, progress=not quiet)
        fingerprint = recycler.recipe.fingerprint
    result = {"space": fingerprint, **dataclasses.asdict(report)}
    if as_json:
        print(json.dumps(result))
        return
    rate = report.tokens / report.seconds if report.seconds else 0.0
    Console().print(
        f"{report.documents:,} documents: {report.computed:,} computed ({report.tokens:,} tokens, "
        f"{rate:,.0f} tokens/s), {report.present:,} were there; space {fingerprint}",
        highlight=False,
        soft_wrap=True,
    )


def _quieten_transformers() -> None:
    """The command's own messages are few; the library's would bury them."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

"""Arguments and options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

from actcache.cli.corpus import Kind

Store = Annotated[str, typer.Argument(help="Path or URL of the store.", show_default=False)]
NewStore = Annotated[str, typer.Argument(help="Path or URL of the store; made where it is absent.", show_default=False)]
Spaces = Annotated[
    list[str] | None, typer.Option("--space", help="Only the space whose fingerprint begins so; may be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Field = Annotated[
    str | None, typer.Option(help="The column or JSON field of the corpus's texts; without one, lines are the texts.")
]
Format = Annotated[
    Kind | None,
    typer.Option(
        "--format",
        help="What the corpus's files hold, where their names do not say so; text: lines, whatever they hold.",
    ),
]
Model = Annotated[
    str | None, typer.Option(help="Where the model is; default: the id or folder that each space's recipe names.")
]
Device = Annotated[str | None, typer.Option(help="Where to compute, e.g. cuda:0.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]

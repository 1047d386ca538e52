"""Arguments and options that several commands take."""

from __future__ import annotations

import contextlib
import enum
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.models import OptionInfo

from actcache.cli.corpus import Kind
from actcache.errors import UsageError
from actcache.format.passages import By
from actcache.format.passages import Passages as Spec


def _typed_store(ctx: typer.Context) -> str:
    """Return the store, the first of the arguments; they are not yet told apart where an option lacks its value."""
    return ctx.params.get("store") or next(word for word in ctx.args if not word.startswith("-"))


def complete_spaces(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the spaces of the store that was typed before, for completion; none where it cannot be read."""
    with contextlib.suppress(Exception):  # a shell that completes shows no errors
        from actcache.store.store import open_store

        with open_store(_typed_store(ctx), mode="r") as opened:
            return [
                (one.fingerprint, f"{one.model} {one.site_name} {one.stored_as}")
                for one in opened.recipes()
                if one.fingerprint.startswith(incomplete)
            ]
    return []


def complete_pinned(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the spaces of that store which are pinned; none where it cannot be read."""
    with contextlib.suppress(Exception):
        from actcache.admin.retention import is_pinned
        from actcache.store.store import open_store

        with open_store(_typed_store(ctx), mode="r") as opened:
            files = opened.driver.listing()
        return [one for one in complete_spaces(ctx, incomplete) if is_pinned(files, one[0])]
    return []


def complete_collections(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the collections of the store that was typed before; none where it cannot be read."""
    with contextlib.suppress(Exception):
        from actcache.store.store import open_store

        with open_store(_typed_store(ctx), mode="r") as opened:
            return [name for name in opened.collections() if name.startswith(incomplete)]
    return []


def complete_dtypes(incomplete: str) -> list[str]:
    """Return how rows may be stored."""
    from actcache.format.codec import names

    return [name for name in names() if name.startswith(incomplete)]


StoredDtype = Annotated[
    str | None,
    typer.Option(help="How rows are stored: float16, int8, ...; default: the model's.", autocompletion=complete_dtypes),
]


Store = Annotated[str, typer.Argument(help="Path or URL of the store.", show_default=False)]
NewStore = Annotated[str, typer.Argument(help="Path or URL of the store; made where it is absent.", show_default=False)]
Spaces = Annotated[
    list[str] | None,
    typer.Option(
        "--space",
        help="Only the space whose fingerprint begins so; may be repeated.",
        autocompletion=complete_spaces,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Field = Annotated[
    str | None, typer.Option(help="The column or JSON field of the corpus's texts; without one, lines are the texts.")
]
Format = Annotated[
    Kind | None,
    typer.Option(
        "--format",
        help="What the corpus's files hold, where their names do not say so; text: lines, whatever they hold; images, "
        "audio: of a folder those alone.",
    ),
]
Model = Annotated[
    str | None, typer.Option(help="Where the model is; default: the id or folder that each space's recipe names.")
]
Device = Annotated[str | None, typer.Option(help="Where to compute, e.g. cuda:0.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


class CutBy(enum.StrEnum):
    paragraphs = "paragraphs"
    sentences = "sentences"
    tokens = "tokens"


Passages = Annotated[
    int | None,
    typer.Option(
        "--passages",
        help="Cut documents where their content says so, into passages of at most so many tokens: what a revision "
        "leaves unchanged, or several documents have, is computed and stored once.",
    ),
]
Context = Annotated[
    int | None, typer.Option("--context", help="With --passages: tokens of a passage's neighbours on either side.")
]
CutByOption = Annotated[
    CutBy | None, typer.Option("--cut-by", help="With --passages: where to cut; default: paragraphs.")
]
Least = Annotated[
    int | None, typer.Option("--least", help="With --passages: own tokens of one; default: a quarter of the most.")
]


def passages_of(length: int | None, context: int | None, cut_by: CutBy | None, least: int | None) -> Spec | None:
    """Return how documents are cut into passages, None where they are not.

    Raises:
        UsageError: only how was said.
        DocumentError: see ``Passages``.
    """
    if length is None:
        given = {"--context": context, "--cut-by": cut_by, "--least": least}
        for name, value in given.items():
            if value is not None:
                raise UsageError(f"{name} is for passages: say how long they are (--passages 128)")
        return None
    by: By = "paragraphs" if cut_by is None else cut_by.value
    return Spec(length, context or 0, by, least)


def plain(kind: Any) -> Any:
    """Return a type without ``| None``."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        (kind,) = (one for one in typing.get_args(kind) if one is not types.NoneType)
    return kind


def is_list(kind: Any) -> bool:
    return typing.get_origin(plain(kind)) is list


def value_name(kind: Any) -> str:
    """Return what help calls the value of an option of some type; empty for a switch."""
    one = plain(kind)
    one = typing.get_args(one)[0] if is_list(one) else one
    if one is bool:
        return ""
    if isinstance(one, type) and issubclass(one, enum.Enum):
        return "|".join(member.value for member in one)
    return {int: "NUMBER", float: "NUMBER", Path: "PATH"}.get(one, "TEXT")


def name_values(command: Callable[..., None]) -> None:
    """Have a command's help show values by people's words, where typer would show types of Python's."""
    hints = typing.get_type_hints(command, include_extras=True)
    command.__annotations__ = hints  # evaluated once, so that typer sees the same objects
    for hint in hints.values():
        kind, *notes = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        for info in notes:
            if isinstance(info, OptionInfo) and info.metavar is None:
                info.metavar = value_name(kind)

"""What the commands that compute entries again share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from actcache.errors import MissingExtraError

ModelOption = Annotated[
    str | None, typer.Option(help="Where the model is; default: the id or folder that each space's recipe names.")
]
DeviceOption = Annotated[str | None, typer.Option(help="Where to compute, e.g. cuda:0.")]


def recorded_models(model: str | None, device: str | None) -> tuple[Any, Any]:
    """Return the library's part, which needs torch, and the models that it is to find.

    Raises:
        MissingExtraError: torch or transformers are not installed.
    """
    try:
        from transformers.utils import logging

        from actcache.admin import recompute
    except ImportError as error:
        raise MissingExtraError(
            f"computing entries again needs torch and transformers: pip install 'actcache[models]' ({error})"
        ) from None
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its messages would bury the command's few
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return recompute, recompute.RecordedModels(model, device=device)

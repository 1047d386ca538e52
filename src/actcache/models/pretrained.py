"""Loading a pretrained base model and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
)

from actcache.errors import ModelError
from actcache.format.arguments import truth
from actcache.models.discovery import main_input_of
from actcache.models.families import base_model_of, family_of
from actcache.models.processing import takes_features
from actcache.models.sites import Where, expanded
from actcache.models.weights import pretrained_digests, weight_files


def load_pretrained(
    name_or_path: str | Path,
    sites: Sequence[Where],
    device: str | torch.device | None,
    revision: str | None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Load base model and tokenizer as ``Recycler.from_pretrained`` does, and learn the digests of these sites."""
    trusted = truth("trust_remote_code", trust_remote_code)
    name = str(name_or_path)
    # Said in any case: where nothing is said, transformers asks whoever sits at the terminal.
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trusted}
    try:
        options = {} if dtype is None else {"dtype": dtype}
        model = AutoModel.from_pretrained(name, **source, **options).eval()
        kind: Any = AutoTokenizer
        if takes_features(model):
            kind = AutoImageProcessor if main_input_of(model) == "pixel_values" else AutoFeatureExtractor
        tokenizer = kind.from_pretrained(name, **source)
    except Exception as error:  # of transformers, safetensors, tokenizers, the hub, ...
        if not trusted and "trust_remote_code" in str(error):
            raise ModelError(
                f"{name} brings code of its own, which would be run on this machine: read it, and where you trust it "
                "say so in Python, Recycler.from_pretrained(..., trust_remote_code=True)"
            ) from error
        raise ModelError(f"{name} cannot be loaded: {_first_line(error)}") from error
    base = base_model_of(model)
    family = family_of(base)
    if sites:
        # The digests stay known within the process, so that a recycler does not compute them again.
        pretrained_digests(base, family, expanded(base, family, sites), weight_files(name, revision))
    try:
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:  # the second where torch was built without CUDA
        raise ModelError(f"{name} cannot be moved to the device {device}: {_first_line(error)}") from error
    return model, tokenizer


def load_tokenizer(name_or_path: str | Path, revision: str | None = None) -> Any:
    """Load a tokenizer alone; raises ``ModelError``."""
    try:
        return AutoTokenizer.from_pretrained(str(name_or_path), revision=revision, trust_remote_code=False)
    except Exception as error:  # of transformers, tokenizers, the hub, ...
        raise ModelError(f"the tokenizer of {name_or_path} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__

"""Where a space's numbers come from: recorded with it, and compared by way of canaries when it differs."""

from __future__ import annotations

import functools
import getpass
import importlib.metadata
import os
import platform
from datetime import UTC, datetime

import torch
from transformers import PreTrainedModel

from actcache.models.discovery import main_input_of
from actcache.models.lower_half import LowerHalf

_LIBRARIES = ("torch", "transformers", "tokenizers", "actcache")


def setup_of(lower: LowerHalf) -> dict[str, str]:
    """Return what may change the numbers of one identity: library versions, device, kernels."""
    device = lower.device
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else ""
    return {
        **{name: _version(name) for name in _LIBRARIES},
        **({"pillow": _version("pillow")} if main_input_of(lower.base_model) == "pixel_values" else {}),
        "python": platform.python_version(),
        "device": f"{device.type} {hardware}".strip(),
        "attention": str(getattr(lower.base_model.config, "_attn_implementation", "")),
        "weights_dtype": lower.parameter_dtype,
        "matmul_precision": _matmul_precision(device.type),
    }


def origin() -> dict[str, str]:
    """Return who makes a space, and when (UTC)."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    return {"made_by": f"{user}@{platform.node()}", "made_at": datetime.now(UTC).isoformat(timespec="seconds")}


def revision_of(base_model: PreTrainedModel) -> dict[str, str]:
    """Return the model's commit on the hub, where it is known."""
    revision = getattr(base_model.config, "_commit_hash", None)
    return {"revision": str(revision)} if revision else {}


def _matmul_precision(device_type: str) -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by the newer way, for each kind of device, which this one cannot express
        backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
        return str(backend.matmul.fp32_precision)


@functools.cache
def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"

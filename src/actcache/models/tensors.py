"""State dicts as safetensors takes them."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def unshared(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict's tensors on the CPU, contiguous, each with memory of its own; copied where they have not."""
    result: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        result[name] = plain
    return result

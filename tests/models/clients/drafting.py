"""A tiny Qwen3, some samples of it, and what ``speculators train`` needs on a machine without an accelerator.

Run as a script it is ``speculators``: its own command with two things changed, which have nothing to do with where
samples come from. speculators 0.9 knows no device but an accelerator, so it is told that rank 0's is the CPU; and
torchvision and torchaudio, whose builds for other torches break the import of transformers, are taken for not
installed. (Its fused losses are kernels of Triton: tests pass ``--loss-implementation eager``.)
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

HIDDEN, LAYERS, VOCABULARY = 32, 4, 64
SITES = [1, 2, 3, 4]  # the last one before the final norm


def save_verifier(folder: Path) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def samples(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, int(rng.integers(8, 24))) for _ in range(count)]


def hidden_states(verifier: Path, ids: np.ndarray) -> torch.Tensor:
    """The rows that vLLM would give, ``[tokens, layers, hidden]``: each layer's output, none of them normalized."""
    from transformers import AutoModelForCausalLM

    if verifier not in _loaded:
        _loaded[verifier] = AutoModelForCausalLM.from_pretrained(verifier).eval()
    model, seen = _loaded[verifier], []
    hooks = [layer.register_forward_hook(lambda _, args, out: seen.append(out)) for layer in model.model.layers]
    try:
        with torch.no_grad():
            model(torch.from_numpy(ids)[None])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([(out[0] if isinstance(out, tuple) else out)[0] for out in seen], dim=1)


_loaded: dict[Path, Any] = {}


def on_a_cpu() -> None:
    for name in ("torchvision", "torchaudio"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    torch.accelerator.synchronize = lambda *_: None  # type: ignore[assignment]
    from speculators.train import trainer

    trainer.get_local_rank = lambda: cpu  # it is what modules and batches are moved to


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    on_a_cpu()
    from actcache.models.clients.speculators.__main__ import app

    app(prog_name="speculators")

"""A document's rows are those that it has alone, whatever else is in its batch; models of which that is not true."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from actcache.errors import RecipeError, UnsupportedModelError
from actcache.models import DocumentEncoder, LowerHalf, canary, family_of
from actcache.models.families import Family
from actcache.models.recycler import Recycler
from actcache.models.tokenizing import check_max_length
from tests.models.test_identity import word_tokenizer
from tests.models.zoo import KINDS

THETA = {"rope_theta": 1e4}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}
LONG_ROPE = {
    "rope_type": "longrope",
    "long_factor": [4.0] * 4,
    "short_factor": [1.0] * 4,
    "original_max_position_embeddings": 16,
    **THETA,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(**options: Any) -> PreTrainedModel:
    return KINDS["llama"].make(AutoModel, "sdpa", max_position_embeddings=64, **options)


def spread(model: PreTrainedModel) -> float:
    """The largest relative difference of a document's rows alone and in a long mixed batch."""
    lower = LowerHalf(model, family_of(model), 2)
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 90, tokens) for tokens in (5, 37, 3, 60, 1)]
    together = lower.run(documents)
    alone = [lower.run([document])[0] for document in documents]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.filterwarnings("ignore")
def test_rotary_embeddings_that_do_not_look_at_the_batch(name: str, rope: str) -> None:
    parameters: dict[str, Any] = {"rope_type": rope, **THETA, **ROPES[rope]}
    if name == "gemma3":
        parameters = {"full_attention": parameters, "sliding_attention": {"rope_type": "default", **THETA}}
    model = KINDS[name].make(AutoModel, "sdpa", max_position_embeddings=64, rope_parameters=parameters)
    assert spread(model) < 2e-6


def test_longrope_is_refused_by_name_and_by_running(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(rope_parameters=LONG_ROPE)
    with pytest.raises(UnsupportedModelError, match="longrope"):
        LowerHalf(model, family_of(model), 2)
    monkeypatch.setattr(Family, "check_alone", lambda self, model: None)
    assert spread(model) > 1e-2
    lower = LowerHalf(model, family_of(model), 2)
    with pytest.raises(UnsupportedModelError, match="by the others of its batch"):
        canary.make(DocumentEncoder(word_tokenizer(), 64), lower, {})


def test_dynamic_rope_is_held_off_by_the_limit_on_length() -> None:
    model = llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, **THETA})
    lower = LowerHalf(model, family_of(model), 2)
    short, long = np.arange(8) + 3, np.arange(200) % 90 + 3
    alone, together = lower.run([short])[0], lower.run([short, long])[0]
    assert np.linalg.norm(alone - together) > 1e-2 * np.linalg.norm(alone)  # beyond 64 tokens it looks at the batch
    with pytest.raises(RecipeError, match="more than the 64 tokens"):
        check_max_length(200, word_tokenizer(), family_of(model).max_tokens(model.config))
    model.config.max_position_embeddings = 256  # then it computes as one that was made for so many
    assert spread(model) < 2e-6
    np.testing.assert_allclose(lower.run([short])[0], lower.run([short, long])[0], atol=1e-5)


def test_feed_forward_layers_in_chunks() -> None:
    model = KINDS["bert"].make(AutoModel, chunk_size_feed_forward=2)
    with pytest.raises(UnsupportedModelError, match="chunk_size_feed_forward=0"):
        LowerHalf(model, family_of(model), 2)


class Capacity(nn.Module):
    """A layer like an expert with room for so many tokens of a batch: what comes later passes by."""

    def __init__(self, layer: nn.Module, room: int) -> None:
        super().__init__()
        self.layer, self.room = layer, room

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = self.layer(hidden, *args, **kwargs)
        served = torch.arange(out[..., 0].numel()).reshape(out.shape[:-1]) < self.room
        return torch.where(served[..., None], out, hidden)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("what", ["one scale for a batch", "room for so many tokens"])
def test_what_no_name_tells_shows_by_running(what: str, tmp_path: Any) -> None:
    model = KINDS["bert"].make(AutoModel, max_position_embeddings=128)
    if what == "one scale for a batch":
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    else:
        model.encoder.layer[0] = Capacity(model.encoder.layer[0], 150)
    with Recycler(model.eval(), word_tokenizer(), layer=2, store=tmp_path / "store", max_length=128) as recycler:
        with pytest.raises(UnsupportedModelError, match="by the others of its batch"):
            recycler.fill(["text"], progress=False)
        assert len(recycler.space) == 0

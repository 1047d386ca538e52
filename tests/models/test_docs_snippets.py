"""Every snippet of Python in the docs runs: here, on tiny models in the place of those named, or in a test beside."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import numpy as np
import pytest
import torch
import transformers

import actcache
from tests.models.zoo import KINDS
from tests.support import ROOT
from tests.support.tiny import HIDDEN, save_tiny

DOCS = ROOT / "docs"
TEXTS = [f"{word} is document {i}" for i, word in enumerate(["la", "li li", "lo lo lo"] * 8)]

AUTO = ("AutoTokenizer", "AutoModelForSequenceClassification", "AutoModelForSeq2SeqLM")

#: Pages whose snippets run elsewhere.
ELSEWHERE = {
    "quickstart": "tests/models/test_snippets.py",
    "reader": "tests/reader/test_docs.py",
    "corpora": "tests/cli/test_corpus_docs.py",
    "inspecting": "tests/cli/test_inspect_docs.py",
    "watching": "tests/io/test_metrics.py",
    "pruning": "tests/models/vocabulary/test_docs.py",
    "format": "tests/golden/test_golden.py",
    "examples/quickstart": "tests/models/test_examples.py",
    "examples/every-layer": "tests/models/test_examples.py",
    "examples/sparse-autoencoder": "tests/models/test_examples.py",
}
#: Snippets that need another library, files or machines: the tests that do the same with them.
WITH_OTHERS = {
    ("recipes/train-sae", 0): "tests/models/clients/test_sae_lens.py",
    ("recipes/train-sae", 2): "tests/models/clients/test_dictionary_learning.py",
    ("recipes/train-eagle3", 0): "tests/models/clients/test_draft_samples.py",
    ("recipes/embed-and-retrieve", 0): "tests/models/clients/test_sentence_transformers.py",
    ("documents", 2): "tests/models/test_media.py",
    ("cluster", 1): "tests/models/cluster/test_ray.py",
    ("cluster", 2): "tests/models/test_torchrun.py",
    ("object-stores", 0): "tests/segments/objects/test_schemes.py",
}
#: What is not said in the page, or was said in words: run before a snippet, by its number on the page.
BEFORE = {
    "codecs": {0: ""},
    "cross-model": {
        0: "labels = [i % 3 for i in range(len(texts))]",
        1: """
recycler = actcache.Recycler.from_pretrained("bert-base-uncased", layer=6, store="./activations")
recycler.fill(texts)
task = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=3)
""",
        2: """
trained, small_task, store = task, task, actcache.open("./activations")
tokenizer = AutoTokenizer.from_pretrained("bert-base-uncased")
""",
    },
    "documents": {
        0: """
import pandas
recycler = actcache.Recycler.from_pretrained("bert-base-uncased", layer=6, store="./activations")
frame = pandas.DataFrame({"text": texts})
ids = [recycler.agreement.encoder.encode([text])[0][0].token_ids for text in texts]
dataset = [{"question": a, "context": b, "input_ids": c, "loss_mask": c > 5, "labels": c}
           for a, b, c in zip(texts, texts[::-1], ids)]
open("lines.txt", "w").write("la\\nli\\n")
file = open("lines.txt")
""",
        1: """
recycler.agreement.encoder.tokenizer.chat_template = (
    "{% for one in messages %}{% if one.role == 'assistant' %}{% generation %}{{ one.content }}{% endgeneration %}"
    "{% else %}{{ one.content }}{% endif %} {% endfor %}")
dataset = [{"messages": [{"role": "user", "content": "la"}, {"role": "assistant", "content": text}]} for text in texts]
""",
        3: """
space = actcache.open("./others").space(recycler.recipe)
keys, ids = [actcache.document_key(text) for text in texts[:2]], np.arange(5)
values, offsets = np.ones((5, recycler.recipe.hidden_size), np.float32), np.array([0, 2, 5])
""",
    },
    "rows": {
        0: """
recyclers = actcache.Recyclers.from_pretrained("bert-base-uncased", layers=[3, 6], store="./activations")
recyclers.fill(texts)
recycler, space = recyclers[6], recyclers[6].space
keys = recycler.keys(texts)
""",
        1: """
store = actcache.open("./others")
space = store.space(recycler.recipe)
entries = recycler.space.get(keys)
arrays, ids = [one.activations for one in entries], [one.token_ids for one in entries]
masks, labels = [one > 5 for one in ids], ids
""",
        2: """
from sklearn.linear_model import LogisticRegression
labels = [i % 2 for i in range(len(texts))]
""",
    },
    "passages": {
        0: "labels = [i % 3 for i in range(len(texts))]",
        1: """
recycler = actcache.Recycler.from_pretrained("bert-base-uncased", layer=6, store="./activations", too_long=cut)
text = texts[0]
""",
        2: 'store = actcache.open("./activations")',
    },
    "sites": {0: 'store = actcache.open("./activations")', 2: 'prompts = ["la li", "lo"]'},
    "cluster": {
        0: """
recycler = actcache.Recycler.from_pretrained("bert-base-uncased", layer=6, store="./activations")
reports = [recycler.fill(texts, partition=(share, 2)) for share in range(2)]
""",
    },
    "models": {
        1: 'task_model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=3)',
    },
    "recipes/train-sae": {
        1: """
recycler = actcache.Recycler.from_pretrained("bert-base-uncased", layer=6, store="./activations")
recycler.fill([text + " la" * 200 for text in texts])
space = recycler.space
""",
    },
    "training": {
        1: "recycler.fill(texts); labels = [i % 3 for i in range(len(texts))]",
        2: """
from transformers import Trainer, TrainingArguments
arguments = TrainingArguments("out", max_steps=2, report_to=[], use_cpu=True, remove_unused_columns=False)
""",
        4: "import peft",
        5: """
tasks = [AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=3) for _ in range(2)]
task, topics, venues = tasks[0], np.arange(len(texts)) % 3, np.arange(len(texts)) % 2
models = [add_adapters(recycler.reduce(one)) for one in tasks]
optimizers = [torch.optim.SGD([p for p in one.parameters() if p.requires_grad], 0.1) for one in models]
""",
        6: "labels = topics",
        7: """
recyclers = actcache.Recyclers.from_pretrained("bert-base-uncased", layers=[3, 9], store=store)
recyclers.fill(texts)
""",
        8: """
from types import SimpleNamespace
from bench.ner import KINDS, token_labels
before, options = recycler, {"layer": 5, "store": store, "extras": ["spans"]}
recycler = actcache.Recycler.from_pretrained("bert-base-uncased", **options)
recycler.fill(texts)
chosen = [SimpleNamespace(names=[(0, 2, KINDS[0])]) for _ in texts]
""",
        9: """
from transformers import AutoModelForQuestionAnswering
recycler, pairs = before, list(zip(texts, texts[::-1]))
recycler.fill(pairs)
answers = np.array([[1, 2]] * len(pairs))
""",
        10: """
from transformers import AutoModelForPreTraining
reduced = recycler.reduce(AutoModelForPreTraining.from_pretrained("bert-base-uncased"))
ids = [entry.token_ids.astype(int) for entry in recycler.space.get(recycler.keys(texts))]
follows = torch.zeros(len(texts), dtype=torch.long)
batch = next(iter(recycler.reader(texts, labels=ids)))
""",
        11: """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
model = recycler.reduce(task)
reader, optimizer = recycler.reader(texts, labels=labels_of), torch.optim.SGD(model.parameters(), 0.1)
""",
        12: """
space, other_space = recycler.space, actcache.open("./other").space(recycler.recipe)
""",
        13: """
task = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=3)
reduced = recycler.reduce(task)
""",
    },
}
BEFORE["training"][11] = BEFORE["training"][11].replace("labels_of", "[i % 3 for i in range(len(texts))]")
#: What stands for what is not at hand.
INSTEAD = {
    'device="cuda"': 'device="cpu"',
    '.to("cuda")': '.to("cpu")',
    "forever=True": "forever=False",
    ".map(...)": ".map(lambda one: one)",
    "WeightedPooling(layers, 768, 3)": f"WeightedPooling(layers, {HIDDEN}, 3)",
    "context_size=128": "context_size=32",
}


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of the kinds, and with the layers, that the docs name; all with one tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    made = {"bert-base-uncased": save_tiny(folder / "bert")}
    tokenizer = transformers.AutoTokenizer.from_pretrained(made["bert-base-uncased"])
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    auto, text_to_text = transformers.AutoModel, transformers.AutoModelForSeq2SeqLM
    given = {
        "bert-base-uncased": ("bert", auto, {**sizes, "num_hidden_layers": 12}),
        "distilbert-base-uncased": ("bert", auto, {**sizes, "num_hidden_layers": 2, "hidden_size": 16}),
        "Qwen/Qwen3-0.6B": ("qwen3", auto, {**sizes, "num_hidden_layers": 28}),
        "google-t5/t5-small": ("t5", text_to_text, {"vocab_size": len(tokenizer)}),
    }
    for name, (kind, head, options) in given.items():
        made[name] = folder / name.rpartition("/")[2]
        KINDS[kind].make(head, None, **options).save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


def test_every_page_is_run_somewhere() -> None:
    pages = {
        str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md") if "decisions" not in path.parts
    }
    having = {page for page in pages if snippets(page)}
    assert having == {*ELSEWHERE, *BEFORE, *(page for page, _ in WITH_OTHERS)}
    for test in {*ELSEWHERE.values(), *WITH_OTHERS.values()}:
        assert (ROOT / test).exists(), test


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("page", sorted(BEFORE))
def test_the_snippets_run(page: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"actcache": actcache, "torch": torch, "np": np, "texts": list(TEXTS)}
    names |= {name: getattr(actcache, name) for name in ("Recycler", "Recyclers")}
    names |= {name: getattr(transformers, name) for name in AUTO}
    instead = {f'"{name}"': repr(str(path)) for name, path in models.items()} | INSTEAD
    ran = 0
    for number, code in enumerate(snippets(page)):
        if (page, number) in WITH_OTHERS:
            continue
        ran += 1
        whole = BEFORE[page].get(number, "") + "\n" + code
        for old, new in instead.items():
            whole = whole.replace(old, new)
        try:
            exec(compile(whole, f"{page}.md, snippet {number}", "exec"), names)
        except Exception as error:
            raise AssertionError(f"docs/{page}.md, snippet {number}: {type(error).__name__}: {error}") from error
    assert ran

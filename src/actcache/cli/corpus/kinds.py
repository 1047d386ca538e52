"""What the name of a file says about what is in it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath

from actcache.errors import DocumentError


class Kind(StrEnum):
    """What a corpus file holds."""

    text = "text"
    jsonl = "jsonl"
    json = "json"
    csv = "csv"
    tsv = "tsv"
    parquet = "parquet"
    arrow = "arrow"


#: Kinds that pyarrow reads. They have a compression of their own inside.
COLUMNAR = (Kind.parquet, Kind.arrow)

#: Compressions of whole files by their suffixes.
COMPRESSIONS = {".gz": "gzip", ".gzip": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}

_SUFFIXES = {
    ".txt": Kind.text,
    ".text": Kind.text,
    ".jsonl": Kind.jsonl,
    ".ndjson": Kind.jsonl,
    ".json": Kind.json,
    ".csv": Kind.csv,
    ".tsv": Kind.tsv,
    ".parquet": Kind.parquet,
    ".pq": Kind.parquet,
    ".arrow": Kind.arrow,
    ".feather": Kind.arrow,
}
#: Packings that nothing here reads. Their bytes are no lines, whatever stands before them in the name.
_FOREIGN = {".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4", ".lzma", ".br", ".snappy", ".z"}


@dataclass(frozen=True)
class Form:
    """What a name says: the kind, None where it says none, and the compression, None where there is none."""

    kind: Kind | None
    compression: str | None


def form(name: str) -> Form:
    """Return what a name says.

    Raises:
        DocumentError: nothing here reads such files.
    """
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    last = suffixes[-2:-1] if compression else suffixes[-1:]
    if last and last[0] in _FOREIGN:
        raise DocumentError(f"{name}: {last[0]} files are not read; unpack it, or pack it as .gz, .bz2, .xz or .zst")
    kind = _SUFFIXES.get(last[0]) if last else None
    if compression is not None and kind in COLUMNAR:
        raise DocumentError(f"{name}: a {kind} file is compressed inside; decompress this one first")
    return Form(kind, compression)


def belongs(name: str) -> bool:
    """Return whether a file in a folder, by its name, is one of a corpus."""
    try:
        return form(name).kind is not None
    except DocumentError:
        return True  # it would be missed: whoever reads it says why it is not read

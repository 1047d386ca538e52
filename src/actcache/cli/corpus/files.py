"""The files of a corpus: where they lie, here or in an object store, and what their names say about what is in them."""

from __future__ import annotations

import glob
import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING

from actcache.errors import DocumentError, MissingExtraError
from actcache.segments.places.local_place import local_path

if TYPE_CHECKING:
    from actcache.segments.places.objects.buckets import Bucket, Found

STANDARD_INPUT = "-"

#: What names the files of a dataset that ``save_to_disk`` wrote, and its splits.
STATE, SPLITS = "state.json", "dataset_dict.json"


class Kind(StrEnum):
    """What a corpus file holds."""

    text = "text"
    jsonl = "jsonl"
    json = "json"
    csv = "csv"
    tsv = "tsv"
    parquet = "parquet"
    arrow = "arrow"
    images = "images"
    audio = "audio"


#: Kinds of which a document is a file, as ``actcache.cli.corpus.media`` reads them.
MEDIA = (Kind.images, Kind.audio)

#: Kinds that pyarrow reads. They have a compression of their own inside.
COLUMNAR = (Kind.parquet, Kind.arrow)

#: Compressions of whole files by their suffixes.
COMPRESSIONS = {".gz": "gzip", ".gzip": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}

_OTHER_SUFFIXES = {".txt": Kind.text, ".ndjson": Kind.jsonl, ".pq": Kind.parquet, ".feather": Kind.arrow}
_SUFFIXES = {f".{kind}": kind for kind in Kind if kind not in MEDIA} | _OTHER_SUFFIXES
#: Packings that nothing here reads. Their bytes are no lines, whatever stands before them in the name.
_FOREIGN = {".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4", ".lzma", ".br", ".snappy", ".z"}


@dataclass(frozen=True)
class Form:
    """What a name says: the kind, None where it says none, and the compression, None where there is none."""

    kind: Kind | None
    compression: str | None


def form(name: str) -> Form:
    """Return what a name says."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    last = suffixes[-2:-1] if compression else suffixes[-1:]
    if last and last[0] in _FOREIGN:
        raise DocumentError(f"{name}: {last[0]} files are not read; unpack it, or pack it as .gz, .bz2, .xz or .zst")
    kind = _SUFFIXES.get(last[0]) if last else None
    if compression is not None and kind in COLUMNAR:
        raise DocumentError(f"{name}: a {kind} file is compressed inside; decompress this one first")
    return Form(kind, compression)


def is_corpus_file(name: str) -> bool:
    """Return whether a file in a folder, by its name, is one of a corpus."""
    try:
        return form(name).kind is not None
    except DocumentError:
        return True  # it would be missed: whoever reads it says why it is not read


# --- places -----------------------------------------------------------------------------------------------------------


class File(ABC):
    """A file of a corpus. ``str()`` of it is for messages."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Its path, of which the suffixes tell what is in it."""

    @abstractmethod
    def open(self) -> io.BufferedReader:
        """Open it to read; an ``OSError`` says why it cannot be."""

    @property
    def path(self) -> Path | None:
        """The regular file of this machine that it is; None for pipes and objects."""
        return None

    @property
    def is_stream(self) -> bool:
        """Whether what was read is gone: a pipe, or standard input."""
        return False

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class LocalFile(File):
    location: Path

    @property
    def name(self) -> str:
        return str(self.location)

    @property
    def path(self) -> Path | None:
        return None if self.is_stream else self.location

    @property
    def is_stream(self) -> bool:
        try:
            return not stat.S_ISREG(self.location.stat().st_mode)
        except OSError:
            return False  # whoever opens it says why it cannot be read

    def open(self) -> io.BufferedReader:
        return open(self.location, "rb")


class StandardInput(File):
    name = STANDARD_INPUT
    is_stream = True

    def open(self) -> io.BufferedReader:
        return open(os.dup(0), "rb")

    def __str__(self) -> str:
        return "standard input"


@dataclass(frozen=True)
class RemoteFile(File):
    bucket: Bucket
    key: str

    @property
    def name(self) -> str:
        return f"{self.bucket.where}/{self.key}"

    def open(self) -> io.BufferedReader:
        return self.bucket.open(self.key)


@dataclass(frozen=True)
class Folder:
    """The files below a folder, by their order; hidden ones left out, and what begins with ``_``."""

    name: str
    files: list[File]
    chosen: bool  # whether a pattern chose them

    def file(self, name: str) -> File | None:
        """Return the file that lies in it under this name."""
        wanted = PurePosixPath(self.name, name)
        return next((file for file in self.files if PurePosixPath(file.name) == wanted), None)


@contextmanager
def find_source(source: str) -> Iterator[File | Folder]:
    """Find what a source names; its files can be opened as long as this lasts."""
    protocol, remote, rest = source.partition("://")
    if remote and protocol.lower() not in ("file", "local"):
        try:
            from actcache.segments.places.objects.buckets import objects
        except ImportError as error:
            raise MissingExtraError(f"{source} needs fsspec ({error}): pip install 'actcache[s3]'") from error
        with objects(source) as names:
            yield _remote(names)
    elif source == STANDARD_INPUT:
        yield StandardInput()
    elif "\0" in source or not source:
        raise DocumentError(f"{source!r} names no file")
    else:
        yield _local(rest if remote else source)


def _local(source: str) -> File | Folder:
    path = local_path(source)
    if path.is_dir():
        found = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
        return Folder(str(path), [LocalFile(one) for one in sorted(found) if _visible(one.relative_to(path))], False)
    if path.exists() or not glob.has_magic(source):
        return LocalFile(path)
    matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
    return Folder(str(path), [LocalFile(one) for one in matches if not one.is_dir()], True)


def _visible(path: PurePath) -> bool:
    return not any(part.startswith((".", "_")) for part in path.parts)


def _remote(names: Found) -> File | Folder:
    files = [RemoteFile(names.bucket, key) for key in names.keys]
    if names.single:
        return files[0]
    where = f"{names.bucket.where}/{names.root}".rstrip("/")
    if not names.chosen:
        if not files:
            raise DocumentError(f"cannot read {where}: there is no such object, and none below it")
        files = [file for file in files if _visible(PurePosixPath(file.name).relative_to(where))]
    return Folder(where, list(files), names.chosen)


def files_of(folder: Folder) -> list[File]:
    """Return the files of a folder that belong to the corpus; all that a pattern chose."""
    if folder.chosen:
        if not folder.files:
            raise DocumentError(f"no file matches {folder.name}")
        return folder.files
    files = [file for file in folder.files if is_corpus_file(file.name)]
    if not files:
        raise DocumentError(
            f"{folder.name} is a folder without corpus files (.txt, .jsonl, .json, .csv, .tsv, .parquet, .arrow, also "
            f".gz and the like), and none that Dataset.save_to_disk wrote: there is no {STATE} in it"
        )
    return files

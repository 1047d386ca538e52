"""Folders of images or sounds: a document a file, its id the path below the folder, its label the sub-folder's name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from actcache.cli.corpus.files import MEDIA, STANDARD_INPUT, File, Folder, Kind, find_source, is_corpus_file
from actcache.errors import DocumentError
from actcache.format.keys import key_array
from actcache.format.media import Audio, By, Image

#: Which files are images, and which are audio. What else a folder holds is left alone.
SUFFIXES = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm"), Kind.images),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif"), Kind.audio),
}


@dataclass(frozen=True)
class MediaDocument:
    """An image or a sound of a corpus."""

    content: Image | Audio
    id: str  # the file's path below the corpus's folder, with slashes
    label: str | None  # the name of the first folder on that path; None for a file that lies in none


@dataclass(frozen=True)
class Media:
    """The files of a corpus of images, or of sounds, by their paths."""

    kind: Kind
    files: list[File]
    root: str  # the folder below which they lie

    def __len__(self) -> int:
        return len(self.files)

    def documents(self, by: By = "content") -> Iterator[MediaDocument]:
        """Yield the documents; they are read when they are decoded, those of an object store when they are yielded.

        Raises:
            DocumentError: a file cannot be read.
        """
        for file in self.files:
            yield self._document(file, by)

    def labels(self) -> dict[str, int]:
        """Return how many documents each label has, by the labels' names."""
        found = Counter(label for file in self.files if (label := _label(self._id(file))) is not None)
        return dict(sorted(found.items()))

    def either(self) -> Iterator[Image | Audio]:
        """Yield what the documents may be stored as: all by their content, then all by their bytes."""
        for by in _BY:
            yield from (one.content for one in self.documents(by))

    def keys(self) -> NDArray[np.uint8]:
        """Return the keys ``[2 n, 32]`` by which the documents may be stored."""
        return key_array([one.key() for one in self.either()])

    def check(self) -> None:
        """Raise what decoding the first document would raise."""
        self._document(self.files[0], "content").content.key()

    def _document(self, file: File, by: By) -> MediaDocument:
        source: bytes | Path
        if file.path is not None:
            source = file.path
        else:
            with file.open() as data:
                source = data.read()
        name = self._id(file)
        content = Image(source, by) if self.kind is Kind.images else Audio(source, by=by)
        return MediaDocument(content, name, _label(name))

    def _id(self, file: File) -> str:
        path = PurePosixPath(Path(file.name).as_posix())
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else path.name


_BY: tuple[By, ...] = ("content", "bytes")


def _label(name: str) -> str | None:
    first, slash, _ = name.partition("/")
    return first if slash else None


def kind_of(name: str) -> Kind | None:
    """Return whether a file, by its name, is an image or audio."""
    return SUFFIXES.get(PurePosixPath(name).suffix.lower())


@contextmanager
def find_media(source: str | Path, format: str | None = None) -> Iterator[Media | None]:
    """Find a corpus of images or sounds; None where it is one of texts.

    A folder is one of images where it holds images and no corpus of texts, or where ``format`` says so; likewise of
    audio. Its files can be read as long as this lasts.

    Raises:
        DocumentError: it holds images and sounds, or none of what ``format`` says.
        StoreError: an object store fails.
    """
    if str(source) == STANDARD_INPUT or (format is not None and format not in MEDIA):
        if str(source) == STANDARD_INPUT and format in MEDIA:
            raise DocumentError(f"{format} are read from files, not from standard input: name a folder or a pattern")
        yield None
        return
    with find_source(str(source)) as place:
        files = place.files if isinstance(place, Folder) else [place]
        kinds = Counter(kind for file in files if (kind := kind_of(file.name)) is not None)
        if format is None and (not kinds or any(is_corpus_file(file.name) for file in files)):
            yield None
            return
        if format is None and len(kinds) > 1:
            has = ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common())
            raise DocumentError(f"{source} holds files of several kinds ({has}): say --format images or --format audio")
        kind = Kind(format) if format is not None else next(iter(kinds))
        chosen = [file for file in files if kind_of(file.name) is kind]
        if not chosen:
            suffixes = ", ".join(suffix for suffix, one in SUFFIXES.items() if one is kind)
            raise DocumentError(f"{source} holds no {kind}: their names end in {suffixes}")
        yield Media(kind, chosen, _root(place))


def _root(place: File | Folder) -> str:
    """Return the folder below which a corpus's files lie: of a pattern, what stands before its first magic sign."""
    if isinstance(place, File):
        return str(PurePosixPath(Path(place.name).as_posix()).parent)
    if not place.chosen:
        return Path(place.name).as_posix() if "://" not in place.name else place.name
    parts = PurePosixPath(Path(place.name).as_posix()).parts
    plain = next((i for i, part in enumerate(parts) if any(sign in part for sign in "*?[")), len(parts) - 1)
    return str(PurePosixPath(*parts[:plain]))

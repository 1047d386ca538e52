"""The files of a corpus and how each is read: what fails in one names it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from actcache.cli.corpus import arrow, jsonfile, text
from actcache.cli.corpus.compression import DAMAGED, decompressed
from actcache.cli.corpus.document import Document
from actcache.cli.corpus.files import COLUMNAR, STATE, File, Folder, Form, Kind, LocalFile, files_of, find_source, form
from actcache.cli.corpus.media import find_media
from actcache.errors import ActcacheError, DocumentError

_COUNTED_BYTES = 1 << 30


@dataclass(frozen=True)
class Shards:
    """The files of one corpus, all of one kind, which may be compressed or not."""

    files: list[File]
    kind: Kind
    field: str | None
    id_field: str | None
    kind_given: bool  # whether somebody said the kind, and not the names

    @property
    def local(self) -> bool:
        return all(isinstance(file, LocalFile) for file in self.files)

    def documents(self, file: File) -> Generator[Document, None, None]:
        """Yield the documents of one of the files; raises as ``actcache.cli.corpus.read``."""
        with _named(file):
            yield from self._read(file)

    def check_named(self, file: File) -> None:
        """Refuse a table without a named column, of a file that cannot be looked into."""
        if self.field is None and self.kind in (*COLUMNAR, Kind.csv, Kind.tsv):
            raise DocumentError(f"{file}: name the column of the texts with --field (field= in Python)")

    def _read(self, file: File) -> Iterator[Document]:
        if self.kind in COLUMNAR:
            yield from arrow.documents(file, self.kind, self.field, self.id_field)
            return
        compression = form(file.name).compression
        with file.open() as data:
            content = data if compression is None else decompressed(data, compression)
            match self.kind:
                case Kind.text:
                    yield from text.line_documents(text.decoded(content, None), certain=self.kind_given)
                case Kind.csv | Kind.tsv:
                    separator = text.SEPARATORS[self.kind]
                    yield from text.table_documents(text.decoded(content, ""), separator, self.field, self.id_field)
                case Kind.json:
                    yield from jsonfile.documents(jsonfile.by_values(text.pieces(content)), self.field, self.id_field)
                case _:
                    # Line ends inside of a text are escaped, so that CR is a space.
                    items = jsonfile.by_lines(text.decoded(content, "\n"))
                    yield from jsonfile.documents(items, self.field, self.id_field)

    def count(self) -> int | None:
        """Return about how many documents there are, at most; None where that takes long to learn."""
        paths = [file.path for file in self.files if file.path is not None and file.path.exists()]
        plain = self.kind in COLUMNAR or not any(form(file.name).compression for file in self.files)
        if len(paths) < len(self.files) or not plain or self.kind is Kind.json:
            return None
        if sum(path.stat().st_size for path in paths) > _COUNTED_BYTES and self.kind is not Kind.parquet:
            return None
        counts = [number for file in self.files if (number := self._count(file)) is not None]
        return sum(counts) if len(counts) == len(self.files) else None

    def _count(self, file: File) -> int | None:
        with _named(file):
            if self.kind in COLUMNAR:
                return arrow.count(file, self.kind)
            with file.open() as data:
                lines, last = 0, b"\n"
                for piece in iter(lambda: data.read(1 << 20), b""):
                    lines, last = lines + piece.count(b"\n"), piece[-1:]
                return lines + (last != b"\n")


@contextmanager
def find_shards(source: str | Path, field: str | None, id_field: str | None, format: str | None) -> Iterator[Shards]:
    """Find the files of a corpus; raises as ``actcache.cli.corpus.read``."""
    if format is not None and format not in list(Kind):
        raise DocumentError(f"there is no format {format!r}; there are {', '.join(Kind)}")
    if "" in (field, id_field):
        raise DocumentError("the name of the field is empty: name the column or field of the texts, or leave it out")
    with find_media(source, format) as media:
        if media is not None:
            raise DocumentError(
                f"{source} holds {len(media):,} files of {media.kind}, and texts are wanted here: cachectl fill, "
                "prune --keep-only and repair --corpus take images and audio"
            )
    with find_source(str(source)) as place:
        files, kind = _one_kind(place, None if format is None else Kind(format), field)
        if id_field is not None and field is None:
            raise DocumentError(f"{source}: name the column or field of the texts with --field")
        if kind is Kind.text and field is not None:
            raise DocumentError("lines that are texts have no fields: leave --field out, or say another --format")
        yield Shards(files, kind, field, id_field, format is not None)


def _one_kind(place: File | Folder, said: Kind | None, field: str | None) -> tuple[list[File], Kind]:
    if isinstance(place, File):
        return [place], said or _kind(form(place.name), field)
    if not place.chosen and (dataset := arrow.saved_dataset(place)) is not None:
        return dataset, Kind.arrow
    files = place.files if said and place.files else files_of(place)
    forms = [form(file.name) for file in files]
    if said is not None:
        return files, said
    kinds = Counter(_kind(one, field) for one in forms)
    if len(kinds) > 1:
        has = ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common())
        lost = not place.chosen and Kind.arrow in kinds
        unsaved = f", and no {STATE} that says which of them are a saved dataset" if lost else ""
        raise DocumentError(
            f"{place.name} holds files of several kinds ({has}){unsaved}: choose one kind by a "
            f"pattern in quotes, such as '{_pattern(place, files[0])}', or say the --format of all"
        )
    return files, next(iter(kinds))


def _pattern(place: Folder, file: File) -> str:
    folder = str(place.name).rpartition("/")[0] or "." if place.chosen else place.name
    return f"{folder}/*{''.join(Path(file.name).suffixes[-2:])}"


def _kind(form: Form, field: str | None) -> Kind:
    """Return the kind of a file; one that has fields, and no name that says how, is of JSON lines."""
    if form.kind in (None, Kind.text):
        return Kind.text if field is None else Kind.jsonl
    return form.kind


@contextmanager
def _named(file: File) -> Iterator[None]:
    """Have what fails in a file name it."""
    try:
        yield
    except DocumentError as error:
        raise DocumentError(f"{file}: {error}") from None
    except ActcacheError:
        raise
    except OSError as error:
        if error.errno is None:  # of a decompressor, or of Arrow
            raise DocumentError(f"{file} is damaged or cut off: {str(error).strip().partition(chr(10))[0]}") from None
        raise DocumentError(f"cannot read {file}: {error.strerror}") from None
    except DAMAGED as error:
        raise DocumentError(f"{file} is damaged or cut off: {error}") from None

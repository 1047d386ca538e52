"""The targets: what each parser is given, and which exceptions it may raise. Anything else is a finding."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import actcache
from actcache.admin.exchange import export_space, import_file
from actcache.entries.entry import columns_of
from actcache.errors import ActcacheError, DataError
from actcache.format.keys import join_keys
from actcache.format.ragged import PAYLOAD, VALUES
from actcache.format.recipe import Recipe
from actcache.io import loops
from actcache.io.loops import Lookup
from actcache.segments import registry, tombstones
from actcache.segments.index import Table
from actcache.segments.places import marker
from actcache.segments.places.local_place import LocalSegment
from actcache.segments.rows import ReadRows, RowPlan
from actcache.segments.segment import Segment
from actcache.store.collection import Collection
from actcache.store.stored_errors import StoredErrors
from tests.support import HIDDEN, compact, ids, key, put, recipe, rows
from tests.support.backends import KINDS

#: What ``tombstone.loads`` documents; its caller turns them into a ``FormatError``.
_JSON = (ValueError, KeyError, TypeError, AttributeError, RecursionError)

COLUMNS = columns_of(recipe())
CODECS = ("int8", "float16+zstd")  #: of further spaces in the store whose files are the seeds


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        parse: is given the bytes.
        seeds: returns good inputs.
        refusals: exceptions with which it may refuse.
    """

    parse: Callable[[bytes], object]
    seeds: Callable[[], Iterable[bytes]]
    refusals: tuple[type[BaseException], ...] = (DataError,)

    def __call__(self, data: bytes) -> bool:
        """Return whether the data were taken; raise what is a finding."""
        try:
            self.parse(data)
        except self.refusals:
            return False
        return True


@functools.cache
def work() -> Path:
    return Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None, prefix="fuzz-"))


def clean() -> None:
    """Remove the files that the targets have written."""
    shutil.rmtree(work(), ignore_errors=True)
    work.cache_clear()


@functools.cache
def stores(name: str) -> Path:
    """A small store of a backend with a plain and a compacted segment, a tombstone, an index and a collection."""
    root = work() / f"seeds-{name}"
    with actcache.open(KINDS[name].url(root)) as store:
        with store.space(recipe()) as space:
            for numbers in (range(3), range(3, 6)):
                put(space, numbers)
                space.flush()
            compact(space)
            spans = [[[0, 1]] * len(rows(7))]
            space.put([key(7)], [rows(7)], [ids(7)], spans=spans)
            space.flush()
            space.delete([key(1)])
        for dtype in CODECS:
            with store.space(recipe(dtype=dtype)) as space:
                put(space, range(4))
        store.put_collection("named", [key(1), key(2)], ["one", "two"])
        store.put_collection("plain", [key(3)])
    return root


def bytes_of(name: str, pattern: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(stores(name).glob(pattern))]


def folder_of(name: str) -> Path:
    return stores(name) / "spaces" / recipe().fingerprint


def look_through(backend: str, path: Path, name: str) -> None:
    """Do all that opening a space does with a segment, and read one of its arrays."""
    format = registry.load(backend)
    segment = Segment.open(format, LocalSegment(path), name, recipe().fingerprint, COLUMNS)  # type: ignore[arg-type]
    Table.of_segments([segment])
    for array in segment.extents:
        segment.read(array)


def one_file(backend: str) -> Target:
    """Segments that are a file."""

    def seeds() -> list[bytes]:
        return [path.read_bytes() for path in sorted((folder_of(backend) / "segments").iterdir())]

    @functools.cache
    def names() -> list[str]:
        return sorted(path.stem for path in (folder_of(backend) / "segments").iterdir())

    def parse(data: bytes) -> None:
        path = work() / f"segment-{backend}"
        path.write_bytes(data)
        look_through(backend, path, next((name for name in names() if name.encode() in data), names()[0]))

    return Target(parse, seeds)


def compressed_segment() -> Target:
    """A segment of a compressed space: its frames, and where they lie."""
    one = recipe(dtype="float16+zstd")
    columns = {**columns_of(one), PAYLOAD: ("|u1", ())}

    @functools.cache
    def files() -> list[Path]:
        return sorted((stores("safetensors") / "spaces" / one.fingerprint / "segments").iterdir())

    def parse(data: bytes) -> None:
        path = work() / "segment-compressed"
        path.write_bytes(data)
        format = registry.load("safetensors")
        segment = Segment.open(format, LocalSegment(path), files()[0].stem, one.fingerprint, columns)  # type: ignore[arg-type]
        if segment.tokens > 1 << 16:  # whoever reads it asks for memory: what it may say is bounded by its frames
            return
        source = ReadRows([segment])
        try:
            offsets = segment.offsets()
            plan = RowPlan(np.zeros(segment.entries, np.int64), offsets[:-1], np.diff(offsets))
            source.gather(plan, {VALUES: np.empty((segment.tokens, HIDDEN), np.float16)}, None, None)
        finally:
            source.close()

    return Target(parse, lambda: [path.read_bytes() for path in files()])


def frames() -> Target:
    """Frames of zstd as they lie in a payload, decompressed by the compiled loops."""
    given = rows(3).astype(np.float16)

    def parse(data: bytes) -> None:
        out, memory = np.full((len(given) + 1, HIDDEN), 7, np.float16), np.frombuffer(data, np.uint8)
        lengths, begins = np.array([len(given)]), np.zeros(1, np.int64)
        column = loops.Column(2 * HIDDEN, out, memory, begins, None, None, np.array([len(data)]), 2)
        if len(loops.gather([column], lengths, np.array([0, len(given)]))):
            raise DataError("corrupt")
        assert (out[-1] == 7).all()

    return Target(parse, lambda: [loops.frames_of(given, np.array([0, given.nbytes]), 2)[0].tobytes()])


def stored_errors() -> Target:
    """What a space says of what storing did."""
    good = {"format_version": 1, "dtype": "int8", "documents": 3, "tokens": 9, "bits": 8.1, "rows": 0.01, "worst": 0.02}

    def parse(data: bytes) -> None:
        StoredErrors.read(SimpleNamespace(blob=lambda name: data, recipe=recipe()))  # type: ignore[arg-type]

    return Target(parse, lambda: [json.dumps(good).encode()])


def zarr_folder() -> Target:
    """Segments of zarr; the first byte says which of the files holds the rest."""

    @functools.cache
    def good() -> tuple[Path, list[Path]]:
        segment = sorted((folder_of("zarr") / "segments").iterdir())[0]
        copy = work() / "zarr-segment" / segment.name
        shutil.copytree(segment, copy)
        return copy, sorted(path for path in copy.rglob("*") if path.is_file())

    def seeds() -> list[bytes]:
        return [bytes([number]) + path.read_bytes() for number, path in enumerate(good()[1])]

    def parse(data: bytes) -> None:
        segment, files = good()
        if not data or data[0] >= len(files):
            return
        path = files[data[0]]
        before = path.read_bytes()
        path.write_bytes(data[1:])
        try:
            look_through("zarr", segment, segment.stem)
        finally:
            path.write_bytes(before)

    return Target(parse, seeds)


def index() -> Target:
    def parse(data: bytes) -> None:
        path = work() / "index"
        path.unlink(missing_ok=True)  # the one before may be mapped
        path.write_bytes(data)
        segments = folder_of("hdf5") / "segments"
        table = Table.open(path, lambda name: LocalSegment(segments / f"{name}.h5"), COLUMNS)
        numbers, ranks = np.arange(len(table.segments)), np.arange(len(table.origins))
        limits = np.array([segment.tokens for segment in table.segments], np.int64)
        lookup = Lookup([table.searchable(None, numbers, ranks)], limits, numbers)
        lookup.locate(join_keys(table.prefix[:9], table.rest[:9]))

    return Target(parse, lambda: bytes_of("hdf5", "spaces/*/index/*.index"))


def the_marker() -> Target:
    def parse(data: bytes) -> None:
        marker.read(SimpleNamespace(read=lambda name: data, where="here"))  # type: ignore[arg-type]

    return Target(parse, lambda: bytes_of("hdf5", "actcache.json"), (ActcacheError,))


def the_recipe() -> Target:
    """As ``Store`` reads it: of a space that says another fingerprint than its name it is refused by name."""

    @functools.cache
    def store() -> actcache.Store:
        return actcache.open(stores("hdf5"), "r")

    def parse(data: bytes) -> None:
        opened = store()
        driver, opened._driver = (
            opened._driver,
            SimpleNamespace(  # type: ignore[assignment]
                read_blob=lambda name: data, spaces=lambda: [recipe().fingerprint]
            ),
        )
        try:
            for found in opened.recipes():
                Recipe.from_json(found.to_json())
        finally:
            opened._driver = driver

    return Target(parse, lambda: bytes_of("hdf5", f"spaces/{recipe().fingerprint}/recipe.json"), (ActcacheError,))


def export_file() -> Target:
    """What ``import`` reads; the first byte says whether the rest is a safetensors file or an npz."""
    suffixes = [".safetensors", ".npz"]

    @functools.cache
    def store() -> actcache.Store:
        return actcache.open("ram:fuzzed-imports")

    def seeds() -> list[bytes]:
        found = []
        with actcache.open(stores("hdf5"), "r") as opened, opened.space(recipe()) as space:
            for number, suffix in enumerate(suffixes):
                for keys in (None, [key(7)]):  # the latter has spans
                    path = work() / f"export-{keys is None}{suffix}"
                    path.unlink(missing_ok=True)
                    export_space(space, path, keys)
                    found.append(bytes([number]) + path.read_bytes())
        return found

    def parse(data: bytes) -> None:
        if not data or data[0] >= len(suffixes):
            return
        path = work() / f"imported{suffixes[data[0]]}"
        path.unlink(missing_ok=True)  # the one before may be mapped
        path.write_bytes(data[1:])
        import_file(store(), path)

    return Target(parse, seeds)


def lmdb_meta() -> Target:
    def parse(data: bytes) -> None:
        from actcache_lmdb.datafile import read_meta

        path = work() / "data.mdb"
        path.write_bytes(data)
        read_meta(path)

    return Target(parse, lambda: bytes_of("lmdb", "spaces/*/lmdb/*/data.mdb"))


def lmdb_state() -> Target:
    from actcache_lmdb.record import State

    return Target(lambda data: State.unpack(data, "here"), lambda: [State(1, 2, 3, 4, 5, 6, 7).pack()])


TARGETS: dict[str, Callable[[], Target]] = {
    "hdf5": lambda: one_file("hdf5"),
    "safetensors": lambda: one_file("safetensors"),
    "compressed": compressed_segment,
    "frames": frames,
    "errors": stored_errors,
    "zarr": zarr_folder,
    "index": index,
    "tombstone": lambda: Target(tombstones.loads, lambda: bytes_of("hdf5", "spaces/*/tombstones/*.json"), _JSON),
    "marker": the_marker,
    "recipe": the_recipe,
    "collection": lambda: Target(
        lambda data: Collection.from_bytes(data, "here"), lambda: bytes_of("hdf5", "collections/*")
    ),
    "export": export_file,
    "lmdb-meta": lmdb_meta,
    "lmdb-state": lmdb_state,
}
_NEEDS = {"safetensors": "safetensors", "compressed": "safetensors", "zarr": "zarr"}
_NEEDS |= {"lmdb-meta": "lmdb", "lmdb-state": "lmdb"}


def available(name: str) -> bool:
    return KINDS[_NEEDS.get(name, "hdf5")].installed


#: Texts that mean something to the parsers.
WORDS = [json.dumps(word).encode() for word in ("shape", "dtype", "data_offsets", "__metadata__", "codecs", "deleted")]
WORDS += [
    b"[" * 2000,
    b'{"a":' * 500,
    b"1e999",
    b"-1",
    b"9" * 400,
    b"null",
    b"NaN",
    b"18446744073709551615",
    b"../../x",
]
WORDS += [b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"\0" * 512]

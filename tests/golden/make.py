"""Makes the golden stores of format versions 1 to 3 anew, all that are installed or those that are named.

    python -m tests.golden.make [backend ...]

Run it only while the format may still change: once a release has written stores, these never change again. Beside each
store lies what it holds, computed from the documents and not read from it, and the digests of its files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import fsspec
import numpy as np
import torch

import actcache
from tests.golden.reader import digests
from tests.support import compact, ids, key, put, recipe, rows, stored_as
from tests.support.backends import KINDS

HERE = Path(__file__).parent


#: Rows with a few large numbers, as int8 stores them: the shape of the codes, and these; the scale is 1.
BENT = (
    (0x24, (127, 83, -98, 6, 16, 3, -14, 9)),
    (0x90, (127, 103, 124, -15, -58, -64, 25, -29)),
    (0xFE, (-127, 119, 5, 0, -77, 18, 3, -120)),
    (0x00, (-1, 100, 25, 127, -70, 3, 88, -126)),
)


def bent():
    """What these rows are, ``[4, 8]``: exact in every float dtype."""
    made = np.array([codes for _, codes in BENT], np.float32)
    for row, (shape, _) in zip(made, BENT, strict=True):
        if shape:
            knee, ratio = shape // 16 * 8, (2 + shape % 2) << (shape % 16 // 2)
            row[:] = np.where(np.abs(row) <= knee, row, np.sign(row) * (knee + ratio * (np.abs(row) - knee)))
    return made


def stored_bent(dtype):
    if dtype.removesuffix("+zstd") != "int8":
        return stored_rows(bent(), dtype)
    scale = np.float32(1).view(np.uint32)
    tails = np.array([[scale | shape] for shape, _ in BENT], "<u4").view(np.uint8)
    return np.hstack([np.array([codes for _, codes in BENT], np.int8).view(np.uint8), tails])


def stored(number, version, dtype):
    """A document as it is stored."""
    return stored_rows(rows(number, version), dtype)  # small integers: exact in every float dtype, and in int8


def stored_rows(values, dtype):
    """Rows as they are stored; those of int8 need no knee."""
    dtype = dtype.removesuffix("+zstd")
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    if dtype == "int8":
        scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
        scales = (scales.view(np.uint32) + 0xFF & 0xFFFFFF00).view(np.float32)
        return np.hstack([np.rint(values / scales).astype(np.int8).view(np.uint8), scales.view(np.uint8)])
    if dtype == "float8_e4m3":
        scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(448)
        codes = torch.from_numpy(values / scales).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return np.hstack([codes, scales.view(np.uint8)])
    return values.astype(dtype)


def extras_of(number, version=0):
    count = len(rows(number, version))
    spans = np.arange(2 * count, dtype=np.int32).reshape(-1, 2)
    return {
        "spans": spans,
        "word_ids": np.arange(count, dtype=np.int32) - 1,
        "type_ids": np.arange(count).astype(np.int8) % 2,
    }


def fill(store, dtype):
    """Overwrite, delete, put again, compact, overwrite and delete once more; return what is then served."""
    held = {}
    with store.space(recipe(dtype=dtype)) as space:

        def puts(numbers, version, **options):
            put(space, numbers, version=version, **options)
            space.flush()
            for n in numbers:
                held[key(n)] = {"values": stored(n, version, dtype), "token_ids": ids(n, version).astype(np.int32)}

        def deletes(numbers):
            space.delete([key(n) for n in numbers])
            for n in numbers:
                del held[key(n)]

        puts(range(12), 0)
        puts(range(0, 12, 3), 1, overwrite=True)
        deletes([1, 3])
        puts([3], 2)
        compact(space)  # and from here on beside a compacted segment
        deletes([5])
        puts(range(12, 16), 0)
        puts([6, 13], 3, overwrite=True)
        deletes([0, 14])
        space.put([key(20)], [rows(20)])  # without token ids
        held[key(20)] = {"values": stored(20, 0, dtype)}
        extras = extras_of(21)
        space.put([key(21)], [rows(21)], [ids(21)], **{name: [array] for name, array in extras.items()})
        held[key(21)] = {"values": stored(21, 0, dtype), "token_ids": ids(21).astype(np.int32), **extras}
    return held


def fill_a_little(store, dtype):
    """A segment with all kinds of entries, compacted; and one more. Return what is then served."""
    held = {}
    with store.space(recipe(dtype=dtype)) as space:
        put(space, range(6))
        space.put([key(20)], [rows(20)])  # without token ids
        extras = extras_of(21)
        space.put([key(21)], [rows(21)], [ids(21)], **{name: [array] for name, array in extras.items()})
        space.flush()
        space.delete([key(4)])
        compact(space)
        put(space, [6, 2], version=1, overwrite=True)
        space.put([key(22)], [bent()], [np.arange(4)])
        space.flush()
    for n, version in ((0, 0), (1, 0), (2, 1), (3, 0), (5, 0), (6, 1), (20, 0), (21, 0)):
        held[key(n)] = {"values": stored(n, version, dtype)}
        if n != 20:
            held[key(n)]["token_ids"] = ids(n, version).astype(np.int32)
    held[key(21)] |= extras
    held[key(22)] = {"values": stored_bent(dtype), "token_ids": np.arange(4, dtype=np.int32)}
    return held


CODECS = ("int8", "float8_e4m3", "float16+zstd", "bfloat16+zstd", "int8+zstd")


def make_codecs(name):
    """The store of format version 2: beside a space of version 1, one of each codec."""
    folder = HERE / name / "codecs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    spaces = {}
    with actcache.open(KINDS[name].url(folder / "store")) as store:
        for dtype in ("float32", *CODECS):
            with stored_as(dtype):
                spaces[recipe(dtype=dtype).fingerprint] = digests(fill_a_little(store, dtype))
    finish(folder, {"spaces": spaces, "collections": {}})


def make_journaled():
    """The store of format version 3, as it lies in an object store: some index files that name the segments, one that
    others have taken in, and a segment that none of them names."""
    folder = HERE / "safetensors/journaled"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    memory = fsspec.filesystem("memory")
    with actcache.open("memory://golden/store") as store:
        held = fill_a_little(store, "float32")
        indexes = f"/golden/store/spaces/{recipe().fingerprint}/index"
        with store.space(recipe()) as space:
            told = set(memory.find(indexes))
            put(space, [30])
            space.flush()
    memory.rm([path for path in memory.find(indexes) if path not in told])
    memory.get("/golden/store", str(folder / "store"), recursive=True)
    memory.rm("/golden", recursive=True)
    finish(folder, {"spaces": {recipe().fingerprint: digests(held)}, "collections": {}})


def make(name):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    spaces, keys, named = {}, [key(n) for n in (7, 2, 20)], ["seven", "zw\u00f6lf", ""]
    with actcache.open(KINDS[name].url(folder / "store")) as store:
        for dtype in ("float32", "float16", "bfloat16"):
            spaces[recipe(dtype=dtype).fingerprint] = digests(fill(store, dtype))
        store.put_collection("named", keys, named)
        store.put_collection("plain", keys[:2])
    hexed = [k.hex() for k in keys]
    held = {"spaces": spaces, "collections": {"named": [hexed, named], "plain": [hexed[:2], None]}}
    finish(folder, held)
    make_codecs(name)
    if name == "safetensors":
        make_journaled()


def finish(folder, held):
    (folder / "holds.json").write_text(json.dumps(held, indent=1) + "\n")
    shutil.rmtree(folder / "store/tmp", ignore_errors=True)
    for name in ("lock.mdb", "used.json"):  # mean nothing when nobody has the space open, nor ever looked at it
        for path in (folder / "store").rglob(name):
            path.unlink()
    (folder / "files.json").write_text(json.dumps(files(folder / "store"), indent=1) + "\n")


def own_of(number):
    """Columns of the caller's own."""
    count = len(rows(number))
    rng = np.random.default_rng([number, 7])
    return {
        "labels": rng.integers(-100, 30000, count),
        "loss_mask": rng.random(count) < 0.5,
        "weights": rng.random((count, 2)).astype(np.float32),
        "words": np.array([f"w{i}" for i in range(count)], "U4"),
    }


def make_columns(name):
    """A store with columns of the caller's own: of some entries, beside others, in a compacted segment."""
    folder = HERE / "columns" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    held = {}

    def puts(space, numbers, **options):
        own = {column: [own_of(n)[column] for n in numbers] for column in own_of(numbers[0])}
        put(space, numbers, columns=own, **options)
        space.flush()
        for n in numbers:
            more = {f"columns.{column}": array for column, array in own_of(n).items()}
            held[key(n)] = {"values": stored(n, 0, "float32"), "token_ids": ids(n).astype(np.int32), **more}

    with actcache.open(KINDS[name].url(folder / "store")) as store, store.space(recipe()) as space:
        put(space, [1, 2])
        for n in (1, 2):
            held[key(n)] = {"values": stored(n, 0, "float32"), "token_ids": ids(n).astype(np.int32)}
        puts(space, [3, 4, 5])
        puts(space, [6, 7])
        space.delete([key(4)])
        del held[key(4)]
        compact(space)
        puts(space, [21], **{name: [array] for name, array in extras_of(21).items()})
        held[key(21)] |= extras_of(21)
        puts(space, [8])
    spaces = {recipe().fingerprint: digests(held)}
    (folder / "holds.json").write_text(json.dumps({"spaces": spaces, "collections": {}}, indent=1) + "\n")
    shutil.rmtree(folder / "store/tmp", ignore_errors=True)
    for path in (*folder.rglob("lock.mdb"), *folder.rglob("used.json")):
        path.unlink()
    (folder / "files.json").write_text(json.dumps(files(folder / "store"), indent=1) + "\n")


def files(root):
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


if __name__ == "__main__":
    if "--journaled" in sys.argv:
        make_journaled()
        sys.exit()
    only_codecs, only_columns = "--codecs" in sys.argv, "--columns" in sys.argv
    named = [one for one in sys.argv[1:] if not one.startswith("--")]
    for chosen in named or [kind.name for kind in KINDS.values() if kind.installed]:
        (make_codecs if only_codecs else make_columns if only_columns else make)(chosen)
        print(chosen, sum(path.stat().st_size for path in (HERE / chosen).rglob("*")), "bytes")

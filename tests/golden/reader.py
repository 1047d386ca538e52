"""Reads a store as docs/format.md describes it, knowing nothing of actcache.

    python tests/golden/reader.py <store> [dump]

Prints, as JSON, fingerprint -> key -> array -> [dtype, shape, SHA-256 of its bytes] of every entry that is served, and
the collections. Imports the storage libraries, NumPy, xxhash and, for compressed spaces, zstandard alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
import sys
from pathlib import Path

import numpy as np
import xxhash

FIXED = {
    "offsets",
    "keys",
    "checksums",
    "extra_checksums",
    "origins",
    "origin",
    "origin_entries",
    "sources",
    "origins_checksum",
    "payload_offsets",
}
P = [0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5]


def read_hdf5(path):
    """Return a segment's metadata and arrays."""
    import h5py

    with h5py.File(path, "r") as file:
        return {name: text.decode() for name, text in file.attrs.items()}, {name: file[name][...] for name in file}


def read_zarr(path):
    import zarr

    group = zarr.open_group(path, mode="r")
    return dict(group.attrs), {name: array[...] for name, array in group.arrays()}


def read_safetensors(path):
    import safetensors

    with safetensors.safe_open(path, "np") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


SEGMENTS = {"hdf5": (".h5", read_hdf5), "zarr": (".zarr", read_zarr), "safetensors": (".safetensors", read_safetensors)}


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def read_store(root):
    """Return fingerprint -> {key: {array: rows}} of all spaces of a store."""
    marker = json.loads((root / "actcache.json").read_text())
    assert marker["format"] == "actcache"
    assert marker["format_version"] in (1, 3)
    spaces = {}
    for folder in sorted((root / "spaces").iterdir()):
        description = json.loads((folder / "recipe.json").read_text())
        identity = description["identity"]
        of_before = {identity["dtype"], *identity.get("via", [])} <= {"float32", "float16", "bfloat16"}
        assert description["format_version"] == (1 if of_before else 2)
        person = b"actcache/recipe"
        assert hashlib.blake2b(canonical(identity), digest_size=16, person=person).hexdigest() == folder.name
        if marker["backend"] == "lmdb":
            spaces[folder.name] = read_lmdb(folder, identity)
        else:
            named = read_index(folder) if marker["format_version"] == 3 else None
            spaces[folder.name] = read_segments(folder, identity, *SEGMENTS[marker["backend"]], named)
        for entry in spaces[folder.name].values():
            if "columns" in entry:
                records = entry.pop("columns").view(record(folder))[:, 0]
                entry |= {f"columns.{name}": np.ascontiguousarray(records[name]) for name in records.dtype.names}
    return spaces


def read_index(folder):
    """Return the names of all segments, where index files name them."""
    files = {}
    for path in (folder / "index").glob("*.index"):
        metadata, arrays = read_safetensors(path)
        assert metadata["actcache_index"] == "1"
        texts = [metadata[name].encode() for name in ("segments", "origins", "replaces")]
        assert metadata["texts_checksum"] == xxhash.xxh3_64_hexdigest(b"".join(texts))
        data = b"".join([*texts[:2], *(arrays[name].tobytes() for name in ("segment", "origin", "entry"))])
        assert metadata["checksum"] == xxhash.xxh3_64_hexdigest(data)
        files[path.stem] = metadata
    replaced = {name for metadata in files.values() for name in json.loads(metadata["replaces"])}
    needed = [metadata for name, metadata in files.items() if name not in replaced]
    return {segment["name"] for metadata in needed for segment in json.loads(metadata["segments"])}


def read_segments(folder, identity, suffix, read, named):
    dead = set()
    for path in sorted((folder / "tombstones").glob("*.json")):
        tombstone = json.loads(path.read_text())
        assert tombstone["checksum"] == xxhash.xxh3_64_hexdigest(canonical(tombstone["deleted"]))
        dead.update((segment, entry) for segment, entries in tombstone["deleted"].items() for entry in entries)
    segments = {}
    for path in sorted((folder / "segments").glob(f"*{suffix}")):
        if named is not None and path.stem not in named:
            continue
        metadata, arrays = read(path)
        segments[path.stem] = arrays
        assert metadata == {"actcache_segment": "1", "space": folder.name, "segment": path.stem}
    replaced = {source for arrays in segments.values() for source in names(arrays.get("sources", []))}
    held, origins_of = {}, {}
    for name, arrays in segments.items():
        if name in replaced:
            continue
        offsets = arrays["offsets"].tolist()
        if "origins" in arrays:
            data = b"".join(arrays[part].tobytes() for part in ("origins", "origin", "origin_entries", "sources"))
            assert arrays["origins_checksum"].tolist() == [xxhash.xxh3_64_intdigest(data)]
        origins = names(arrays["origins"]) if "origins" in arrays else [name]
        for i, row in enumerate(arrays["keys"]):
            key = row.tobytes()
            origin = (
                (origins[arrays["origin"][i]], int(arrays["origin_entries"][i])) if "origin" in arrays else (name, i)
            )
            entry = {n: a[offsets[i] : offsets[i + 1]] for n, a in arrays.items() if n not in {*FIXED, "payload"}}
            if "payload" in arrays:
                begin, end = arrays["payload_offsets"][i : i + 2].tolist()
                frames, tokens = arrays["payload"][begin:end].tobytes(), offsets[i + 1] - offsets[i]
                entry["values"] = decompressed(frames, tokens, identity)
            extra = int(arrays["extra_checksums"][i]) if "extra_checksums" in arrays else None
            check(folder.name, identity, key, entry, int(arrays["checksums"][i]), extra)
            if origin not in dead and origin >= origins_of.get(key, ("", 0)):  # the copy of the last origin is served
                held[key], origins_of[key] = entry, origin
    return held


def form(identity):
    """Return the dtype of a space's stored rows, and how many items each has."""
    dtype, hidden = STORED[identity["dtype"].removesuffix("+zstd")], identity["hidden_size"]
    return dtype, hidden + 4 if dtype == "|u1" else hidden  # the codes, and the scale as float32


def decompressed(frames, tokens, identity):
    """Return an entry's rows from its frames: one for the first bytes of all numbers, one for the second ones, ..."""
    import zstandard

    dtype, width = form(identity)
    planes = []
    for _ in range(np.dtype(dtype).itemsize):
        assert zstandard.frame_content_size(frames) == tokens * width
        decoder = zstandard.ZstdDecompressor().decompressobj()
        planes.append(np.frombuffer(decoder.decompress(frames), np.uint8))
        frames = decoder.unused_data
    assert not frames
    return np.stack(planes, axis=1).reshape(-1).view(dtype).reshape(tokens, width)


def names(array):
    """Return names of segments from their 14 bytes each."""
    return [f"{(text := row.tobytes().hex())[:12]}-{text[12:]}" for row in array]


STORED = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "|u1", "float8_e4m3": "|u1"}
COLUMNS = {
    "values": None,
    "token_ids": ("<i4", ()),
    "spans": ("<i4", (2,)),
    "word_ids": ("<i4", ()),
    "type_ids": ("i1", ()),
    "columns": "declared",
}


def read_lmdb(folder, identity):
    import lmdb

    schema = record(folder)
    if schema is not None:
        COLUMNS["columns"] = ("u1", (schema.itemsize,))
    newest = max(path for path in (folder / "lmdb").iterdir() if path.name.isdigit())
    held = {}
    with lmdb.open(str(newest), readonly=True, lock=False, max_dbs=4) as env:
        state, entries = env.open_db(b"state", create=False), env.open_db(b"entries", create=False)
        heads = env.open_db(b"heads", dupsort=True, dupfixed=True, create=False)
        with env.begin() as txn:
            data = txn.get(b"state", db=state)
            assert (data[:4], data[4:8]) == (b"ACTL", (1).to_bytes(4, "little"))
            assert data[-8:] == xxhash.xxh3_64_intdigest(data[:-8]).to_bytes(8, "little")
            for key in list(txn.cursor(heads).iternext_nodup(values=False)):
                head = txn.get(key, db=heads)  # the first is the newest
                number, _, tokens, columns, checksum, extra, word = struct.unpack("<QQIIQQQ", head[8:])
                assert word == head_check(key, head)
                if not number:
                    continue
                value = txn.get(number.to_bytes(8, "big"), db=entries)
                assert struct.unpack_from("<4sIQII", value) == (b"ACTE", 1, number, tokens, columns)
                entry = ragged(value, tokens, columns, identity)
                has_extras = not {"spans", "word_ids", "type_ids", "columns"}.isdisjoint(entry)
                check(folder.name, identity, key, entry, checksum, extra if has_extras else None)
                held[key] = entry
    return held


def record(folder):
    """Return the record of the caller's own columns of a space, None where it has none."""
    path = folder / "columns.json"
    if not path.exists():
        return None
    value = json.loads(path.read_text())
    text = json.dumps(value["columns"], separators=(",", ":"))
    assert value["format_version"] == 1
    assert value["checksum"] == xxhash.xxh3_64_hexdigest(text.encode())
    return np.dtype([(name, dtype, tuple(shape)) for name, dtype, shape in value["columns"]])


def head_check(key, head):
    total = 0
    for i, word in enumerate(struct.unpack("<10Q", key + head[:48])):
        mixed = word * P[i % 5] * (2 * i + 1) % 2**64
        total += mixed ^ mixed >> 32
    return total % 2**64


def ragged(value, tokens, columns, identity):
    arrays, at = {}, 112
    dtype, width = form(identity)
    payload = struct.unpack_from("<Q", value, 80)[0]
    assert bool(payload) == identity["dtype"].endswith("+zstd")
    for bit, (name, described) in enumerate(COLUMNS.items()):
        if columns >> bit & 1 and not (payload and name == "values"):
            kind, trailing = described or (dtype, (width,))
            at = -(-at // 8) * 8
            array = np.frombuffer(value, kind, tokens * int(np.prod(trailing)), at).reshape(tokens, *trailing)
            arrays[name] = array
            at += array.nbytes
    if payload:  # behind all others
        at = -(-at // 8) * 8
        arrays["values"] = decompressed(bytes(value[at : at + payload]), tokens, identity)
    return arrays


def check(fingerprint, identity, key, entry, checksum, extra_checksum):
    c = xxhash.xxh3_64_intdigest(f"{fingerprint} {identity['dtype']} {identity['hidden_size']}".encode())
    for n, word in enumerate(np.frombuffer(key, "<u8").tolist()):
        c ^= word * P[n] % 2**64
    c ^= len(entry["values"]) * P[4] % 2**64
    if "token_ids" in entry:
        c = xxhash.xxh3_64_intdigest(entry["token_ids"].tobytes(), c ^ 0x5851F42D4C957F2D)
    c = xxhash.xxh3_64_intdigest(entry["values"].tobytes(), c)
    assert c == checksum
    if extra_checksum is not None:
        for extra in ("columns", "spans", "type_ids", "word_ids"):
            if extra in entry:
                c = xxhash.xxh3_64_intdigest(entry[extra].tobytes(), c)
        assert c == extra_checksum


def read_collections(root):
    """Return name -> (keys, ids or None)."""
    collections = {}
    for path in sorted((root / "collections").glob("*.safetensors")):
        metadata, arrays = read_safetensors(path)
        digest = xxhash.xxh3_64()
        for name, array in sorted(arrays.items()):
            digest.update(name.encode())
            digest.update(array.tobytes())
        assert (metadata["actcache_collection"], metadata["checksum"]) == ("1", digest.hexdigest())
        ids = None
        if "ids" in arrays:
            text, ends = arrays["ids"].tobytes(), arrays["id_offsets"].tolist()
            ids = [text[begin:end].decode() for begin, end in itertools.pairwise(ends)]
        collections[path.stem] = ([row.tobytes().hex() for row in arrays["keys"]], ids)
    return collections


def digests(entries):
    """Return key -> array -> [dtype, shape, digest], for JSON."""
    return {
        key.hex(): {n: [a.dtype.str, list(a.shape), hashlib.sha256(a.tobytes()).hexdigest()] for n, a in entry.items()}
        for key, entry in sorted(entries.items())
    }


def main(root):
    spaces = {fingerprint: digests(entries) for fingerprint, entries in read_store(root).items()}
    print(json.dumps({"spaces": spaces, "collections": read_collections(root)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

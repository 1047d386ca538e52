"""Corpora of many files, compressed ones among them: all of it is read in order, or the file that fails is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import sys
import threading
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from actcache.cli import corpus
from actcache.errors import ActcacheError, DocumentError, MissingExtraError
from actcache.format.keys import document_key, key_array
from tests.cli.running import cachectl

TEXTS = [f"text {number} żółć\r\n" + "x" * number for number in range(60)]


def zstd(data: bytes) -> bytes:
    """Frames as the format's description has them: a block that is not compressed, and its digest."""
    frame = b"\x28\xb5\x2f\xfd\xa4" + len(data).to_bytes(4, "little")
    blocks = [data[start : start + 100_000] for start in range(0, len(data), 100_000)] or [b""]
    for number, block in enumerate(blocks):
        frame += (len(block) << 3 | (number == len(blocks) - 1)).to_bytes(3, "little") + block
    return frame + (xxhash.xxh64_intdigest(data) & 0xFFFFFFFF).to_bytes(4, "little")


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def content(kind: str, texts: list[str]) -> bytes:
    rows = [{"n": number, "body": text} for number, text in enumerate(texts)]
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "json":
        return json.dumps(rows, indent=1).encode()
    if kind in ("csv", "tsv"):
        cell = "\t" if kind == "tsv" else ","
        return "".join([f"n{cell}body\n", *(f'{row["n"]}{cell}"{row["body"]}"\n' for row in rows)]).encode()
    return "".join(text.replace("\r\n", " ") + "\n" for text in texts).encode()


def read(source: object, field: str | None = "body", **options: str) -> list[str]:
    corpus.check(source, field, **options)
    return [one.text for one in corpus.read(source, field, **options)]


def refused(source: object, field: str | None = "body", **options: str) -> str:
    with pytest.raises(DocumentError) as failure:
        list(corpus.read(source, field, **options))
    return str(failure.value)


# --- compressed files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "tsv"])
def test_compressed_files(tmp_path, kind, suffix):
    path, whole = tmp_path / f"c.{kind}{suffix}", content(kind, TEXTS)
    texts = [text.replace("\r\n", " ") for text in TEXTS] if kind == "txt" else TEXTS
    field = None if kind == "txt" else "body"
    path.write_bytes(PACK[suffix](whole))
    assert read(path, field) == texts
    assert corpus.count(path, field) is None
    assert corpus.keys(path, field).tolist() == key_array(list(map(document_key, texts))).tolist()
    half = len(whole) // 2
    path.write_bytes(PACK[suffix](whole[:half]) + PACK[suffix](whole[half:]))  # as parallel compressors write it
    assert read(path, field) == texts


@pytest.mark.parametrize("suffix", PACK)
def test_damaged_compressed_files_are_one_error(tmp_path, suffix):
    """Cut anywhere, or with any byte changed: the same documents, or one error that names the file, and never fewer."""
    path = tmp_path / f"c.jsonl{suffix}"
    pack, data = PACK[suffix], content("jsonl", TEXTS[:30])
    whole = pack(data[:600]) + pack(data[600:])
    between = len(pack(data[:600]))
    step = len(whole) // 60

    def flipped(at: int, bits: int) -> bytes:
        return bytes([*whole[:at], whole[at] ^ bits, *whole[at + 1 :]])

    bad = [whole[:size] for size in range(0, len(whole), step) if size != between]
    bad += [flipped(at, bit) for at in range(0, len(whole), step) for bit in (1, 64)]
    bad += [flipped(at, 0x55) for at in range(between, between + 12)]  # where another stream begins
    bad += [data, whole + b"more", b"x"]
    said = []
    for one in bad:
        path.write_bytes(one)
        try:
            assert read(path) == TEXTS[:30]
        except DocumentError as error:
            said.append(str(error))
    assert len(said) > 0.9 * len(bad)
    assert all(str(path) in line for line in said)
    path.write_bytes(b"")
    assert "empty" in refused(path)


def test_xz_with_padding(tmp_path):
    path = tmp_path / "c.txt.xz"
    path.write_bytes(lzma.compress(b"one\n") + bytes(8) + lzma.compress(b"two\n") + bytes(4))
    assert read(path, None) == ["one", "two"]


def test_names_that_say_the_wrong_thing(tmp_path):
    for suffix, pack in PACK.items():
        (tmp_path / "c.jsonl").write_bytes(pack(b"{}"))
        assert suffix in refused(tmp_path / "c.jsonl")
        assert suffix in refused(tmp_path / "c.jsonl", None)
    for name in ("c.csv.zip", "c.zip", "c.tar.gz", "c.jsonl.lz4"):
        assert "are not read" in refused(tmp_path / name)
    assert "compressed inside" in refused(tmp_path / "c.parquet.gz")
    (tmp_path / "c.txt").write_bytes(b"PK\x03\x04 and so on")
    assert "zip archive" in refused(tmp_path / "c.txt", None)


def test_zstd_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "c.txt.zst").write_bytes(zstd(b"one\n"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'actcache\[corpora\]'"):
        corpus.check(tmp_path / "c.txt.zst")


# --- many files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Shards in a folder, packed in several ways, beside what is none of the corpus."""
    folder = tmp_path / "data"
    for number, suffix in enumerate(("", *PACK)):
        part = TEXTS[number * 12 : number * 12 + 12]
        path = folder / ("sub" if number == 3 else "") / f"{number}.jsonl{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PACK.get(suffix, bytes)(content("jsonl", part)))
    for name in ("README.md", "_SUCCESS", ".hidden.jsonl", ".git/x.jsonl", "_tmp/y.jsonl", "LICENSE"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no JSON")
    return folder


def test_folders_and_patterns(many, monkeypatch):
    order = [*TEXTS[:36], *TEXTS[48:], *TEXTS[36:48]]  # by names: 0, 1, 2, 4, sub/3
    assert read(many) == order
    assert read(f"{many}/") == order
    assert read(f"file://{many}") == order
    assert read(f"{many}/**/[0-9].jsonl*") == order
    assert read(f"{many}/*.jsonl*") == order[:48]
    assert read(f"{many}/[01].jsonl*") == TEXTS[:24]
    assert read(many / "*" / "3.*") == TEXTS[36:48]
    assert corpus.count(f"{many}/?.jsonl", "body") == 12
    monkeypatch.chdir(many.parent)
    assert read("data/*.jsonl*") == order[:48]
    assert f"no file matches {many}/*.csv" in refused("data/*.csv")
    (many / "[01].jsonl").write_bytes(content("jsonl", ["the name itself"]))
    assert read("data/[01].jsonl") == ["the name itself"]


def test_files_that_do_not_go_together(many, tmp_path):
    (many / "more.csv").write_bytes(content("csv", TEXTS))
    for source in (many, f"{many}/*.*"):
        assert "several kinds (" in refused(source)
    assert f"'{many}/*.jsonl'" in refused(many)
    (tmp_path / "empty").mkdir()
    assert "without corpus files" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "notes.md").write_text("x")
    assert "without corpus files" in refused(tmp_path / "empty")
    assert "unpack" in refused(put(tmp_path / "packed" / "a.jsonl.lz4").parent)


def put(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_format_where_names_do_not_say_it(tmp_path):
    for number in range(2):
        put(tmp_path / "spark" / f"part-0000{number}", content("csv", TEXTS[number * 30 : number * 30 + 30]))
    assert "part-00000: line 1 is no JSON" in refused(f"{tmp_path}/spark/part-*")
    for source in (tmp_path / "spark", f"{tmp_path}/spark/part-*"):
        assert read(source, format="csv") == TEXTS
    assert "there is no format 'xml'" in refused(tmp_path / "spark", format="xml")
    assert "have no fields" in refused(tmp_path / "spark", format="text")


def test_the_file_and_line_that_fail_are_named(many):
    path = many / "2.jsonl.bz2"
    path.write_bytes(bz2.compress(content("jsonl", TEXTS[:5]) + b'{"other": 1}\n'))
    documents = corpus.read(many, "body")
    assert [next(documents).text for _ in range(29)] == [*TEXTS[:24], *TEXTS[:5]]
    with pytest.raises(DocumentError, match=r"2\.jsonl\.bz2: line 6: there is no field 'body'; there are 'other'"):
        next(documents)
    path.write_bytes(bz2.compress(b'{"text": "x"}\n'))
    with pytest.raises(DocumentError, match=r"2\.jsonl\.bz2: line 1: there is no field 'body'; there are 'text'"):
        corpus.check(many, "body")  # before anything is computed


def test_a_file_that_disappears(many):
    documents = corpus.read(many, "body")
    next(documents)
    (many / "4.jsonl.zst").unlink()
    with pytest.raises(DocumentError, match=r"cannot read .*4\.jsonl\.zst: No such file"):
        list(documents)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_shards_of_columns(tmp_path, kind):
    for number in range(3):
        part = pa.table({"body": TEXTS[number * 20 : number * 20 + 20]})
        path = tmp_path / f"{number}.{kind}"
        if kind == "parquet":
            pq.write_table(part, path)
        else:
            with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(out, part.schema) as file:
                file.write_table(part)
    assert read(tmp_path) == read(f"{tmp_path}/*.{kind}") == TEXTS
    assert corpus.count(tmp_path, "body") == (60 if kind == "parquet" else None)
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "2.parquet")
    if kind == "parquet":
        with pytest.raises(DocumentError, match=r"2\.parquet: there is no column 'body'; there are 'text'"):
            corpus.check(tmp_path, "body")


def test_a_pattern_of_saved_datasets_files(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"body": TEXTS}).save_to_disk(tmp_path / "saved", num_shards=2)
    assert read(tmp_path / "saved") == read(f"{tmp_path}/saved/*.arrow") == TEXTS
    monkeypatch.chdir(tmp_path / "saved")
    assert read(".") == read("*.arrow") == TEXTS


# --- pipes ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_read_once_and_whole(tmp_path):
    """``check`` takes nothing of it away."""
    path = tmp_path / "pipe.jsonl"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(content("jsonl", TEXTS)))
    assert corpus.is_stream(path)
    assert corpus.is_stream("-")
    corpus.check(path, "body")
    assert corpus.count(path, "body") is None
    writer.start()
    assert [one.text for one in corpus.read(path, "body")] == TEXTS
    writer.join()
    assert "no pipe" in cachectl("repair", tmp_path / "store", "--corpus", path).refused(2)
    os.rename(path, tmp_path / "pipe.parquet")
    assert "no pipe" in refused(tmp_path / "pipe.parquet")


def test_errors_are_of_this_package(tmp_path):
    for source in ("", "a\0b", "nobody://x/y", "s3://", tmp_path / "none"):
        with pytest.raises(ActcacheError):
            list(corpus.read(source, "body"))

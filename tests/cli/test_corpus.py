"""Corpora as files: every kind of file gives the same documents, and errors name the line."""

from __future__ import annotations

import csv
import json

import pytest

import actcache
from actcache import corpus
from actcache.errors import DocumentError

TEXTS = ["a text", 'with "quotes", commas', "on two\nlines", "  spaces  ", "żółć 東京", "a text"]
IDS = ["1", "two", "3", "4", "5", "6"]


def write(path, kind):
    if kind == "jsonl":
        path.write_text(
            "".join(json.dumps({"n": name, "body": text}) + "\n\n" for name, text in zip(IDS, TEXTS, strict=True))
        )
        return
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
        writer.writerow(["n", "other", "body"])
        writer.writerows([name, 0, text] for name, text in zip(IDS, TEXTS, strict=True))
        writer.writerow(["7", 0, ""])


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_tables(tmp_path, kind):
    path = tmp_path / f"corpus.{kind}"
    write(path, kind)
    assert [(d.id, d.text) for d in corpus.read(path, "body", "n")] == list(zip(IDS, TEXTS, strict=True))
    assert [d.id for d in corpus.read(path, "body")] == [None] * 6
    assert [key.tobytes() for key in corpus.keys(path, "body")] == [actcache.document_key(text) for text in TEXTS]


def test_lines(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes("\ufeffone\r\n\r\n  two \n   \nthree".encode())
    assert [document.text for document in corpus.read(path)] == ["one", "  two ", "three"]


def test_a_long_cell(tmp_path):
    path = tmp_path / "corpus.csv"
    path.write_text("body\n" + "x" * 500_000 + "\n")
    assert [len(document.text) for document in corpus.read(path, "body")] == [500_000]


def test_whole_numbers_are_ids(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"i": 17, "t": "x"}\n')
    assert [document.id for document in corpus.read(path, "t", "i")] == ["17"]


@pytest.mark.parametrize(
    ("name", "data", "field", "said"),
    [
        ("a.csv", b"x,y\n1,2\n", None, "--field"),
        ("a.csv", b"x,y\n1,2\n", "z", "'x', 'y'"),
        ("a.csv", b"", "z", "none"),
        ("a.csv", b"x,y\n1,2\n1\n", "y", "line 3"),
        ("a.csv", b'x\n"1\n', "x", "line"),
        ("a.csv", b"x\n\xff\n", "x", "line 2"),
        ("a.jsonl", b'{"x": "1"}\n{"y": 2}\n', "x", "line 2"),
        ("a.jsonl", b'{"x": 1}\n', "x", "line 1"),
        ("a.jsonl", b"[" * 100_000, "x", "line 1"),
        ("a.txt", b"ok\n\xff\xfe\n", None, "line 2"),
    ],
)
def test_errors_name_the_line(tmp_path, name, data, field, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DocumentError, match=said):
        list(corpus.read(tmp_path / name, field))


def test_what_is_not_there(tmp_path):
    with pytest.raises(DocumentError, match="cannot read"):
        list(corpus.read(tmp_path / "none"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DocumentError, match="--field"):
        list(corpus.read(tmp_path / "a.txt", None, "id"))
    (tmp_path / "a.jsonl").write_text('{"t": "x", "i": [1]}')
    with pytest.raises(DocumentError, match="an id"):
        list(corpus.read(tmp_path / "a.jsonl", "t", "i"))

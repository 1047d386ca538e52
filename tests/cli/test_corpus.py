"""Corpora as files: every kind of file gives the same documents, and errors name the line."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import actcache
from actcache.cli import corpus
from actcache.errors import DocumentError, MissingExtraError
from tests.cli.running import cachectl

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
    assert len(TEXTS) <= corpus.count(path) <= 2 * len(TEXTS) + 4


def test_lines(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes("\ufeffone\r\n\r\n  two \n   \nthree".encode())
    assert [document.text for document in corpus.read(path)] == ["one", "  two ", "three"]
    assert corpus.count(path) == 5
    assert corpus.count(Path("-")) is None


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


# --- Parquet, and datasets that Hugging Face's library saved ----------------------------------------------------------


def parquet(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The documents as Hugging Face's own library saves them: shuffled, in three files; and in splits."""
    folder = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_dict({"n": [*IDS, "7", None], "body": [*TEXTS, "", None]})
    mixed = whole.shuffle(seed=1).select([0, 1, 3, 4, 5, 6, 7])
    mixed.save_to_disk(folder / "mixed", num_shards=3)
    datasets.DatasetDict({"train": whole, "test": mixed}).save_to_disk(folder / "splits")
    expected = [(row["n"], row["body"]) for row in mixed if row["body"]]
    assert 4 < len(expected) < 7
    return folder, expected


def test_parquet(tmp_path):
    columns = {"n": [*IDS, "7", None], "other": [None] * 8, "body": [*TEXTS, "", None]}
    path = parquet(tmp_path / "corpus.parquet", columns, row_group_size=2)
    assert [(d.id, d.text) for d in corpus.read(path, "body", "n")] == list(zip(IDS, TEXTS, strict=True))
    assert [d.id for d in corpus.read(path, "body", "body")] == TEXTS
    assert [key.tobytes() for key in corpus.keys(path, "body")] == [actcache.document_key(text) for text in TEXTS]
    corpus.check(path, "body", "n")
    assert corpus.count(path) == 8


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_texts_of_other_types(tmp_path, kind):
    path = parquet(tmp_path / "c.PARQUET", {"a.b": pa.array(["x", "y", "x"]).cast(kind), "i": pa.array([3, 4, None])})
    assert [(d.id, d.text) for d in corpus.read(path, "a.b", "i")] == [("3", "x"), ("4", "y"), (None, "x")]


def test_a_saved_dataset(saved):
    folder, expected = saved
    assert [(d.id, d.text) for d in corpus.read(folder / "mixed", "body", "n")] == expected
    assert [(d.id, d.text) for d in corpus.read(folder / "splits" / "test", "body", "n")] == expected
    with pytest.raises(DocumentError, match=r"several splits \(train, test\).*splits/train"):
        corpus.check(folder / "splits", "body")


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_a_large_corpus_is_streamed(tmp_path, kind):
    """Of 64 MiB never more than a part is held, by Arrow's own account."""
    texts = [f"{number} " + "x" * 8192 for number in range(8_000)]
    if kind == "parquet":
        path = parquet(tmp_path / "large.parquet", {"t": texts}, compression="none", use_dictionary=False)
    else:
        path = tmp_path / "large"
        datasets.Dataset.from_dict({"t": texts}).save_to_disk(path)
    held = pa.total_allocated_bytes()
    most = 0
    for number, document in enumerate(corpus.read(path, "t")):
        assert document.text == texts[number]
        most = max(most, pa.total_allocated_bytes() - held)
    assert number == len(texts) - 1
    assert most < 24 << 20


@pytest.mark.parametrize(
    ("field", "id_field", "said"),
    [
        (None, None, "--field"),
        ("none", None, "no column 'none'; there are 'text', 'number', 'flag', 'bytes'"),
        ("number", None, "holds int64, not texts"),
        ("bytes", None, "holds binary"),
        ("text", "flag", "holds bool"),
        ("text", "none", "'none'"),
    ],
)
def test_columns_that_do_not_fit(tmp_path, field, id_field, said):
    columns = {"text": ["x"], "number": [1], "flag": [True], "bytes": [b"x"]}
    path = parquet(tmp_path / "c.parquet", columns)
    for look in (corpus.check, lambda *given: list(corpus.read(*given))):
        with pytest.raises(DocumentError, match=said):
            look(path, field, id_field)


def test_damaged_parquet_is_one_error(tmp_path):
    """Cut anywhere, or with any byte changed: the same documents, or one error."""
    texts = [f"text {number}" for number in range(50)]
    whole = parquet(tmp_path / "c.parquet", {"t": texts}).read_bytes()
    bad = [whole[:size] for size in range(0, len(whole), 37)]
    bad += [bytes([*whole[:i], whole[i] ^ 0x55, *whole[i + 1 :]]) for i in range(0, len(whole), 11)]
    for number, data in enumerate([*bad, b"no parquet at all"]):
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(data)
        with contextlib.suppress(DocumentError):
            assert len(list(corpus.read(path, "t"))) <= len(texts)
    with pytest.raises(DocumentError, match=r"cannot read .*No such file"):
        corpus.check(tmp_path / "none.parquet", "t")


def test_damaged_datasets_are_one_error(saved, tmp_path):
    folder, _ = saved
    for number, (name, change, said) in enumerate(
        [
            ("state.json", lambda data: b"{", "state.json is none"),
            ("state.json", lambda data: b"[]", "state.json is none"),
            ("state.json", lambda data: data.replace(b'"data-00000', b'"../data-00000'), "not in the folder"),
            ("data-00001-of-00003.arrow", lambda data: data[: len(data) - 300], "00001-of-00003.arrow"),
            ("data-00001-of-00003.arrow", lambda data: b"", "00001-of-00003.arrow"),
            ("data-00001-of-00003.arrow", None, "cannot read .*00001-of-00003.arrow"),
            ("state.json", None, "no state.json"),
        ]
    ):
        copy = tmp_path / str(number)
        shutil.copytree(folder / "mixed", copy)
        data = (copy / name).read_bytes()
        (copy / name).unlink()
        if change is not None:
            (copy / name).write_bytes(change(data))
        with pytest.raises(DocumentError, match=said):
            list(corpus.read(copy, "body"))


def test_without_pyarrow_the_command_to_install_it(tmp_path, monkeypatch):
    path = parquet(tmp_path / "c.parquet", {"t": ["x"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'actcache\[corpora\]'"):
        corpus.check(path, "t")


def test_pruning_keeps_what_a_parquet_corpus_holds(tmp_path):
    recipe = actcache.Recipe(model="m", layer=1, hidden_size=4, dtype="float32")
    keys = [actcache.document_key(text) for text in ("kept", "dropped")]
    with actcache.open(tmp_path / "store") as store, store.space(recipe) as space:
        space.put(keys, [np.ones((2, 4), np.float32)] * 2)
    path = parquet(tmp_path / "c.parquet", {"t": ["kept"]})
    done = cachectl("prune", tmp_path / "store", "--keep-only", path, "--field", "t", "--idle", 0, "--yes")
    assert done.code == 0, done.err
    with actcache.open(tmp_path / "store", "r") as store, store.space(recipe) as space:
        assert space.contains(keys).tolist() == [True, False]

"""The documents of a file are those that csv, json, pandas and datasets read from it, to the character."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

import actcache
from actcache.cli import corpus
from tests.cli.running import cachectl

datasets.disable_progress_bars()

CELLS = [
    "plain",
    "two\r\nlines",
    "two\nlines",
    "two\rlines",
    "ends with\r\n",
    "ends with\r",
    "\r\nbegins so",
    'with "quotes"',
    '"',
    "a, comma\tand a tab",
    " spaces ",
    "\u2028separator\u2029",
    "\x0b\x0c\x1c\x1d\x1e\x85",
    "a NUL \0 inside",
    "\ufeffmark inside",
    "żółć 東京 😀",
    "e\u0301 and é",
    "x" * 300_000,
    "   ",
]


def table(separator: str, end: str) -> bytes:
    """A table of the cells as the csv module writes it, blank lines between rows included."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=separator, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(["n", "body"])
    for number, cell in enumerate(CELLS):
        writer.writerow([number, cell])
        if number % 4 == 0:
            out.write(end)
    return out.getvalue().encode()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_tables_are_those_of_the_csv_module_and_of_pandas(tmp_path, suffix, separator, end, mark):
    path = tmp_path / f"c.{suffix}"
    path.write_bytes(mark + table(separator, end))
    found = [(one.id, one.text) for one in corpus.read(path, "body", "n")]
    with open(path, newline="", encoding="utf-8-sig") as file:
        assert found == [(row["n"], row["body"]) for row in csv.DictReader(file, delimiter=separator)]
    assert [text for _, text in found] == CELLS
    if end != "\r":  # pandas has no way to read that
        frame = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
        assert [text for _, text in found] == [cell for cell in frame["body"] if cell]


def test_tables_are_those_of_datasets(tmp_path):
    path = tmp_path / "c.csv"
    path.write_bytes(table(",", "\r\n"))
    read = datasets.Dataset.from_csv(str(path), cache_dir=str(tmp_path / "cache"))
    assert [one.text for one in corpus.read(path, "body")] == list(read["body"])


def test_cells_that_look_like_something_else_are_texts(tmp_path):
    """As docs/corpora.md says; without these options pandas and datasets find no texts, numbers and truth values."""
    cells = ["NA", "null", "None", "nan", "N/A", "2.50", "007", "True", "2020-01-01"]
    path = tmp_path / "c.csv"
    path.write_text("body\n" + "\n".join(cells) + "\n")
    assert [one.text for one in corpus.read(path, "body")] == cells
    assert list(pd.read_csv(path, keep_default_na=False, dtype=str)["body"]) == cells
    assert list(pd.read_csv(path)["body"]) != cells
    options = {"keep_default_na": False, "features": datasets.Features({"body": datasets.Value("string")})}
    read = datasets.Dataset.from_csv(str(path), cache_dir=str(tmp_path / "cache"), **options)
    assert list(read["body"]) == cells
    for texts in (cells, ["12", "13"]):
        path = tmp_path / f"{len(texts)}.jsonl"
        path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
        assert [one.text for one in corpus.read(path, "body")] == texts
        assert list(pd.read_json(path, lines=True, dtype=False)["body"]) == texts
        read = datasets.Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
        assert list(read["body"]) == texts


LINES = (
    "one\n\n  two \r\nthree\rfour\r\r\nfive\u2028six\u2029seven\n\x0beight\x0c\nnine\x1c\x1d\x1e\x85ten\n"
    "\ufeffeleven\n \t \nżółć 東京\na NUL \0 inside\nlast"
)


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "bom"])
@pytest.mark.parametrize("data", [LINES, LINES + "\n", LINES + "\r\n", LINES.replace("\n", "\r"), ""])
def test_lines_are_those_of_open_and_of_datasets(tmp_path, data, mark):
    path = tmp_path / "c.txt"
    path.write_bytes((mark + data).encode())
    found = [one.text for one in corpus.read(path)]
    with open(path, encoding="utf-8-sig") as file:
        assert found == [line.removesuffix("\n") for line in file if line.strip()]
    if data and not mark:
        read = datasets.Dataset.from_text(str(path), cache_dir=str(tmp_path / "cache"))
        assert found == [line for line in read["text"] if line.strip()]


def rows(texts: list[str | None]) -> list[dict[str, object]]:
    return [{"n": number, "body": text, "rest": {"a": [1, None]}} for number, text in enumerate(texts)]


@pytest.mark.parametrize("escaped", [True, False], ids=["ascii", "utf-8"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"], ids=["lf", "crlf", "blank"])
def test_json_lines(tmp_path, end, escaped):
    path = tmp_path / "c.jsonl"
    whole = "".join(json.dumps(row, ensure_ascii=escaped) + end for row in rows([*CELLS, "", None]))
    path.write_bytes(whole.encode())
    assert [(one.id, one.text) for one in corpus.read(path, "body", "n")] == [(str(n), c) for n, c in enumerate(CELLS)]
    assert [cell for cell in pd.read_json(path, lines=True)["body"] if isinstance(cell, str) and cell] == CELLS
    for name in ("c.json", "c.ndjson", "c.txt", "c"):
        path.rename(tmp_path / name)
        path = tmp_path / name
        assert [one.text for one in corpus.read(path, "body")] == CELLS


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_json_arrays(tmp_path, indent):
    """However it is laid out, and wherever it is cut into pieces while it is read."""
    path = tmp_path / "c.json"
    draw = random.Random(7)
    texts = [*CELLS, *("".join(draw.choices('ab"\\\n\té東😀{}[],:', k=draw.randrange(1, 3000))) for _ in range(200))]
    path.write_text(json.dumps(rows([*texts, "", None]), indent=indent, ensure_ascii=draw.random() < 0.5))
    assert [(one.id, one.text) for one in corpus.read(path, "body", "n")] == [(str(n), c) for n, c in enumerate(texts)]
    assert [cell for cell in pd.read_json(path)["body"] if isinstance(cell, str) and cell] == texts
    path.write_text(json.dumps([*texts, "", None], indent=indent))
    assert [(one.id, one.text) for one in corpus.read(path)] == [(None, text) for text in texts]
    path.write_text("[]")
    assert list(corpus.read(path)) == list(corpus.read(path, "body")) == []


def test_columns(tmp_path):
    held = pa.table({"n": list(range(len(CELLS) + 2)), "body": [*CELLS, "", None]})
    pq.write_table(held, tmp_path / "c.parquet")
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as out, pa.ipc.new_file(out, held.schema) as file:
        file.write_table(held, 5)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as out, pa.ipc.new_stream(out, held.schema) as stream:
        stream.write_table(held, 5)
    feather.write_feather(held, str(tmp_path / "c.feather"), compression="zstd")
    for name in ("c.parquet", "file.arrow", "stream.arrow", "c.feather"):
        found = [(one.id, one.text) for one in corpus.read(tmp_path / name, "body", "n")]
        assert found == [(str(number), cell) for number, cell in enumerate(CELLS)]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "txt"])
def test_pruning_keeps_what_others_read_from_the_file(tmp_path, suffix):
    """What csv, json or ``open`` read from the corpus was stored; nothing of it goes."""
    path, options = tmp_path / f"c.{suffix}", [] if suffix == "txt" else ["--field", "body"]
    if suffix == "csv":
        path.write_bytes(table(",", "\r\n"))
        with open(path, newline="") as file:
            texts = [row["body"] for row in csv.DictReader(file)]
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\r\n" for row in rows(list(CELLS))), newline="")
        texts = [json.loads(line)["body"] for line in path.read_text().split("\n") if line]
    else:
        path.write_bytes(LINES.encode())
        texts = [line for line in path.read_text().split("\n") if line.strip()]  # its line ends are translated
    recipe = actcache.Recipe(model="m", layer=1, hidden_size=4, dtype="float32")
    keys = [actcache.document_key(text) for text in [*texts, "another"]]
    with actcache.open(tmp_path / "store") as store, store.space(recipe) as space:
        space.put(keys, [np.ones((2, 4), np.float32)] * len(keys))
    done = cachectl("prune", tmp_path / "store", "--keep-only", path, *options, "--idle", 0, "--yes")
    assert done.code == 0, done.err
    with actcache.open(tmp_path / "store", "r") as store, store.space(recipe) as space:
        assert space.contains(keys).tolist() == [True] * len(texts) + [False]


def test_a_one_line_array_is_streamed(tmp_path):
    """Of one line of 30 MB never more than a part is held."""
    import tracemalloc

    path = tmp_path / "c.json"
    with open(path, "w") as file:
        file.write("[" + ",".join(json.dumps({"body": f"{n} " + "x" * 3000}) for n in range(10_000)) + "]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in corpus.read(Path(path), "body")) == 10_000
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()

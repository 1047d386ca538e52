"""What a file does not say for certain is not guessed: it is refused, before the work, in every command."""

from __future__ import annotations

import json
import os

import numpy as np
import pandas as pd
import pytest

import actcache
from actcache.cli import corpus
from actcache.errors import DocumentError
from tests.cli.running import cachectl

OBJECT = b'{"id": 1, "text": "x"}\n'
NAMED = r"'id', 'text'"


@pytest.mark.parametrize(
    ("name", "data", "field", "said"),
    [
        # no field is named, and there are some
        ("a.jsonl", OBJECT * 9, None, NAMED),
        ("a.jsonl", b"\n\n" + OBJECT, None, rf"line 3: .*{NAMED}"),
        ("a.ndjson", OBJECT, None, NAMED),
        ("a.json", OBJECT, None, NAMED),
        ("a.json", b"[" + OBJECT + b"]", None, NAMED),
        ("a.json", json.dumps([json.loads(OBJECT)], indent=4).encode(), None, rf"line 2: .*{NAMED}"),
        ("a.json", b'["x", ' + OBJECT + b"]", None, NAMED),
        ("a.txt", OBJECT * 9, None, rf"{NAMED}.*--format text"),
        ("a.txt", b"\xef\xbb\xbf" + OBJECT, None, NAMED),
        ("a", OBJECT, None, NAMED),
        ("a.txt", b'[\n {"text": "x"}\n]', None, "--format json"),
        ("a.csv", b"id,text\n1,x\n", None, NAMED),
        ("a.tsv", b"id\ttext\n1\tx\n", None, NAMED),
        ("a.csv", b"id,text\n1,x\n", "", "empty"),
        # another one is named
        ("a.jsonl", OBJECT, "body", rf"no field 'body'; there are {NAMED}"),
        ("a.jsonl", OBJECT, "Text", "write it 'text'"),
        ("a.jsonl", OBJECT * 2 + b'{"id": 1}', "text", "line 3: there is no field 'text'; there are 'id'"),
        ("a.csv", b"Text \n1\n", "text", "write it 'Text '"),
        ("a.txt", b"plain\n", "text", "line 1 is no JSON .* --format"),
        ("a.txt", b"id,text\n1,x\n", "text", "line 1 is no JSON .* --format"),
        # what stands under it is no text
        ("a.jsonl", OBJECT, "id", "line 1: the field 'id' holds a number"),
        ("a.jsonl", b'{"text": 1.5}', "text", "holds a number"),
        ("a.jsonl", b'{"text": true}', "text", "holds true or false"),
        ("a.jsonl", b'{"text": ["two", "words"]}', "text", "holds a list"),
        ("a.jsonl", b'{"a": {"b": "x"}}', "a", "holds an object, not a text; the fields inside of it \\('b'\\)"),
        ("a.jsonl", b'{"a": {"b": "x"}}', "a.b", "no field 'a.b'; .*flatten"),
        ("a.json", b'{"data": [{"text": "x"}]}', "text", "there are 'data'"),
        ("a.json", b'{"text": {"0": "x", "1": "y"}}', "text", "holds an object"),  # of pandas, by columns
        ("a.json", b'["x", 3]', None, "holds a number"),
        ("a.json", b'["x"]', "text", "holds a text, not an object .*leave --field out"),
        ("a.jsonl", b'["x", "y"]', None, "--format json"),
        ("a.jsonl", b'["x", "y"]', "text", "--format json"),
        ("a.jsonl", b'"x"', "text", "leave --field out"),
        ("a.jsonl", b'{"text": "\\ud800"}', "text", r"line 1: .*half a character \(\\ud800\)"),
        ("a.json", b'["\\udc00"]', None, "half a character"),
        # it stands there twice
        ("a.jsonl", b'{"text": "x", "text": "y"}', "text", "'text' stands there more than once"),
        ("a.json", b'[{"text": "x", "text": "y"}]', "text", "'text' stands there more than once"),
        ("a.csv", b"text,text\nx,y\n", "text", "more than one column 'text'"),
        ("a.csv", b"id,text,id\n1,x,2\n", "id", "more than one column 'id'"),
        # rows that another separator, or a line end without quotes, has torn apart
        ("a.csv", b"id,text\n1,x\n2,half, of it\n", "text", "line 3: the row has too many columns, 3, where .* 2"),
        ("a.csv", b"id,text\n1,half\nof it\n", "id", "line 3: the row has too few columns, 1"),
        ("a.csv", b'id,text\n1,"x\n\ny"\n2\n', "text", "line 5"),
        ("a.csv", b'id,text\n1,"x\n', "text", "begins in line 2"),
        ("a.csv", b'id,text\n1,"x"y\n', "text", "begins in line 2"),
        # no JSON after all
        ("a.json", b'[{"text": "x"},\n{"text": "y"\n', "text", "line 2: no JSON"),
        ("a.json", b'[{"text": "x"}\n{"text": "y"}]', "text", "line 2: no JSON array"),
        ("a.json", b'[{"text": "x"},]', "text", "no JSON"),
        ("a.json", b'[{"text": "x"}', "text", "no JSON array"),
        ("a.json", b'["x"]\nmore', None, "line 2: something stands behind"),
        ("a.json", b"[" * 100_000, None, "no JSON"),
        ("a.json", b'["x", "' + b"y" * 300_000, None, "Unterminated"),
        # other encodings
        ("a.txt", "żółć".encode("utf-16"), None, "UTF-16"),
        ("a.txt", "text".encode("utf-16-le"), None, "UTF-16"),
        ("a.csv", "text\nx\n".encode("utf-16-be"), "text", "UTF-16"),
        ("a.jsonl", OBJECT.decode().encode("utf-32"), "text", "UTF-16"),
        ("a.json", '["żółć",\n"żółć"]'.encode("iso8859-2"), None, "line 1 is not UTF-8"),
        ("a.json", b'["x",\n"abc\xff"]', None, "line 2 is not UTF-8 .byte 0xff after 4 characters"),
        ("a.csv", b'id,text\n1,"x\n\xe9"\n', "text", "line 3 is not UTF-8"),
        ("a.txt", b"ends within \xc5", None, "line 1 is not UTF-8"),
    ],
)
def test_files(tmp_path, name, data, field, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DocumentError, match=said) as failure:
        list(corpus.read(tmp_path / name, field))
    if field != "":
        assert str(failure.value).startswith(f"{tmp_path / name}: ")


@pytest.mark.parametrize(
    ("name", "data", "field", "texts"),
    [
        ("a.csv", b"id,text,id\n1,x,2\n", "text", ["x"]),  # what is not asked for may stand twice
        ("a.csv", b",text\n0,x\n", "text", ["x"]),  # as pandas writes its index
        ("a.csv", b"\n\ntext\nx\n", "text", ["x"]),
        ("a.jsonl", b'{"a": 1, "a": 2, "text": "x"}', "text", ["x"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n{"text": ""}\n', "text", ["x"]),
        ("a.jsonl", b'{"a.b": "x", "a": {"b": "y"}}', "a.b", ["x"]),
        ("a.jsonl", b'"x"\n"y"\n', None, ["x", "y"]),
        ("a.json", OBJECT * 2, "text", ["x", "x"]),  # lines, whatever the name says
        ("a.json", json.dumps(json.loads(OBJECT), indent=1).encode() * 2, "text", ["x", "x"]),
        ("a.json", b"", "text", []),
        ("a.txt", b"{not JSON}\n", None, ["{not JSON}"]),
        ("a.txt", OBJECT + b"and prose\n", None, [OBJECT.decode().strip(), "and prose"]),
        ("a.txt", b"[1]\n[2]\n", None, ["[1]", "[2]"]),
    ],
)
def test_what_is_certain_is_read(tmp_path, name, data, field, texts):
    (tmp_path / name).write_bytes(data)
    assert [one.text for one in corpus.read(tmp_path / name, field)] == texts


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a"])
def test_lines_are_texts_where_somebody_says_so(tmp_path, name):
    (tmp_path / name).write_bytes(OBJECT * 2)
    found = [one.text for one in corpus.read(tmp_path / name, format="text")]
    assert found == [OBJECT.decode().strip()] * 2


def test_a_table_of_pandas(tmp_path):
    """As it is written without a further word: an index without a name, line ends in cells."""
    frame = pd.DataFrame({"text": ["one\r\ntwo", 'a "b", c', "x"], "label": [1, 0, 1]})
    frame.to_csv(tmp_path / "a.csv")
    assert [one.text for one in corpus.read(tmp_path / "a.csv", "text", "label")] == list(frame["text"])
    frame.to_json(tmp_path / "a.json", orient="records")
    assert [one.text for one in corpus.read(tmp_path / "a.json", "text", "label")] == list(frame["text"])


# --- every command that takes a corpus --------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    recipe = actcache.Recipe(model="m", layer=1, hidden_size=4, dtype="float32")
    with actcache.open(tmp_path / "store") as store, store.space(recipe) as space:
        space.put([actcache.document_key("x")], [np.ones((2, 4), np.float32)])
    return tmp_path / "store"


COMMANDS = {
    "fill": lambda store, source: ("fill", store, source, "--model", "none", "--layer", 1),
    "fill --dry-run": lambda store, source: ("fill", store, source, "--model", "none", "--layer", 1, "--dry-run"),
    "plan": lambda store, source: ("plan", source, "--model", "none", "--layer", 1),
    "prune": lambda store, source: ("prune", store, "--keep-only", source, "--idle", 0, "--yes"),
    "prune --dry-run": lambda store, source: ("prune", store, "--keep-only", source, "--dry-run"),
    "repair": lambda store, source: ("repair", store, "--corpus", source),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(store, tmp_path, command):
    """Before the model is loaded, of which there is none here, and nothing is deleted."""
    arguments = COMMANDS[command]
    for name, data in (("a.jsonl", OBJECT), ("a.txt", OBJECT), ("a.csv", b"id,text\n1,x\n"), ("a.json", OBJECT)):
        (tmp_path / name).write_bytes(data)
        assert "'id', 'text'" in cachectl(*arguments(store, tmp_path / name)).refused(2)
    for source, said in (
        (tmp_path / "none", "cannot read"),
        (f"{tmp_path}/*.parquet", "no file matches"),
        (f"{tmp_path}/a.*", "several kinds"),
        ("", "names no file"),
    ):
        assert said in cachectl(*arguments(store, source), "--field", "text").refused(2)
    assert "'yaml'" in cachectl(*arguments(store, tmp_path / "a.csv"), "--format", "yaml").refused(2)
    recipe = actcache.Recipe(model="m", layer=1, hidden_size=4, dtype="float32")
    with actcache.open(store, "r") as opened, opened.space(recipe) as space:
        assert len(space) == 1


def test_options_that_go_with_a_corpus(store):
    for command in (("prune", store), ("repair", store)):
        for option in (("--field", "text"), ("--format", "csv")):
            assert "are for --" in cachectl(*command, *option).refused(2)


def test_standard_input(tmp_path, monkeypatch):
    """The same rules; a table is read by its --format."""
    path = tmp_path / "given"
    monkeypatch.setattr("actcache.cli.corpus.files.os.dup", lambda _: os.open(path, os.O_RDONLY))

    def read(data, *given, **options):
        path.write_bytes(data)
        return [one.text for one in corpus.read("-", *given, **options)]

    with pytest.raises(DocumentError, match="standard input: its lines are JSON objects"):
        read(OBJECT)
    assert read(OBJECT, "text") == ["x"]
    assert read(b"id,text\n1,x\n", "text", format="csv") == ["x"]
    with pytest.raises(DocumentError, match="name the column"):
        corpus.check("-", format="csv")
    corpus.check("-", "text", format="csv")
    assert read(b"one\r\ntwo") == ["one", "two"]
    with pytest.raises(DocumentError, match="zcat"):
        read(b"\x1f\x8b\x08\0")


def test_the_console_says_it_in_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(OBJECT)
    done = cachectl("fill", tmp_path / "s", tmp_path / "a.jsonl", "--model", "none", "--layer", 1)
    assert done.refused(2) == (
        f"cachectl: error: {tmp_path}/a.jsonl: line 1: name the field of the texts with --field (field= in Python); "
        "there are 'id', 'text'"
    )
    assert not (tmp_path / "s").exists()

"""cachectl: what it prints, where, and with which exit code. Run as a process."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest

import actcache
import actcache.models.recycler  # for the forks
from actcache.cli import main
from bench.docstrings import docstrings
from tests.cli.running import cachectl as in_process
from tests.support.tiny import HIDDEN, save_tiny

COMMAND = [sys.executable, "-c", "from actcache.cli import main; main()"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}


def cachectl(*arguments: object, text: str | None = None, closed: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command in a fork of this process, which has imported already what takes a command seconds to import.

    Args:
        closed: it has no standard input.
    """
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write((text or "").encode())
        given.seek(0)
        child = os.fork()
        if not child:
            status = 70
            try:
                for number, file in enumerate((given, out, err)):
                    os.dup2(file.fileno(), number)
                sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
                if closed:
                    os.close(0)
                    sys.stdin = None
                sys.argv = ["cachectl", *map(str, arguments)]
                os.environ.update(ENVIRONMENT)
                try:
                    main()
                except SystemExit as stop:
                    status = int(stop.code or 0)
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
    return subprocess.CompletedProcess(list(map(str, arguments)), status, *texts)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def fill(model: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(store: Path, source: object, *options: object, text: str | None = None) -> Any:
        return cachectl("fill", store, source, "--model", model, "--layer", 3, *options, text=text)

    return run


def refused(result: subprocess.CompletedProcess[str], code: int) -> str:
    """Check for one line on stderr, no traceback, and the exit code; return the line."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("cachectl: error: ")]
    assert result.returncode == code, result.stderr
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text file of 60 real docstrings, one a line, with blank lines and one text twice."""
    texts = dict.fromkeys(" ".join(text.split())[:300] for _, (_, text) in zip(range(60), docstrings(), strict=False))
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n".join([*texts, next(iter(texts))]) + "\n")
    return path


@pytest.fixture(scope="module")
def filled(corpus: Path, fill: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    store = tmp_path_factory.mktemp("stores") / "filled"
    result = fill(store, corpus, "--json")
    assert result.returncode == 0, result.stderr
    return store, json.loads(result.stdout)


def test_fill_stores_every_line_once(corpus, filled):
    store, report = filled
    texts = list(dict.fromkeys(line for line in corpus.read_text().splitlines() if line))
    assert (report["documents"], report["computed"], report["present"]) == (len(texts) + 1, len(texts), 1)
    segments = list(store.glob("spaces/*/segments/*.h5"))
    with h5py.File(segments[0]) as file:
        stored = {key.tobytes() for key in file["keys"][:]}
        assert file["values"].shape == (report["tokens"], HIDDEN)
    assert stored == {actcache.document_key(text) for text in texts}


def test_fill_again_computes_nothing(corpus, filled, fill):
    store, report = filled
    again = json.loads(fill(store, corpus, "--json").stdout)
    assert (again["computed"], again["present"], again["spaces"]) == (0, report["documents"], report["spaces"])


def test_json_lines_and_standard_input(corpus, filled, fill):
    """The same documents from another kind of source are the same documents."""
    store, _ = filled
    lines = "".join(json.dumps({"id": 1, "body": line}) + "\n" for line in corpus.read_text().splitlines())
    for source, text in (("-", lines), (store.parent / "corpus.jsonl", None)):
        if text is None:
            Path(source).write_text(lines)
        result = fill(store, source, "--field", "body", "--json", text=text)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["computed"] == 0


def test_too_long_documents_are_the_callers_choice(fill, tmp_path):
    source = tmp_path / "long.txt"
    source.write_text("short\n" + "w " * 600 + "\n")
    line = refused(fill(tmp_path / "store", source), 2)
    assert "truncate" in line
    assert "windows" in line
    for options, entries in ((["--too-long", "truncate"], 2), (["--too-long", "windows", "--max-length", 100], 8)):
        store = tmp_path / options[1]
        assert fill(store, source, *options).returncode == 0
        spaces = json.loads(cachectl("inspect", store, "--json").stdout)["spaces"]
        assert [space["entries"] for space in spaces] == [entries]


def test_inspect(filled):
    store, report = filled
    shown = json.loads(cachectl("inspect", store, "--json").stdout)
    (space,) = shown["spaces"]
    assert (space["space"], space["entries"], space["tokens"]) == (
        report["spaces"][0]["space"],
        report["computed"],
        report["tokens"],
    )
    assert space["nbytes"] == sum(path.stat().st_size for path in store.glob("spaces/*/segments/*"))
    assert space["identity"]["layer"] == 3
    table = cachectl("inspect", store)
    assert table.returncode == 0
    for fact in (report["spaces"][0]["space"], "layer_norm_eps=1e-12", f"{report['tokens']:,}", "transformers"):
        assert fact in table.stdout


def test_bad_input_is_one_line_and_an_exit_code(corpus, fill, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "todo.txt").write_text("no store")
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "actcache.json").write_text('{"format": "actcache", "format_version": 99, "backend": "hdf5"}')
    assert "cachectl fill makes one" in refused(cachectl("inspect", tmp_path / "absent"), 3)
    assert "no store" in refused(cachectl("inspect", notes), 3)
    assert "upgrade actcache" in refused(cachectl("inspect", newer), 4)
    assert "installed are" in refused(cachectl("inspect", "tape:./x"), 2)
    assert "layers 1..4" in refused(fill(tmp_path / "s", corpus, "--layer", 6), 2)
    assert "float16" in refused(fill(tmp_path / "s", corpus, "--dtype", "float12"), 2)
    assert "cannot read" in refused(fill(tmp_path / "s", tmp_path / "absent.txt"), 2)
    assert "'body'" in refused(fill(tmp_path / "s", "-", "--field", "body", text='{"text": "a"}\n'), 2)
    refused(cachectl("fill", tmp_path / "s", corpus, "--model", tmp_path / "no-model", "--layer", 3), 5)
    refused(cachectl("fill", tmp_path / "s"), 2)
    refused(cachectl("bogus"), 2)
    assert not (notes / "actcache.json").exists()


def test_text_files_of_all_kinds(fill, tmp_path):
    """A document is its line as it stands: what Python reads from the file is found in the store."""
    options = ["--layer", 1, "--json"]
    for name, data, texts in (
        ("bom.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\r\n", ["one", "two"]),
        ("spaces.txt", b"  indented \n \n\ttab", ["  indented ", "\ttab"]),
    ):
        (tmp_path / name).write_bytes(data)
        report = json.loads(fill(tmp_path / "store", tmp_path / name, *options).stdout)
        assert (report["documents"], report["computed"]) == (2, 2)
        with actcache.open(tmp_path / "store", mode="r") as store, store.space(store.recipes()[0]) as space:
            assert space.contains([actcache.document_key(text) for text in texts]).all()
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"t": "one"}\n')
    assert json.loads(fill(tmp_path / "store", tmp_path / "bom.jsonl", "--field", "t", *options).stdout)["present"] == 1
    (tmp_path / "latin.txt").write_bytes("fine\nna\xefve\n".encode("latin-1"))
    assert "line 2 is not UTF-8" in refused(fill(tmp_path / "store", tmp_path / "latin.txt", *options), 2)


def test_no_standard_input(model, tmp_path):
    given = ["fill", tmp_path / "s", "-", "--model", model, "--layer", 1]
    assert "cannot read" in refused(cachectl(*given, closed=True), 2)


def test_models_that_cannot_be_used(corpus, model, fill, tmp_path):
    broken = shutil.copytree(model, tmp_path / "model")
    (broken / "model.safetensors").write_bytes(b"truncated")
    arguments = ["fill", tmp_path / "s", corpus, "--model", broken, "--layer", 1]
    assert "cannot be loaded" in refused(cachectl(*arguments), 5)
    assert "cannot be moved" in refused(fill(tmp_path / "s", corpus, "--device", "potato"), 5)
    assert "--too-long windows" in refused(fill(tmp_path / "s", corpus, "--stride", 5), 2)


def test_a_reader_that_goes_away_is_no_failure(filled):
    store, _ = filled
    for options in ((), ("--json",)):
        reading, writing = os.pipe()
        os.close(reading)
        try:
            command = [*COMMAND, "inspect", str(store), *options]
            result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        finally:
            os.close(writing)
        assert (result.returncode, result.stderr) == (0, "")


def test_help_has_an_example():
    for command in ("fill", "inspect"):
        result = cachectl(command, "--help")
        assert result.returncode == 0
        assert f"cachectl {command} ./activations" in result.stdout


def test_an_interrupted_fill_goes_on(model, tmp_path):
    """Ctrl-C: one line, exit code 130, and the next run computes only the rest."""
    texts = [f"document number {number}" for number in range(2100)]  # a little more than fill looks at in one go
    arguments = ["fill", str(tmp_path / "store"), "-", "--model", str(model), "--layer", "1", "--json"]
    command = [*COMMAND, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    process.stdin.write("\n".join(texts) + "\n")
    process.stdin.flush()  # and stays open: what has come is computed, then fill waits for more
    _wait_until_idle(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "run it again to go on" in errors
    assert "Traceback" not in errors
    stored = in_process("inspect", tmp_path / "store", "--json").json()["spaces"][0]["entries"]
    assert 0 < stored < len(texts)
    (tmp_path / "corpus.txt").write_text("\n".join(texts))
    report = in_process(*(tmp_path / "corpus.txt" if given == "-" else given for given in arguments)).json()
    assert (report["present"], report["computed"]) == (stored, len(texts) - stored)


def _wait_until_idle(pid: int, deadline: float = 120) -> None:
    """Return when a process that has worked for a while stops using the processor."""
    process, end = psutil.Process(pid), time.monotonic() + deadline
    before = 0.0
    while time.monotonic() < end:
        time.sleep(1)
        used = sum(process.cpu_times()[:2])
        if used - before < 0.02 and used > 1:
            return
        before = used
    raise AssertionError("the process never came to rest")


def test_a_forecast_stores_nothing_and_a_collection_keeps_order_and_ids(corpus, model, tmp_path, monkeypatch):
    """Of a CSV file whose first half is there: the rest is forecast, filled, and can be walked without its texts."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    texts = list(dict.fromkeys(line for line in corpus.read_text().splitlines() if line))[:12]
    rows = [*texts[6:], *texts[:6], texts[0]]
    with open(tmp_path / "corpus.csv", "w", newline="") as file:
        csv.writer(file).writerows([["name", "body"], *([f"n{i}", text] for i, text in enumerate(rows))])
    (tmp_path / "half.txt").write_text("\n".join(texts[:6]))
    store = tmp_path / "store"
    options = ["--model", model, "--layer", 3]
    table = ["fill", store, tmp_path / "corpus.csv", *options, "--field", "body", "--json"]
    nothing = in_process(*table, "--dry-run").json()
    assert (nothing["documents"], nothing["present"]) == (12, 0)
    assert not store.exists()
    assert in_process("fill", store, tmp_path / "half.txt", *options, "--json").json()["computed"] == 6
    before = sorted(store.rglob("*"))
    half = in_process(*table, "--dry-run").json()
    assert (half["documents"], half["present"]) == (12, 6)
    assert sorted(store.rglob("*")) == before
    assert "--field" in in_process("fill", store, tmp_path / "corpus.csv", *options).refused(2)
    assert "no name" in in_process(*table, "--collection", "a/b").refused(2)
    in_process("fill", tmp_path / "none", tmp_path / "half.txt", "--model", tmp_path / "none", "--layer", 1).refused(5)
    assert not (tmp_path / "none").exists()
    done = in_process(*table, "--collection", "all", "--id-field", "name").json()
    assert (done["computed"], done["present"], done["tokens"]) == (6, 7, half["tokens"])
    assert half["nbytes"] == pytest.approx(done["tokens"] * (HIDDEN * 2 + 4), rel=0.05)
    with actcache.open(store, "r") as opened:
        held = opened.collection("all")
        assert [key.tobytes() for key in held.keys] == [actcache.document_key(text) for text in rows]
        assert held.ids == [f"n{i}" for i in range(13)]
        with opened.space(opened.recipes()[0]) as space:
            assert [len(batch) for batch in space.reader(held.keys, batch_size=5)] == [5, 5, 3]
    windows = ["--too-long", "windows", "--max-length", 16, "--stride", 4, "--collection", "windows"]
    in_process("fill", tmp_path / "cut", tmp_path / "corpus.csv", *options, "--field", "body", *windows)
    with actcache.open(tmp_path / "cut", "r") as opened, opened.space(opened.recipes()[0]) as space:
        keys = opened.collection("windows").keys
        assert len(keys) > 13
        assert space.contains(keys).all()
        assert len(np.unique(keys, axis=0)) == len(space)

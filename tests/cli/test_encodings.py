"""A terminal, pipe or locale that lacks characters: every command still says what it has to say, and ends as it would.

Whatever has a name has one that ASCII and cp1252 lack: stores, corpora, models, files that are written. A new command
fails here until somebody says how it is called.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import actcache
from actcache.admin.benchmark import SHAPES, Shape
from actcache.cli import COMMANDS
from actcache.io.progress import Meter
from actcache.models.progress import FillProgress
from tests.cli.running import Pipe, Result, cachectl
from tests.support import ids, key, recipe, rows
from tests.support.backends import each
from tests.support.tiny import save_tiny

NAME = os.fsdecode("sé-日本-".encode() + b"\xff")  # its end is no UTF-8: Python has it as a surrogate
MODEL = "modèle-日本"

FINGERPRINT = recipe(model=MODEL).fingerprint

#: How each command is called: in a folder where the store and corpus NAME lie, and the model MODEL.
GIVEN: dict[str, Callable[[str], list[list[object]]]] = {
    "fill": lambda name: [
        ["fill", f"new-{name}", f"{name}.txt", "--model", MODEL, "--layer", 2, *more]
        for more in (["--dry-run"], ["--collection", "corpus"], ["--json"])
    ],
    "ls": lambda name: [["ls", name, *more] for more in ([], ["--tree"], ["--json"], ["--space", FINGERPRINT])],
    "inspect": lambda name: [
        ["inspect", name, *more] for more in ([], ["--all"], ["--key", key(1).hex()], ["--html", f"{name}.html"])
    ],
    "du": lambda name: [["du", name], ["du", name, "--json"]],
    "verify": lambda name: [["verify", name]],
    "repair": lambda name: [["repair", name], ["repair", name, "--corpus", f"{name}.txt", "--model", MODEL]],
    "compact": lambda name: [["compact", name]],
    "migrate": lambda name: [["migrate", name, f"other-{name}"]],
    "export": lambda name: [
        ["export", name, f"{name}.safetensors"],
        ["export", name, f"{name}.parquet", "--collection", "named"],
    ],
    "import": lambda name: [["export", name, f"{name}.npz"], ["import", f"copy-{name}", f"{name}.npz"]],
    "prune": lambda name: [
        ["prune", name, "--idle", 0, "--keep-only", f"{name}.txt", "--dry-run"],
        ["prune", name, "--idle", 0, "--where", f"model={MODEL}", "--yes"],
    ],
    "pin": lambda name: [["pin", name, FINGERPRINT]],
    "unpin": lambda name: [["unpin", name, FINGERPRINT]],
    "plan": lambda name: [
        ["plan", f"{name}.txt", "--model", MODEL, "--layer", 2, "--read", "1GB", "--write", "1GB"],
        ["plan", "--paper"],
    ],
    "bench": lambda name: [
        ["bench", ".", "--backend", "hdf5", "--shape", "tiny", "--size", "1MiB", "--rounds", 1, "--mode", "warm"]
    ],
    "doctor": lambda name: [["doctor", name], ["doctor", name, "--json"]],
}

#: What fails, and names what it fails for.
WRONG: list[Callable[[str], list[object]]] = [
    lambda name: ["ls", f"none-{name}"],
    lambda name: ["ls", f"{name}.txt"],
    lambda name: ["import", "x", f"none-{name}.npz"],
    lambda name: ["fill", "x", f"none-{name}", "--model", MODEL, "--layer", 1],
    lambda name: ["fill", "x", f"{name}.txt", "--model", f"none-{name}", "--layer", 1],
    lambda name: ["fill", "x", f"{name}.txt", "--model", MODEL, "--layer", name],
    lambda name: ["inspect", name, "--space", name],
    lambda name: ["export", name, "x.npz", "--collection", name],
    lambda name: [name],
    lambda name: ["ls", f"{name}:somewhere"],
]

each_encoding = pytest.mark.parametrize(
    "encoding",
    ["ascii", *(pytest.param(name, marks=pytest.mark.long) for name in ("utf-8", "cp1252"))],  # which has é, and no 日
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stores, corpora and a model of such names."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny(folder / MODEL)
    try:
        make(folder / NAME)
    except OSError as error:  # a file system that takes UTF-8 alone
        pytest.skip(str(error))
    (folder / f"{NAME}.txt").write_text("one é\ntwo 日本\nthree\n", encoding="utf-8")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working directory."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(SHAPES, "tiny", Shape("tiny", 8, 48, 384, 32))
    return tmp_path / "here"


def make(url: object) -> None:
    with actcache.open(str(url)) as store:
        with store.space(recipe(model=MODEL, provenance={"who": "Zoë 日本"})) as space:
            space.put([key(n) for n in range(6)], [rows(n) for n in range(6)], [ids(n) for n in range(6)])
        store.put_collection("named", [key(1), key(2)], ["zwölf", "日本"])


def check(result: Result, *, code: int = 0) -> None:
    assert result.code == code, (result.code, result.err)
    assert "Traceback" not in result.err
    assert "PYTHONIOENCODING" not in result.err


@pytest.mark.usefixtures("here")
@each_encoding
@pytest.mark.parametrize("command", [one.__name__ for one in COMMANDS])
def test_every_command_ends_as_it_would(command: str, encoding: str) -> None:
    assert command in GIVEN, f"say in GIVEN how {command} is called"
    for arguments in GIVEN[command](NAME):
        result = cachectl(*arguments, encoding=encoding)
        check(result)
        if "--json" in arguments:
            json.loads(result.out)
    check(cachectl(command, "--help", encoding=encoding))


@pytest.mark.usefixtures("here")
@each_encoding
def test_what_fails_says_so_in_one_line(encoding: str) -> None:
    for wrong in WRONG:
        expected = cachectl(*wrong(NAME))
        assert expected.code in (2, 3, 4, 5), wrong(NAME)
        cachectl(*wrong(NAME), encoding=encoding).refused(expected.code)


@each()
def test_stores_of_every_backend(kind: Any, tmp_path: Path) -> None:
    """The libraries below take such names, too."""
    url = kind.url(tmp_path / NAME)
    make(url)
    for command in (["ls", url], ["inspect", url, "--all"], ["verify", url], ["compact", url], ["doctor", url]):
        check(cachectl(*command, encoding="ascii"), code=0)
    target = f"{url}-too"
    check(cachectl("migrate", url, target, encoding="ascii"), code=0)
    with actcache.open(target, "r") as store, store.space(recipe(model=MODEL)) as space:
        np.testing.assert_array_equal(space.get([key(3)])[0].activations, rows(3))


@pytest.mark.usefixtures("here")
def test_what_is_shown() -> None:
    """Escapes for what an encoding lacks, in columns that are as wide as they look; everything where it has all."""
    shown = {
        "ascii": ("s\\xe9-\\u65e5\\u672c-\\udcff", "mod\\xe8le-\\u65e5\\u672c"),
        "cp1252": ("sé-\\u65e5\\u672c-\\udcff", "modèle-\\u65e5\\u672c"),
        "utf-8": ("sé-日本-\\udcff", MODEL),
        None: ("sé-日本-\\udcff", MODEL),
    }
    for encoding, (name, model) in shown.items():
        text = cachectl("ls", NAME, encoding=encoding).out
        head, row = (next(line for line in text.splitlines() if one in line) for one in ("layer", "float32"))
        assert text.startswith(name)
        assert model in row
        wide = 2 if model == MODEL else 0  # of these characters, one takes two columns
        assert head.index("dtype") == row.index("float32") + wide
    assert cachectl("du", NAME, "--json", encoding="ascii").json()["store"] == NAME


@pytest.mark.usefixtures("here")
def test_a_page_is_utf8_whatever_the_terminal() -> None:
    check(cachectl("inspect", NAME, "--html", "page.html", encoding="ascii"))
    text = Path("page.html").read_bytes().decode("utf-8")
    assert MODEL in text
    assert "sé-日本-\N{REPLACEMENT CHARACTER}" in text


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_progress_bars(encoding: str) -> None:
    """On a terminal that lacks the bar's characters."""
    pipe = Pipe(encoding)
    console = Console(file=pipe, force_terminal=True, width=100)
    with Meter("verify", "entries", console=console) as meter:
        meter("0123", 0, 10)
        meter._began -= 5
        meter("0123", 5, 10)
    with FillProgress(10, console=console) as fill:
        fill.advance(5, 5, 100)
    assert "verify" in pipe.getvalue()
    assert "fill" in pipe.getvalue()


LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SCRIPT = "from actcache.cli import main; main()"


def test_as_a_process_in_the_c_locale(tmp_path: Path) -> None:
    """As a user wrote it: where file names and streams are ASCII, and where they are cp1252. Texts are UTF-8 there."""
    make(tmp_path / "sé")
    with actcache.open(tmp_path / "sé") as store, store.space(recipe(model=MODEL)) as space:
        space.put([actcache.document_key("é")], [rows(7)])
    for options, arguments in (
        ({"PYTHONIOENCODING": "cp1252"}, ["inspect", "sé", "--text", "é"]),
        ({}, ["export", "sé", "é.parquet"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *arguments],
            capture_output=True,
            cwd=tmp_path,
            env={**os.environ, **LOCALE, **options},
            check=False,
        )
        assert done.returncode == 0, (arguments, done.stderr)
        assert b"Traceback" not in done.stderr
        text = done.stdout.decode(options.get("PYTHONIOENCODING", "ascii"))
        assert ("mod\xe8le" if options else "\\udcc3\\udca9.parquet") in text
    assert (tmp_path / "é.parquet").stat().st_size > 0

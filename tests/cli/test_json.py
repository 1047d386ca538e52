"""What commands print with ``--json``: one value each, of the shape that docs/schemas/cachectl.json says."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import jsonschema
import pytest
import transformers

import actcache
from actcache.cli import COMMANDS
from tests.cli.running import cachectl
from tests.support.tiny import save_tiny

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

SCHEMA = json.loads(Path(__file__).parents[2].joinpath("docs/schemas/cachectl.json").read_text())
SHAPES = SCHEMA["$defs"]["commands"]
FORMULA = ("--documents", 1000, "--tokens", 300, "--hidden", 384, "--full-ms", 5, "--upper-ms", 2)


def check(shape: str, value: Any) -> None:
    one = {"$ref": f"#/$defs/commands/{shape.replace('/', '~1').replace(' ', '%20')}", "$defs": SCHEMA["$defs"]}
    jsonschema.validate(value, one, cls=jsonschema.Draft202012Validator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    save_tiny(folder / "tiny", words=["la", "li"])
    (folder / "corpus.txt").write_text("".join(f"la li {'la ' * i}{i}\n" for i in range(12)))
    return folder


def test_every_command_has_the_shape_that_the_docs_say(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    asked: set[str] = set()

    def run(shape: str, *arguments: object, code: int = 0) -> Any:
        quiet = ["--quiet"] if "quiet" in COMMANDS_BY_NAME[str(arguments[0])].__annotations__ else []
        result = cachectl(*arguments, "--json", *quiet)
        assert result.code == code, result.err
        value = json.loads(result.out)
        check(shape, value)
        asked.add(shape)
        return value

    fill = (
        "fill",
        "s",
        "corpus.txt",
        "--model",
        "tiny",
        "--layers",
        "1,3",
        "--site",
        "encoder.layer.1.attention",
        "--collection",
        "all",
    )
    run("fill --dry-run", *fill, "--dry-run")
    filled = run("fill", *fill)
    name = filled["spaces"][0]["space"]
    assert [one["layer"] or one["site"] for one in filled["spaces"]] == [1, 3, "encoder.layer.1.attention"]
    assert run("ls", "ls", "s")["spaces"][0].keys() < run("ls", "ls", "s", "--space", name)["spaces"][0].keys()
    listed = run("ls --tree", "ls", "s", "--tree")
    assert listed["collection_list"] == [{"collection": "all", "documents": 12}]
    assert listed["spaces"][0]["coverage"] == [{"collection": "all", "documents": 12, "present": 12}]
    run("inspect", "inspect", "s")
    detail = run("inspect --space", "inspect", "s", "--space", name)
    run("inspect --space", "inspect", "s", "--html", "page.html")
    run(
        "inspect --segment",
        "inspect",
        "s",
        "--space",
        name,
        "--segment",
        detail["spaces"][0]["segment_list"][0]["name"],
    )
    run("inspect --text", "inspect", "s", "--text", "la li 0")
    run("inspect --text", "inspect", "s", "--key", actcache.document_key("la li 0").hex())
    assert run("du", "du", "s")["nbytes"] == sum(path.stat().st_size for path in Path("s").rglob("*") if path.is_file())
    run("verify", "verify", "s")
    assert run("verify", "verify", "s", "--recompute", 2, "--model", "tiny")["spaces"][0]["recomputed"]["ok"]
    run("repair", "repair", "s")
    run("repair", "repair", "s", "--recompute", "--model", "tiny")
    run("compact", "compact", "s")
    run("migrate", "migrate", "s", "zarr:z")
    run("export", "export", "s", "e.safetensors", "--space", name)
    run("import", "import", "i", "e.safetensors")
    assert run("pin", "pin", "s", name[:6])["spaces"] == [{"space": name, "pinned": True}]
    kept = run("prune", "prune", "s", "--idle", 0, "--where", "model=tiny", "--dry-run")["plan"]["spaces"]
    assert {one["space"]: one["removed"] for one in kept}[name] is False
    run("unpin", "unpin", "s", name[:6])
    run("prune", "prune", "i", "--idle", 0, "--where", "layer=1", "--yes")
    run("plan", "plan", *FORMULA, "--read", "2GB", "--write", "1GB")
    run("plan --nodes", "plan", *FORMULA, "--nodes", 4, "--devices", 8)
    run("plan --paper", "plan", "--paper")
    passages = ("--model", "tiny", "--passages", 8, "--least", 2)
    run("diff", "diff", "corpus.txt", "corpus.txt", *passages)
    run("fill", "fill", "p", "corpus.txt", *passages, "--layer", 1, "--collection", "all")
    held = run("ls --tree", "ls", "p", "--tree")["spaces"][0]["coverage"][0]
    assert held["passages"]["distinct"] < held["passages"]["passages"]
    run("doctor", "doctor", "s")
    run("bench", "bench", ".", "--backend", "hdf5", "--size", "2MiB", "--rounds", 1, "--mode", "warm")
    assert asked == set(SHAPES)
    assert {shape.split()[0] for shape in asked} == set(COMMANDS_BY_NAME)


COMMANDS_BY_NAME = {command.__name__: command for command in COMMANDS}


def _names(schema: Any) -> Iterator[tuple[str, Any]]:
    for name, one in schema.get("properties", {}).items() if isinstance(schema, dict) else ():
        yield name, one
    for one in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _names(one)


def test_the_same_things_have_the_same_names():
    """A space is its fingerprint, ``space``; bytes are ``nbytes``; ``spaces`` are a list."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    found = list(_names(SCHEMA))
    names = {name for name, _ in found}
    assert not {"fingerprint", "bytes", "size", "url"} & names
    for name, one in found:
        if name in ("space", "target_space"):
            assert one == {"$ref": "#/$defs/space"}
        if name in ("spaces", "collections", "segment_list", "collection_list", "coverage"):
            assert one.get("type") == "array" or one == {"$ref": "#/$defs/coverage"} or name == "collections", name
        if name.endswith("nbytes"):
            assert one == {"$ref": "#/$defs/nbytes"}, name
        if name in ("unreadable", "damaged") and "$ref" in one:
            assert one == {"$ref": f"#/$defs/{name}"}


def test_a_wrong_shape_is_refused():
    with pytest.raises(jsonschema.ValidationError):
        check("pin", {"store": "s", "pinned": ["0" * 32]})
    check("pin", {"store": "s", "spaces": [{"space": "0" * 32, "pinned": True}]})

"""What the import contracts in pyproject.toml cannot see: silent handlers, encodings, and what an import costs."""

from __future__ import annotations

import ast

from tests.support import ROOT, run

SOURCE = ROOT / "src" / "actcache"
MODULES = sorted(SOURCE.rglob("*.py"))

#: Where whatever was caught is raised elsewhere: by the thread, or process, that waits for this one.
HANDED_ON = {
    SOURCE / "reader" / "prefetch.py",
    SOURCE / "models" / "parallel" / "worker.py",
    SOURCE / "models" / "cluster" / "worker.py",
}


def test_nobody_catches_everything_silently():
    """``except: pass`` and its kin hide what reaches nobody."""
    for path in [*MODULES, *(ROOT / "backends").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
                raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                assert raises or not broad or path in HANDED_ON, f"{path}:{node.lineno}"


#: What opens files, and the mode that it has where none is given. ``open`` is the attribute's name of paths, too.
OPENERS = {
    "open": "r",
    "fdopen": "r",
    "NamedTemporaryFile": "w+b",
    "TemporaryFile": "w+b",
    "SpooledTemporaryFile": "w+b",
}


def as_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text: by an encoding, which should not be the locale's."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in ("read_text", "write_text"):
        return True
    if isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "subprocess":
        return "text" in given or "universal_newlines" in given
    if name not in OPENERS:
        return False
    of_path = isinstance(call.func, ast.Attribute) and name == "open"
    first = 0 if of_path or name not in ("open", "fdopen") else 1  # position of the mode
    mode = getattr(given.get("mode", call.args[first] if len(call.args) > first else None), "value", None)
    if of_path and (not (isinstance(mode, str) and set(mode) <= set("rwaxbt+")) or "options" in given):
        return False  # another thing's
    return "b" not in (mode or OPENERS[name])


def test_text_files_have_an_encoding():
    """Under another locale a name or text that is no ASCII would fail, or be written in what others cannot read."""
    for path in [*MODULES, *(ROOT / "backends").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and as_text(node):
                assert "encoding" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"


def test_importing_actcache_loads_no_heavy_library():
    heavy = {"torch", "transformers", "tokenizers", "h5py", "zarr", "lmdb", "fsspec", "rich", "typer", "pytest"}
    out = run("import sys, actcache; print(*sorted(sys.modules))")
    loaded = set(out.split())
    assert "numpy" in loaded
    assert not loaded & heavy
    assert not [name for name in loaded if name.startswith("actcache_")]


def test_opening_a_store_loads_its_backend_alone(tmp_path):
    out = run("import sys, actcache; actcache.open(sys.argv[1]).close(); print(*sys.modules)", tmp_path / "store")
    assert {"h5py", "actcache_hdf5"} <= set(out.split())
    assert not {"torch", "zarr", "lmdb", "rich"} & set(out.split())

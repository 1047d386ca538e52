"""Imports run one way, the core names no backend, and importing it costs little."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support import ROOT, run

SOURCE = ROOT / "src" / "actcache"

#: A module imports only from layers before its own, or from its own package. ``testing`` is for test suites.
LAYERS = [
    {"errors", "unheard"},
    {"key", "windows", "codec", "lineage", "ragged", "checksum", "recipe", "arrays", "plain", "tensorheader"},
    {"segment_format"},
    {"backend"},
    {"storage"},
    {"registry", "collection", "corpus", "lastuse", "writer", "request", "lookahead", "batch", "entry"},
    {"reading"},
    {"reader", "maintenance"},
    {"space"},
    {"store"},
    {"inspection", "planning"},
    {"exchange", "migration", "retention"},
    {"reporting"},
    {"doctor"},
    {"benchmark"},
    {"models"},
    {"pruning"},  # of the models' vocabulary; nothing but the user needs it
    {"recycler"},
    {"recyclers"},
    {"parallel"},
    {"forecast", "recomputing"},
    {"cli"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
#: Inside a layer, too, imports make no circles.
ALLOWED_INSIDE = {
    ("windows", "key"),
    ("windows", "plain"),
    ("key", "arrays"),
    ("key", "plain"),
    ("recipe", "plain"),
    ("recipe", "codec"),
    ("recipe", "lineage"),
    ("request", "writer"),
    ("request", "lookahead"),
    ("entry", "writer"),
    ("backend", "storage"),  # re-exports plain tools (files, workers) that import nothing of this package but errors
}
#: Imports inside of functions: what they bring needs the extra ``models``, which not everybody has.
LAZY = {
    ("cli/fill.py", "actcache.admin.forecast"),
    ("cli/fill.py", "actcache.cli.collecting"),
    ("cli/fill.py", "actcache.models.parallel"),
    ("cli/fill.py", "actcache.models.recyclers"),
    ("cli/plan.py", "actcache.models.timing"),
    ("cli/recomputing.py", "actcache.admin.recompute"),
    ("corpus/places.py", "actcache.segments.places.objects.buckets"),  # the extra s3
    ("reader.py", "actcache.reader.dataset"),
    ("reading/delivery.py", "actcache.reader.cuda"),
    ("registry.py", "actcache.segments.places.objects"),  # the extra s3
    ("storage/objects/options.py", "actcache.segments.places.objects"),
}
#: Where the libraries for object stores may be imported; nothing else imports this but the registry, when a URL asks.
OBJECTS = SOURCE / "storage" / "objects"
OTHER_PACKAGES = {"zarr", "lmdb", "s3fs", "fsspec", "h5py", "safetensors"}
MODULES = sorted(SOURCE.rglob("*.py"))


def unit(path: Path) -> str:
    """The part of the package that a file belongs to."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imports(tree: ast.AST, inside: bool = False):
    """Yield (module or module.name, whether inside of a function) of every import that runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from (found for child in node.orelse for found in imports(child, inside))
        elif isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            if node.module == "actcache":
                yield from ((f"actcache.{alias.name}", inside) for alias in node.names)
            else:
                yield str(node.module), inside
        else:
            yield from imports(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def of(path: Path):
    return list(imports(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path):
    own = unit(path)
    if own in ("__init__", "testing", "__main__"):
        return
    assert own in RANK, f"{path} belongs to no layer: add it to LAYERS where it belongs"
    for name, inside in of(path):
        package, _, rest = name.partition(".")
        if package != "actcache":
            continue
        other = rest.partition(".")[0]
        lazy = (str(path.relative_to(SOURCE)), name) in LAZY
        assert lazy or not inside, f"{path} imports {name} inside of a function"
        assert other in RANK, f"{path} imports {name}"
        fine = RANK[other] < RANK[own] or other == own or (own, other) in ALLOWED_INSIDE
        assert fine, f"{path}: {own} may not import {other}"


def test_the_package_itself_imports_lazily_only_recyclers():
    inside = [name for name, inside in of(SOURCE / "__init__.py") if inside]
    assert inside == ["actcache.models.recycler", "actcache.models.recyclers"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_the_core_knows_no_backend(path):
    for name, _ in of(path):
        package = name.partition(".")[0]
        fine = (package == "safetensors" and unit(path) in ("models", "pruning")) or (
            package in ("fsspec", "s3fs") and path.is_relative_to(OBJECTS)
        )
        assert fine or package not in OTHER_PACKAGES, name
        assert package == "actcache" or not package.startswith("actcache"), name


@pytest.mark.parametrize("path", sorted((ROOT / "backends").rglob("*.py")), ids=lambda path: path.parent.name)
def test_backends_use_the_plugin_surface_alone(path):
    own = path.relative_to(ROOT / "backends").parts[0]
    for name, _ in of(path):
        fine = name.startswith(("actcache.backend", "actcache.errors", "actcache.format", "actcache.io"))
        fine = fine or name.partition(".")[0] == own
        assert fine or not name.startswith("actcache"), name


#: Where whatever was caught is raised elsewhere: by the thread, or process, that waits for this one.
HANDED_ON = {SOURCE / "reading" / "prefetch.py", SOURCE / "parallel" / "worker.py"}


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


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "backends").rglob("*.py"))], ids=lambda path: path.name)
def test_text_files_have_an_encoding(path):
    """Under another locale a name or text that is no ASCII would fail, or be written in what others cannot read."""
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

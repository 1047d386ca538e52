"""Real text that every machine has: the docstrings of the Python standard library, labelled with their package."""

from __future__ import annotations

import ast
import collections
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "__pycache__",
    "ensurepip",
    "pydoc_data",
    "turtledemo",
}
_SHORTEST = 30  # characters


@dataclass(frozen=True)
class Corpus:
    """Texts, each once, and the number of the package that each comes from."""

    texts: list[str]
    labels: np.ndarray  # [n] int64
    packages: list[str]

    def split(self, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of the training and of the held-out texts."""
        order = np.random.default_rng(seed).permutation(len(self.texts))
        cut = int(len(order) * held_out)
        return order[cut:], order[:cut]


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield (package or module, docstring) of every module, class and function of the standard library."""
    yield from _docstrings(Path(sysconfig.get_path("stdlib")), _LEFT_OUT)


def installed_docstrings() -> Iterator[tuple[str, str]]:
    """Yield the same of the packages that are installed beside it."""
    yield from _docstrings(Path(sysconfig.get_path("purelib")), {"test", "tests", "__pycache__"})


def _docstrings(root: Path, left_out: set[str]) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if left_out & set(relative.parts) or any(part.endswith("_test.py") for part in relative.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, RecursionError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= _SHORTEST:
                    yield relative.parts[0].removesuffix(".py"), text


def corpus(packages: int, most: int) -> Corpus:
    """Return up to ``most`` docstrings of each of the ``packages`` packages that have the most."""
    by_package: dict[str, dict[str, None]] = collections.defaultdict(dict)
    seen: set[str] = set()
    for package, text in docstrings():
        if text not in seen:
            seen.add(text)
            by_package[package][text] = None
    names = sorted(by_package, key=lambda name: -len(by_package[name]))[:packages]
    texts, labels = [], []
    for number, name in enumerate(names):
        some = list(by_package[name])[:most]
        texts += some
        labels += [number] * len(some)
    return Corpus(texts, np.array(labels), names)

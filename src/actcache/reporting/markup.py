"""HTML and SVG from elements. What is not markup already is escaped: a model's name is text, whatever stands in it."""

from __future__ import annotations

import html
from collections.abc import Mapping

from actcache.reporting.words import clean

_VOID = frozenset({"meta", "link"})


class Markup(str):
    """Text that is HTML: made by ``element`` and ``joined`` alone."""

    __slots__ = ()


def element(name: str, attributes: Mapping[str, object] | None = None, *children: str) -> Markup:
    """Return an element.

    Args:
        attributes: name -> value, which is escaped.
        children: ``Markup`` as it is, other texts escaped.
    """
    given = "".join(f' {key}="{escaped(str(value))}"' for key, value in (attributes or {}).items())
    return Markup(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{joined(*children)}</{name}>")


def joined(*children: str) -> Markup:
    """Return children one after another: ``Markup`` as it is, other texts escaped."""
    return Markup("".join(child if isinstance(child, Markup) else escaped(child) for child in children))


def escaped(text: str) -> str:
    """Return a text that may stand between tags and in quotes; what is no character is replaced."""
    return html.escape(clean(text), quote=True)

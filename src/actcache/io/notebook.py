"""What objects show in a notebook: a small HTML table."""

from __future__ import annotations

import dataclasses
import html
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

_LONGEST = 400  # characters of one value
_SHOWN = 5  # values of a collection


def table(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """Return rows of a name and a value under a title, as HTML; texts are escaped."""
    lines = "".join(
        f'<tr><th style="text-align:left">{html.escape(name)}</th>'
        f'<td style="text-align:left">{html.escape(text_of(value))}</td></tr>'
        for name, value in rows
    )
    return f"<table><caption><b>{html.escape(title)}</b></caption><tbody>{lines}</tbody></table>"


def text_of(value: object) -> str:
    """Return a value as people read it: thousands apart, bytes as hexadecimal digits, of long lists the beginning."""
    if isinstance(value, bool) or value is None:
        text = str(value)
    elif isinstance(value, int):
        text = f"{value:,}"
    elif isinstance(value, float):
        text = f"{value:,.4g}"
    elif isinstance(value, bytes):
        text = value.hex()
    elif isinstance(value, Mapping):
        text = _listed([f"{text_of(name)}: {text_of(item)}" for name, item in value.items()])
    elif isinstance(value, Collection) and not isinstance(value, str):
        text = _listed([text_of(item) for item in value])
    else:
        text = str(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _listed(texts: list[str]) -> str:
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f", and {more:,} more" if more > 0 else "") if texts else "none"


class Shown:
    """A dataclass that notebooks show as a table of its fields."""

    def _repr_html_(self) -> str:
        fields = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return table(type(self).__name__, fields)


class Display:
    """One place of a notebook's output whose content is replaced. Not thread-safe."""

    def __init__(self) -> None:
        self._handle: Any = None

    @staticmethod
    def there() -> bool:
        """Return whether this process is a notebook's kernel."""
        # What nobody has imported is not running: IPython itself is imported by no one else here.
        shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
        return shell is not None and getattr(shell, "kernel", None) is not None

    def show(self, content: str) -> None:
        """Show HTML, in the place of what was shown before."""
        from IPython.display import HTML, display

        if self._handle is None:
            self._handle = display(HTML(content), display_id=True)
        else:
            self._handle.update(HTML(content))

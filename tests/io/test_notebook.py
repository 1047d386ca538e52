"""What notebooks show: tables of objects, and how far long work is. A kernel of its own is in test-clients."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

import actcache
from actcache.io.notebook import table, text_of
from actcache.io.progress import Meter
from actcache.models.filling import FillReport
from actcache.store.space import IntegrityReport
from tests.support import put, recipe


def test_texts_are_escaped_and_cut() -> None:
    shown = table("a<b", [("<script>", "x & y"), ("list", list(range(2000))), ("none", [])])
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "x &amp; y" in shown
    assert "0, 1, 2, 3, 4, and 1,995 more" in shown
    assert text_of("x" * 10_000).endswith("...")
    assert text_of({3: b"\xff"}) == "3: ff"
    assert text_of(1234567) == "1,234,567"
    assert text_of(True) == "True"


def test_objects_show_tables(tmp_path: Any) -> None:
    """Of what is closed, too; and never more than is asked of them."""
    with actcache.open(tmp_path) as store, store.space(recipe(model="<i>m</i>")) as space:
        put(space, range(5))
        space.flush()
        store.put_collection("mine", list(space.keys()))
        for shown in (space._repr_html_(), store._repr_html_(), space.recipe._repr_html_()):
            assert "&lt;i&gt;m&lt;/i&gt;" in shown
            assert space.recipe.fingerprint in shown
        assert '<th style="text-align:left">published entries</th><td style="text-align:left">5</td>' in (
            space._repr_html_()
        )
        assert "mine" in store._repr_html_()
        reader = space.reader(list(space.keys()))
        list(reader)
        assert "documents" in reader.stats()._repr_html_()
    assert "(closed)" in space._repr_html_()
    assert "(closed)" in store._repr_html_()
    assert "1,234" in FillReport(1234, 0, 1234, 5, 0.1)._repr_html_()
    assert "00ff" in IntegrityReport(1, 2, [b"\x00\xff"])._repr_html_()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for IPython's kernel: what was shown, one place each."""
    shown: list[str] = []

    class Handle:
        def __init__(self) -> None:
            self.place = len(shown)
            shown.append("")

        def update(self, content: str) -> None:
            shown[self.place] = content

    def display(content: str, display_id: bool) -> Handle:
        assert display_id
        handle = Handle()
        handle.update(content)
        return handle

    ipython: Any = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    ipython.display = types.ModuleType("IPython.display")
    ipython.display.HTML, ipython.display.display = str, display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
    return shown


def test_progress_is_one_bar_in_a_notebook(kernel: list[str], capsys: Any) -> None:
    with Meter("fill", "documents", lasting=True) as meter:
        for done in range(1000):
            meter("", done + 1, 1000, "<b>")
    assert len(kernel) == 1
    assert '<progress value="1000" max="1000"></progress>' in kernel[0]
    assert "1,000/1,000 documents" in kernel[0]
    assert "&lt;b&gt;" in kernel[0]
    with Meter("fill", "documents", lasting=True, show=False) as meter:
        meter("", 1, None)
    with Meter("verify", "entries") as meter:  # takes no second
        meter("", 1, 1)
    assert len(kernel) == 1
    assert capsys.readouterr().err == ""

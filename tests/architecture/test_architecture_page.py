"""docs/architecture.md: the picture is that of the code, and every file that the page names is there."""

from __future__ import annotations

import html
import re

import grimp
import pytest

from tests.support import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SOURCE = ROOT / "src" / "actcache"


def below(graph: dict[str, set[str]], room: str) -> set[str]:
    """Return all rooms that a room reaches."""
    return graph[room].union(*(below(graph, other) for other in graph[room]))


def test_the_picture_is_drawn_from_this_code():
    modules = grimp.build_graph("actcache")
    rooms = modules.find_children("actcache")
    graph = {
        room: {
            other
            for other in rooms - {room}
            if modules.direct_import_exists(importer=room, imported=other, as_packages=True)
        }
        for room in rooms
    }
    wanted = {
        (room, other)
        for room in rooms
        for other in graph[room]
        if not any(other in below(graph, between) for between in graph[room] - {other})
    }
    picture = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    titles = map(html.unescape, re.findall(r"<title>([^<]*)</title>", picture))
    arrows = {tuple("actcache" + end for end in title.split("->")) for title in titles if "->" in title}
    assert arrows == wanted, "run `make picture`"


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:[\w.]+/)*[\w]+\.(?:py|md)|(?:\w+/)+)`", PAGE))))
def test_what_the_page_names_is_there(name):
    assert any(
        place.is_dir() and (place / name).exists() for place in [ROOT, ROOT / "docs", SOURCE, *SOURCE.rglob("*")]
    )

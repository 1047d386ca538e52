"""``python -m bench.links`` finds what leads nowhere."""

from __future__ import annotations

from bench.links import broken


def test_links_that_lead_nowhere(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "there.html").write_text('<h1 id="title">t</h1><a href="https://example.org/x">x</a>')
    (tmp_path / "sub" / "index.html").write_text('<a href="../there.html#title">1</a><img src="../there.html?v=1">')
    links = ["there.html", "there.html#title", "sub/", "#own", "there.html#none", "none.html", "sub/none.png"]
    text = "".join(f'<a href="{link}">x</a>' for link in links)
    (tmp_path / "page.html").write_text(f'<p id="own">{text}</p>')
    assert broken(tmp_path) == [f"page.html: {link}" for link in links[4:]]

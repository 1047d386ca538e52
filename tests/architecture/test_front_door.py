"""What a stranger meets first: short, and no link leads nowhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from actcache import errors

ROOT = Path(__file__).parents[2]
HOME = "https://github.com/actcache/actcache/blob/main/"
SITE = "https://actcache.github.io/actcache/"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def anchors(page: Path) -> set[str]:
    """The names that headings of a page get."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_the_readme_is_one_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 700
    assert not [link for link in links(text) if not link.startswith("https://")]  # they work on a package index, too


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in links(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if path.startswith(HOME):
            target = ROOT / path.removeprefix(HOME)
        elif path.startswith(SITE):
            name = path.removeprefix(SITE)
            target = ROOT / "docs" / (name.removesuffix(".html") + ".md" if name else "index.md")
        elif ":" in path:
            continue
        else:
            target = page.parent / path if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_every_page_is_in_the_site():
    """The pages that the contents name are those that there are."""
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    named = {line for block in re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL) for line in block.split("\n")}
    pages = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in ROOT.glob("docs/**/*.md")}
    assert {page for page in pages if not re.match(r"decisions/0|index$", page)} <= named


def test_troubleshooting_names_every_error():
    """But those that are only bases, by which callers catch."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    bases = {"ActcacheError", "StoreError", "DataError"}
    named = {
        name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, errors.ActcacheError)
    }
    assert {name for name in named if f"| `{name}` |" not in page and not name.startswith("_")} == bases


def test_the_package_says_whose_it_is_and_where_to_look():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"Homepage", "Documentation", "Changelog"} <= set(project["urls"])
    assert all(url.startswith("https://") for url in project["urls"].values())
    assert project["authors"]
    assert len(project["keywords"]) >= 3
    for minor in (11, 12, 13, 14):
        assert f"Programming Language :: Python :: 3.{minor}" in project["classifiers"]
    assert project["readme"] == "README.md"


def test_who_wants_to_help_or_to_cite_finds_how():
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"):
        assert len((ROOT / name).read_text(encoding="utf-8").split()) > 50, name
    assert "make test-quick" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "cff-version" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert "cachectl doctor" in (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8")
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    for said in (".ci/run", '"3.11", "3.12", "3.13", "3.14"', "macos-latest", "make docs"):
        assert said in workflow
    assert "sphinx -W" in (ROOT / "Makefile").read_text(encoding="utf-8")

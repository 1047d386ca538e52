"""Links of a built site that lead nowhere: ``python -m bench.links build/site``; exit code 1 where there are some.

Looks at links and pictures within the site, and at the anchors that they name. Fetches nothing.
"""

from __future__ import annotations

import argparse
import html.parser
import sys
import urllib.parse
from pathlib import Path


class _Page(html.parser.HTMLParser):
    """What a page links to, and the names that can be linked to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.names |= {value for name in ("id", "name") if (value := given.get(name))}
        self.links += [value for name in ("href", "src") if (value := given.get(name))]


def broken(site: Path) -> list[str]:
    """Return the links that lead nowhere, each as ``page: link``."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        if "_modules" in path.parts:  # sources, whose links back name what is documented by another name
            continue
        for link in dict.fromkeys(page.links):
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path if not parts.path else (path.parent / urllib.parse.unquote(parts.path)).resolve()
            target = target / "index.html" if target.is_dir() else target
            other = pages.get(target)
            named = not parts.fragment or other is None or urllib.parse.unquote(parts.fragment) in other.names
            if not target.exists() or not named:
                found.append(f"{path.relative_to(site)}: {link}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    found = broken(parser.parse_args().site.resolve())
    print("\n".join(found) or "every link leads somewhere")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()

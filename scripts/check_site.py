"""Check a built site: every link and picture of its own is there, and nothing that a page needs comes from elsewhere.

    python scripts/check_site.py FOLDER

Addresses of other sites are not asked for. Prints what is wrong, a line each, and ends with exit code 1.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The anchors of a page, where it links to, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag names or asks for."""
        given = dict(attrs)
        self.anchors.update(value for key in ("id", "name") if (value := given.get(key)))
        if address := given.get("href") or given.get("src"):
            (self.links if tag == "a" else self.loads).append(address)


def faults(site: Path) -> list[str]:
    """What is wrong with the pages of a folder."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    wrong = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for address in page.links + page.loads:
            scheme, host, target, _, anchor = urlsplit(address)
            if scheme == "data" or (address in page.links and (scheme or host)):
                continue
            if scheme or host:
                wrong.append(f"{name}: loads {address}")
                continue
            start = site.resolve() if target.startswith("/") else path.parent
            there = (start / unquote(target).lstrip("/")).resolve() if target else path
            if not there.exists():
                wrong.append(f"{name}: {address} is not there")
            elif anchor and there in pages and unquote(anchor) not in pages[there].anchors:
                wrong.append(f"{name}: {address} has no such anchor")
    return wrong


def main() -> None:
    """Command line."""
    wrong = faults(Path(sys.argv[1]))
    print("\n".join(wrong) or "every link of the site's own leads somewhere")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

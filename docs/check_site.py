"""Check a built site without a network: ``python docs/check_site.py docs/_build/html``.

Every internal link leads to a page and to a place on it, every picture is there, and the search finds what it should.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import snowballstemmer

# What is searched for, and a page that has to be found.
SEARCHES = {
    "changelog": "changelog",
    "citation": "citation",
    "cite": "citation",
    "FID": "howto",
    "inversion": "inversion",
    "photographs": "examples/own_data",
    "several GPUs": "howto",
    "torchdeq": "migrating",
}


class Page(HTMLParser):
    """The places on a page, and where it links to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.places: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.places.add(value)
            elif (tag, name) in {("a", "href"), ("link", "href"), ("img", "src"), ("script", "src")}:
                self.links.append(value)


def broken_links(root: Path) -> Iterator[str]:
    """A line for each internal link of the pages below ``root`` that leads nowhere."""
    pages = {path: Page(path) for path in sorted(root.rglob("*.html"))}
    for path, page in pages.items():
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                yield f"{path.relative_to(root)}: no file for {link}"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].places:
                yield f"{path.relative_to(root)}: no place for {link}"


def not_found(root: Path) -> Iterator[str]:
    """A line for each search that does not find its page, by the index that the site's own search reads."""
    text = (root / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text[text.index("(") + 1 : text.rindex(")")])
    stem = snowballstemmer.stemmer("english").stemWord

    def pages(word: str) -> set[str]:
        key, found = stem(word.lower()), set()
        for terms in (index["terms"], index["titleterms"]):
            numbers = terms.get(key, [])
            found |= {index["docnames"][k] for k in ([numbers] if isinstance(numbers, int) else numbers)}
        return found

    for words, page in SEARCHES.items():
        found = set.intersection(*map(pages, words.split()))
        if page not in found:
            yield f"the search for {words!r} does not find {page}"


def main() -> None:
    root = Path(sys.argv[1]).resolve()
    if wrong := [*broken_links(root), *not_found(root)]:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()

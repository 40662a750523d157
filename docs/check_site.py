"""Checks a built site: its links lead somewhere, and it has every public name.

python docs/check_site.py build/site
"""

import html.parser
import pathlib
import sys
import urllib.parse

from sphinx.util.inventory import InventoryFile

import optax_cgfac
from optax_cgfac import plot


class Page(html.parser.HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], {""}
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        del tag
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def broken_links(site):
    """Returns ``page: link`` of every link inside the site that leads nowhere."""
    found = (x for x in site.rglob("*.html") if "_static" not in x.parts)
    pages = {path.resolve(): Page(path) for path in found}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path
            if parts.path:
                target = (path.parent / urllib.parse.unquote(parts.path)).resolve()
            anchor = urllib.parse.unquote(parts.fragment)
            known = pages[target].anchors if target in pages else {anchor}
            if not target.exists() or anchor not in known:
                broken.append(f"{path.name}: {link}")
    return broken


def missing_names(site):
    """Returns the public names that the reference lacks."""
    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, uri: uri)
    found = {name for kind in inventory.values() for name in kind}
    public = {f"optax_cgfac.{name}" for name in optax_cgfac.__all__}
    public |= {f"optax_cgfac.plot.{name}" for name in plot.__all__}
    return sorted(public - found)


def main():
    site = pathlib.Path(sys.argv[1])
    problems = [f"leads nowhere: {link}" for link in broken_links(site)]
    problems += [f"not in the reference: {name}" for name in missing_names(site)]
    if problems:
        sys.exit("\n".join(problems))
    print(f"{site}: links and names are all there")


if __name__ == "__main__":
    main()

"""Make the site's navigation from the lists of links of its `index.md` pages, so that a code host shows the same ones.

An index page links to each page of its folder, to the index pages of the folders below, and to what lies outside
`docs`. A list in which each entry begins with a link is shown as cards.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

LINK = re.compile(r"^- \**\[([^\]]+)\]\(([^)#\s]+)\.(md|ipynb)\)", flags=re.MULTILINE)
ROOT = "docs/index"


def pages_below(index: str, text: str, root: Path) -> dict[str, str]:
    """Return the names, without ending, of an index page's pages in the navigation, each with the text to show.

    The text is empty where the page's own title is shown: a notebook is called as its link, and so is every page in the
    header, which has little room.
    """
    folder = posixpath.dirname(index)
    found: dict[str, str] = {}
    for title, link, kind in LINK.findall(text):
        name = posixpath.normpath(posixpath.join(folder, link))
        home = posixpath.dirname(name)
        below = posixpath.basename(name) == "index" and posixpath.dirname(home) == folder
        elsewhere = home != folder and (root / home / "index.md").exists()
        if below or not elsewhere:
            found.setdefault(name, title if index == ROOT or kind == "ipynb" else "")
    return found


def is_index(name: str) -> bool:
    """Return whether a page lists others."""
    return name.startswith("docs/") and posixpath.basename(name) == "index"


def add_navigation(app: Sphinx, name: str, content: list[str]) -> None:
    """Append the table of contents that the links of an index page describe."""
    if is_index(name):
        pages = pages_below(name, content[0], Path(app.srcdir))
        entries = "\n".join(f"{title} </{page}>" if title else f"/{page}" for page, title in pages.items())
        content[0] += f"\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n"


class Cards(SphinxTransform):
    """Mark the lists of links of an index page as cards."""

    default_priority = 400

    def apply(self, **_: Any) -> None:
        """Add the class to each list whose entries all begin with a link."""
        if not is_index(self.env.docname):
            return
        for items in self.document.findall(nodes.bullet_list):
            if all(map(_begins_with_link, items.children)):
                items["classes"].append("cards")


class TableHeads(SphinxTransform):
    """Name the columns without a heading, for readers of the screen aloud; on the screen nothing changes."""

    default_priority = 400

    def apply(self, **_: Any) -> None:
        """Put a text that only a screen reader reads into each empty heading."""
        for head in self.document.findall(nodes.thead):
            for place, entry in enumerate(head.findall(nodes.entry)):
                if not entry.astext().strip():
                    name = "Row" if place == 0 else "Description"
                    entry.children = [nodes.paragraph("", "", nodes.inline("", name, classes=["visually-hidden"]))]


def _begins_with_link(item: nodes.Node) -> bool:
    first: nodes.Node | None = item
    while isinstance(first, nodes.list_item | nodes.paragraph | nodes.strong):
        # The parser puts an empty text before what is bold.
        first = next((child for child in first.children if child.children or child.astext()), None)
    return isinstance(first, nodes.reference | pending_xref)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the steps."""
    app.connect("source-read", add_navigation)
    app.add_transform(Cards)
    app.add_transform(TableHeads)
    return {"parallel_read_safe": True}

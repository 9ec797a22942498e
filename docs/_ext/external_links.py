"""List the links that lead away from the site in `external-links.txt` of the build; nothing is fetched."""

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

FILE = "external-links.txt"


def collect(app: Sphinx, environment: BuildEnvironment) -> None:
    """Write each address once, with the pages that link to it."""
    pages: dict[str, set[str]] = {}
    for name in environment.found_docs:
        for link in environment.get_doctree(name).findall(nodes.reference):
            if link.get("refuri", "").startswith(("http:", "https:")):
                pages.setdefault(link["refuri"], set()).add(name)
    lines = [f"{address}  {' '.join(sorted(names))}\n" for address, names in sorted(pages.items())]
    (Path(app.outdir) / FILE).write_text("".join(lines))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the step."""
    app.connect("env-check-consistency", collect)
    return {"parallel_read_safe": True}

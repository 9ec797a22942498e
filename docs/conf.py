"""The configuration of the documentation site; `make docs` builds it. The source directory is the repository's root.

So a page links to a file of the repository by the same relative path on the site and on a code host.
"""

import os
import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "stayaligned"
author = "the stayaligned authors"
project_copyright = author
release = version = version_of("stayaligned").partition("+")[0]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "external_links",
    "from_code",
    "navigation",
]
root_doc = "docs/index"
include_patterns = ["docs/**", "studies/**", "examples/notebooks/**", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
exclude_patterns = ["docs/README.md", "docs/_*", "**/.*", "build", "demo", "out", "real"]

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # a test runs the notebooks; the site shows their stored output
highlight_language = "none"
suppress_warnings = ["myst.header"]  # the generated tables begin with headings of the third level

default_role = "code"  # docstrings write `name`, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False

# The site of a release has a menu of versions: `docs/publish.py` writes the file that it reads.
published = "STAYALIGNED_DOCS_VERSION" in os.environ
html_theme = "pydata_sphinx_theme"
html_title = f"stayaligned {version}"
html_context = {"default_mode": "auto"}
html_static_path = ["_static"]
templates_path = ["_templates"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_js_files = ["tables.js"]
html_extra_path = ["_static/index.html"]
html_search_scorer = "docs/_static/scorer.js"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "stayaligned"},
    "navbar_start": ["navbar-logo", "version-switcher" if published else "version.html"],
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_version_warning_banner": published,
    "switcher": {
        "json_url": "../versions.json",
        "version_match": os.environ.get("STAYALIGNED_DOCS_VERSION", version),
    },
    "check_switcher": False,
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

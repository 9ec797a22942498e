"""The documentation site in a real browser: every page, light and dark, on a phone and on a desk."""

import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "docs"
MINIMUM_PAGES = 40
KINDS = {
    *(
        "docs/index",
        "docs/start",
        "docs/howto/index",
        "docs/howto/gate",
        "docs/concepts/controls",
        "docs/reference/commands",
    ),
    *(
        "docs/reference/settings",
        "docs/reference/python-api",
        "docs/results/testbed",
        "examples/notebooks/gate-release",
        "CHANGELOG",
        "search",
    ),
}
"""A page of each kind, for axe, which needs seconds for a long page; everything else is checked on every page."""
# What a page must not have: something wider than the page, unless it scrolls in a box of its own.
CLIPPED = """() => {
  const root = document.documentElement
  const scrolls = e => e && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement))
  const out = e => e.getBoundingClientRect().right > root.clientWidth + 1 && !scrolls(e)
  const parts = ['table', 'pre', 'img', 'p', 'dt'].map(name => '.bd-article ' + name).join()
  const found = [...document.querySelectorAll(parts)].filter(out).map(e => e.tagName + ' ' + e.textContent.slice(0, 40))
  return [...(root.scrollWidth > root.clientWidth ? ['the page'] : []), ...found]
}"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    from filelock import FileLock

    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", "build/doctrees"]
    SITE.parent.mkdir(exist_ok=True)
    with FileLock(SITE.parent / "docs.lock"):
        subprocess.run([*command, "-c", "docs", ".", str(SITE)], cwd=ROOT, check=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_every_page_is_accessible_complete_and_quiet(browser, address, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    complaints = {}
    pages = sorted(path.relative_to(SITE) for path in SITE.glob("**/*.html") if "_static" not in path.parts)
    pages.remove(Path("index.html"))  # leads to docs/index.html
    assert len(pages) >= MINIMUM_PAGES
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request", lambda request: said.append(request.url) if not request.url.startswith((address, "data:")) else None
    )
    axe = Axe()
    for path in pages:
        said.clear()
        page.goto(f"{address}/{path}", wait_until="load")
        if str(path.with_suffix("")) in KINDS:
            options = {"resultTypes": ["violations"], "preload": False}
            found = axe.run(page, options=options).response["violations"]
            said += [f"{rule['id']}: {rule['nodes'][0]['html'][:200]}" for rule in found]
        said += page.evaluate(CLIPPED)
        if said:
            complaints[str(path)] = [*said]
    context.close()
    assert complaints == {}


@pytest.mark.parametrize("page", ["safe-lora", "gate", "lisa"])
def test_the_front_page_leads_to_the_page_of_each_job(browser, address, page):
    front = browser.new_page()
    front.goto(f"{address}/docs/index.html")
    assert front.locator(f".cards a[href$='{page}.html']").is_visible()
    front.close()


SEARCHES = {
    "patch my adapter": "howto/safe-lora",
    "gate in CI": "howto/gate",
    "LoRA": "howto/safe-lora",
    "over-refusal": "concepts/measures",
    "refusal": "concepts/measures",
    "harm": "concepts/measures",
    "degenerate": "concepts/degeneration",
    "install": "howto/install",
    "TRL": "howto/lisa",
}


@pytest.mark.parametrize(("words", "page"), SEARCHES.items())
def test_the_search_shows_the_right_page_first(browser, address, words, page):
    found = browser.new_page()
    found.goto(f"{address}/search.html?q={words}")
    found.wait_for_selector("#search-progress:has-text('Search finished'), .search-summary", state="attached")
    found.wait_for_selector("ul.search li a")
    assert f"docs/{page}.html" in str(found.locator("ul.search li a").first.get_attribute("href"))
    found.close()


def test_a_table_that_is_wider_than_a_phone_says_so_and_keeps_its_first_column(browser, address):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(f"{address}/docs/reference/tasks.html")
    assert "7 columns" in page.locator(".wide-table-hint").first.inner_text()
    first = page.locator(".wide-table tbody td").first
    before = first.bounding_box()["x"]
    page.evaluate("document.querySelector('.wide-table').scrollLeft = 200")
    assert abs(first.bounding_box()["x"] - before) <= 2
    page.goto(f"{address}/docs/howto/install.html")
    page.set_viewport_size({"width": 1400, "height": 844})
    page.wait_for_function("document.querySelector('.wide-table-hint, .wide-table') === null")
    page.close()

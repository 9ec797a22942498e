"""The report in a real browser: nothing asked for, nothing run but its own script, usable by keyboard and phone."""

import os
import shutil
from importlib.resources import files

import pytest

from stayaligned.records import Message
from stayaligned.report import build_report, write_report
from stayaligned.results import Sample

pytestmark = pytest.mark.browser

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
ATTACK = "</script></pre><img src=https://example.org/x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture(scope="module")
def browser():
    executable = shutil.which("chromium")
    if executable is None:
        message = "no chromium: install the Debian package `chromium`"
        if os.environ.get("STAYALIGNED_REQUIRE_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(grid_results, tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    hostile = Sample(id=ATTACK, prompt_set="harmful", prompt=(Message(role="user", content=ATTACK),), text=ATTACK)
    changes = {"arm": ATTACK, "notes": (ATTACK,), "samples": (hostile,)}
    results = [*grid_results, *(r.model_copy(update=changes) for r in grid_results if r.arm == "Lisa")]
    write_report(build_report(results, title=f"Grid {ATTACK}", reference="SFT attacked"), directory)
    return (directory / "report.html").as_uri()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=str)
def page(browser, address, request):
    """The page with everything unfolded; complaints are collected in `page.complaints`."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("dialog", lambda dialog: (page.complaints.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: page.complaints.append(request.url) if request.url != address else None)
    page.goto(address)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    yield page
    context.close()


def test_the_page_asks_for_nothing_and_runs_nothing_foreign(page):
    page.wait_for_timeout(200)
    assert page.complaints == []
    assert page.locator("img, iframe, object").count() == 0
    assert page.locator("script").count() == 1
    assert page.get_by_text("onerror=alert(1)").count() > 5  # it is there, as text


def test_the_page_never_scrolls_sideways(page):
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]


def test_names_in_the_plot_do_not_cover_each_other(page):
    overlaps = page.evaluate(
        """() => {
          const texts = Array.from(document.querySelectorAll('.plot svg text'));
          const boxes = texts.map(text => [text.textContent, text.getBoundingClientRect()]);
          const meet = (a, b) => a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom;
          const pairs = boxes.flatMap((first, i) => boxes.slice(i + 1).map(second => [first, second]));
          return pairs.filter(([[, a], [, b]]) => meet(a, b)).map(([[first], [second]]) => [first, second]);
        }"""
    )
    assert overlaps == []
    assert page.locator(".plot svg text").count() > 20


def test_a_table_sorts_by_keyboard_and_back(page):
    table = page.locator("table.sortable").first
    original = table.locator("tbody th").all_inner_texts()
    head = table.locator("thead th").nth(1)
    button = head.locator("button")
    button.focus()

    def column():
        cells = table.locator("tbody td:nth-child(2)")
        return [float(cell) for cell in cells.evaluate_all("cells => cells.map(cell => cell.dataset.sort)")]

    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert column() == sorted(column())
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "descending"
    assert column() == sorted(column(), reverse=True)
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") is None
    assert table.locator("tbody th").all_inner_texts() == original


def test_wide_tables_scroll_by_keyboard(page):
    region = page.get_by_role("region", name="Table of arms")
    region.focus()
    assert region.evaluate("element => element === document.activeElement")


def test_text_stands_out_from_its_background(page):
    """WCAG AA: 4.5 to 1 for the text that a reader must see."""
    ratio = page.evaluate(
        """() => {
          const channel = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
          const light = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number).map(channel)
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
          const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          const paper = light(getComputedStyle(document.body).backgroundColor);
          const of = selector => contrast(light(getComputedStyle(document.querySelector(selector)).color), paper);
          const own = selector => { const s = getComputedStyle(document.querySelector(selector));
            return contrast(light(s.color), light(s.backgroundColor)); };
          return Math.min(of('body'), of('caption'), of('.range'), of('tr.front th'), of('tr.reference th'), of('a'),
            own('.mix .refuse'), own('.mix .harm'), own('.mix .other'));
        }"""
    )
    assert ratio >= 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_no_serious_fault(browser, address, width, scheme):
    """axe-core's own rules. The page's policy forbids foreign scripts, so this context alone goes around it."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True, reduced_motion="reduce"
    )
    page = context.new_page()
    page.goto(address)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    context.close()
    assert len(found["passes"]) > 20  # it looked
    faults = {
        fault["id"]: [node["html"][:120] for node in fault["nodes"][:3]]
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
    }
    assert faults == {}

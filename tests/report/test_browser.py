"""The report as a browser shows it: silent, offline, inert, narrow enough, usable from the keyboard."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stayaligned.records import Message
from stayaligned.report import build_report, write_report
from stayaligned.results import Result, Sample

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser
HOSTILE = "</script><img src=x onerror=alert(1)><script>alert(2)</script><a href='javascript:alert(3)'>x</a>\u202e\x00"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = shutil.which("chromium")
    if executable is None:
        reason = "no chromium on the path: install the Debian package `chromium`"
        if os.environ.get("STAYALIGNED_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(comparison: Sequence[Result], make_result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sample = Sample(id="h", prompt_set="harmful", prompt=(Message(role="user", content=HOSTILE),), text=HOSTILE * 20)
    hostile = make_result(HOSTILE + "w" * 200, samples=(sample,), notes=(HOSTILE,))
    mute = make_result("Mute", judges=(), scores=())
    built = build_report([comparison[0], mute, *comparison[1:], hostile], title=HOSTILE, reference="SFT attacked")
    return write_report(built, tmp_path_factory.mktemp("report"))[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_silent_offline_inert_and_narrow_enough(browser: Browser, report: Path, width, scheme) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    noise: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("dialog", lambda dialog: (noise.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    page.wait_for_timeout(50)
    assert noise == []
    assert [url for url in requests if url != "data:,"] == [report.as_uri()]
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1
    assert page.locator("a:not([href^='#'])").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


@pytest.mark.parametrize(("width", "name"), [(1280, ".wide"), (390, ".narrow")])
def test_labels_of_the_plot_do_not_overlap_as_drawn(browser: Browser, report: Path, width: int, name: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(report.as_uri())
    overlaps = page.evaluate(
        """selector => {
          const texts = [...document.querySelectorAll(selector + " svg text")];
          const boxes = texts.map(text => [text.textContent, text.getBoundingClientRect()]);
          const found = [];
          for (const [i, [a, p]] of boxes.entries()) for (const [b, q] of boxes.slice(i + 1))
            if (Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1
                && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 3) found.push([a, b]);
          return [boxes.length, found];
        }""",
        name,
    )
    assert overlaps[0] >= 14
    assert overlaps[1] == []
    page.close()


def test_rows_sort_from_the_keyboard_up_down_and_back_with_the_unscored_last(browser: Browser, report: Path) -> None:
    page = browser.new_page()
    page.goto(report.as_uri())

    def column() -> list[str]:
        cells = page.locator("table.main tbody tr td:nth-child(2)")
        return cells.evaluate_all("cells => cells.map(cell => cell.dataset.sort)")

    heading = page.locator("table.main thead th").nth(1)
    original = column()
    up, down = (sorted(filter(None, original), key=float, reverse=backwards) for backwards in (False, True))
    assert original.count("") == 1
    heading.locator("button").focus()
    page.keyboard.press("Enter")
    assert (column(), heading.get_attribute("aria-sort")) == ([*up, ""], "ascending")
    page.keyboard.press("Space")
    assert (column(), heading.get_attribute("aria-sort")) == ([*down, ""], "descending")
    page.keyboard.press("Enter")
    assert (column(), heading.get_attribute("aria-sort")) == (original, None)
    page.close()


def test_answers_stay_behind_their_warning_until_asked_for(browser: Browser, report: Path) -> None:
    page = browser.new_page()
    page.goto(report.as_uri())
    gate = page.locator("details.gate")
    assert not page.locator(".sample").first.is_visible()
    gate.locator("summary").first.focus()
    page.keyboard.press("Enter")
    gate.locator("details > summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator(".sample").first.is_visible()
    page.close()

"""The report in a real browser: no requests, no scripts but its own, usable by keyboard and on a phone."""

from importlib.resources import files

import pytest

from stayaligned.core.records import Message, Outcome
from stayaligned.evaluation.results import Evidence, Sample
from stayaligned.report import build_report, write_report

pytestmark = pytest.mark.browser

ATTACK = "</script></pre><img src=https://example.org/x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture(scope="module")
def address(grid_results, tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    hostile = Sample(id=ATTACK, prompt_set="harmful", prompt=(Message(role="user", content=ATTACK),), text=ATTACK)
    changes = {"arm": ATTACK, "notes": (ATTACK,), "samples": (hostile,)}
    results = [*grid_results, *(r.model_copy(update=changes) for r in grid_results if r.arm == "Lisa")]
    evidence = {grid_results[0].id: rows(300)}
    report = build_report(results, title=f"Grid {ATTACK}", reference="SFT attacked", evidence=evidence)
    write_report(report, directory)
    return (directory / "report.html").as_uri()


def rows(n):
    """Evidence of n prompts; every seventh id and category is an attack."""
    return [
        Evidence(
            prompt_set="harmful",
            id=f"{ATTACK} {i}" if i % 7 == 0 else f"prompt {i}",
            prompt="0" * 16,
            category=ATTACK if i % 7 == 0 else f"kind {i % 3}",
            outcomes={"classifier": (Outcome.HARM, Outcome.REFUSE, None)[i % 3], "<b>second</b>": Outcome.OTHER},
            judge_scores={"rubric": 1 + i % 5} if i % 2 else {},
            degenerate=i % 11 == 0,
        )
        for i in range(n)
    ]


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=str)
def page(browser, address, request):
    """The page with all details open; complaints are collected in `page.complaints`."""
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


def test_the_page_makes_no_requests_and_runs_only_its_own_script(page):
    page.wait_for_timeout(200)
    assert page.complaints == []
    assert page.locator("img, iframe, object").count() == 0
    assert page.locator("script").evaluate_all("all => all.map(script => script.type)") == ["application/json", ""]
    assert page.get_by_text("onerror=alert(1)").count() > 5  # it is there, as text


def test_the_page_never_scrolls_sideways(page):
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]


def test_no_word_is_cut_unless_it_is_longer_than_a_column(page):
    """A word on two lines is cut; completions, code and words that are too long for a column may be."""
    cut = page.evaluate(
        """() => {
          const walker = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
          const cut = [];
          while (walker.nextNode()) {
            const node = walker.currentNode;
            if (node.parentElement.closest('.said, pre, code, .hidden, script, svg')) continue;
            const words = Array.from(node.textContent.matchAll(/\\S+/g)).filter(word => word[0].length <= 18);
            for (const part of words.flatMap(word => Array.from(word[0].matchAll(/[^-–/]+/g),
                                                              found => [word.index + found.index, found[0]]))) {
              const range = document.createRange();
              range.setStart(node, part[0]);
              range.setEnd(node, part[0] + part[1].length);
              const tops = new Set(Array.from(range.getClientRects(), box => Math.round(box.top)));
              if (tops.size > 1) cut.push(part[1]);
            }
          }
          return cut;
        }"""
    )
    assert cut == []


def test_nothing_is_clipped_at_the_edge_of_the_window(page):
    """Only what a reader can scroll may be wider than the window; the main table is not, on a screen."""
    clipped = page.evaluate(
        """() => Array.from(document.querySelectorAll('main *'))
          .filter(e => !e.closest('.scroll, .hidden, pre, .said, script, details:not([open])') && e.offsetParent)
          .filter(e => e.getBoundingClientRect().right > innerWidth + 1 || e.scrollWidth > e.clientWidth + 1
                       && getComputedStyle(e).overflowX === 'hidden' && !e.closest('.mix'))
          .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert clipped == []
    for name in ("Table of arms", "Table of differences"):
        region = page.get_by_role("region", name=name)
        assert region.evaluate("e => e.scrollWidth <= e.clientWidth") or page.viewport_size["width"] < 1000


def test_a_printed_page_shows_every_section_and_fits_the_paper(browser, grid_results, tmp_path):
    write_report(build_report(grid_results, title="Grid", reference="SFT attacked"), tmp_path)
    page = browser.new_page(viewport={"width": 720, "height": 1000})  # A4 between margins of 1 cm
    page.goto((tmp_path / "report.html").as_uri())
    page.emulate_media(media="print")
    hidden = page.evaluate(
        """() => Array.from(document.querySelectorAll('section > details')).filter(one => !one.open)
          .filter(one => !Array.from(one.children).slice(1).every(child => child.checkVisibility()))
          .map(one => one.querySelector('h2').id)"""
    )
    wide = page.evaluate(
        """() => Array.from(document.querySelectorAll('table:not(.layers), figure, p'))
          .filter(one => one.checkVisibility() && one.getBoundingClientRect().right > innerWidth + 1)
          .map(one => one.outerHTML.slice(0, 60))"""
    )
    spoken = page.locator(".said").evaluate_all("all => all.some(one => one.checkVisibility())")
    page.close()
    assert (hidden, wide) == ([], [])
    assert not spoken  # a model's own words stay behind their warning


@pytest.mark.parametrize(("n_arms", "named"), [(1, "#arms"), (2, ".sides"), (13, ".overview .plot .wide svg")])
def test_the_first_screen_has_the_answer(browser, grid_results, tmp_path, n_arms, named):
    """At 1400 by 900 pixels: the sentence, the comparison with a verdict on each arm, and the cautions in one line."""
    arms = list(dict.fromkeys(result.arm for result in grid_results))
    arms = arms if n_arms > 2 else ["SFT attacked", "Lisa"][:n_arms]
    results = [result for result in grid_results if result.arm in arms]
    write_report(build_report(results, title="Grid", reference="SFT attacked"), tmp_path)
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto((tmp_path / "report.html").as_uri())
    bottoms = {
        selector: page.locator(selector).first.evaluate("element => element.getBoundingClientRect().bottom")
        for selector in ("h1", ".answer", ".cautions", named)
    }
    shown = page.locator(".overview table:visible tbody tr").all_inner_texts()
    plots = page.locator(".plot .wide svg").count()
    page.set_viewport_size({"width": 390, "height": 844})
    cut = page.locator(".single, .sides, .verdicts").evaluate_all(
        "all => all.some(one => one.parentElement.scrollWidth > one.parentElement.clientWidth)"
    )
    page.close()
    assert not cut  # on a phone
    assert {selector: bottom for selector, bottom in bottoms.items() if not 0 < bottom <= 900} == {}
    assert plots == (n_arms > 2)  # one or two arms have no scatter plot
    if n_arms > 2:
        controls = {"Drop", "Shrink", "Random"}
        assert {row.split("\t")[0].strip() for row in shown} == set(arms) - controls  # those are one line below
        assert all(len(row.split("\t")) == 4 and row.split("\t")[3].strip() for row in shown)


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


def test_text_has_enough_contrast(page):
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
          return Math.min(of('body'), of('caption'), of('.range'), of('.soft'), of('tr.context td'), of('.shown'),
            own('.mix .refuse'), own('.mix .harm'), own('.mix .other'));
        }"""
    )
    assert ratio >= 4.5


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_no_serious_fault(browser, address, width, scheme):
    """axe-core's own rules. Only this context bypasses the page's policy, which forbids foreign scripts."""
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


HOSTILE = [
    ATTACK,
    "]]><svg onload=alert(1)>",
    "\u202eabc\u2066\u0000\u0007\u001b[31m\ufffe\u2028",
    "</textarea></style><style>*{display:none}</style>",
    "javascript:alert(1) url(https://example.org/x) @import 'https://example.org/y'",
    "{{ 7*7 }} {% raw %} ${alert(1)}",
    "<a href='javascript:alert(1)'>x</a><form action=//example.org><input autofocus onfocus=alert(1)>",
    '=HYPERLINK("https://example.org")',
    "a" * 50_000,
    "<!-- --><iframe srcdoc='<script>alert(1)</script>'></iframe>",
]


def test_two_hundred_hostile_completions_do_nothing(browser, grid_results, tmp_path):
    """Completions, ids, categories, names of judges and arms are shown as text only."""
    samples = tuple(
        Sample(
            id=f"{HOSTILE[i % 10]}{i}",
            prompt_set="harmful",
            category=HOSTILE[(i + 3) % 10][:200],
            prompt=(Message(role="user", content=HOSTILE[(i + 1) % 10]),),
            text=HOSTILE[i % 10] * (1 + i % 3),
            outcomes={HOSTILE[(i + 2) % 8]: Outcome.HARM, "b": Outcome.REFUSE},
        )
        for i in range(200)
    )
    result = grid_results[0].model_copy(update={"samples": samples})
    found = [row.model_copy(update={"id": f"{HOSTILE[i % 10]}{i}"}) for i, row in enumerate(rows(200))]
    write_report(build_report([result], title=HOSTILE[3], evidence={result.id: found}), tmp_path)
    page = browser.new_page()
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    address = (tmp_path / "report.html").as_uri()
    page.on("request", lambda request: complaints.append(request.url) if request.url != address else None)
    page.goto(address)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.wait_for_timeout(300)
    assert complaints == []
    assert page.locator("img, iframe, object, form, textarea, a[href^='javascript']").count() == 0
    assert page.locator(".answers li").count() >= 200
    assert page.locator("style").count() == 1
    assert page.locator("main").is_visible()
    page.close()


def test_the_table_of_completions_is_paged_sorted_and_filtered_without_a_mouse(page):
    place = page.locator("#every-answer-table")
    assert place.locator("tbody tr").count() == 100
    assert "Rows 1 to 100 of 300" in place.inner_text()
    place.get_by_role("button", name="Next page").focus()
    page.keyboard.press("Enter")
    assert "Rows 101 to 200 of 300" in place.inner_text()
    head = place.get_by_role("columnheader", name="rubric: score")
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    column = head.evaluate("head => head.cellIndex")
    first = place.locator(f"tbody tr td:nth-child({column + 1})").all_inner_texts()
    assert first == sorted(first)
    assert first[0] == "1"
    place.get_by_role("searchbox").fill("prompt 29")
    assert place.locator("tbody tr").count() == len([i for i in range(300) if "29" in f"{i}"[:2] and i % 7])
    place.get_by_role("searchbox").fill("onerror=alert")
    assert "of 43" in place.inner_text()
    assert page.complaints == []


def test_ten_thousand_rows_are_all_there(browser, grid_results, tmp_path):
    """`benchmarks/report.py` measures how fast."""
    result = grid_results[0]
    write_report(build_report([result], title="Many", evidence={result.id: rows(10_000)}), tmp_path)
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    place = page.locator("#every-answer-table")
    place.locator("thead button").first.click()
    assert "Rows 1 to 100 of 10000" in place.inner_text()
    assert place.locator("tbody tr").count() == 100
    page.close()

"""The labelling page in a real browser: keys alone, kills, a full disk, two windows, and hostile texts."""

from __future__ import annotations

import importlib
import random
import re
import resource
import signal
import subprocess
import sys
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest

from stayaligned.core.records import Message
from stayaligned.evaluation.labelling.store import LabelStore
from support.labelling_page import labelling_page
from support.labels import make_design, make_item, make_store, write_judged_run
from support.runs import outcomes

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ROOT = Path(__file__).parents[3]
SHOWN = "document.getElementById('prompt').innerText + document.getElementById('completion').innerText"
KEYS = {"1": "harm", "2": "refuse", "3": "other", "0": "unsure", "u": "unsure"}
SIZES = [(1400, 900, "light"), (1400, 900, "dark"), (390, 844, "light"), (390, 844, "dark")]


class Process:
    """The command in a process of its own, which can be killed and started again."""

    def __init__(self, runs: list[Path], directory: Path, n: int = 50) -> None:
        self.runs, self.directory, self.n = runs, directory, n
        self.start()

    def start(self) -> None:
        options = ["--out", self.directory, "--n", self.n, "--no-browser"]
        command = [sys.executable, "-m", "stayaligned", "label", *self.runs, *options]
        self.running = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
        assert self.running.stdout is not None
        self.address = self.running.stdout.readline().strip()

    def kill(self) -> None:
        self.running.kill()
        self.running.communicate()


@pytest.fixture
def process(tmp_path):
    """The command on two runs, of 60 prompts each: 100 completions are to be labelled."""
    runs = [
        write_judged_run(tmp_path / arm, {"keyword": outcomes(40, harm)}, {"keyword": outcomes(20, 1)}, arm=arm)
        for arm, harm in (("base", 3), ("tuned", 9))
    ]
    process = Process(runs, tmp_path / "labels")
    yield process
    process.kill()


@pytest.fixture
def open_page(browser):
    """`open_page(address, labeller)` opens the page and gives a name; nothing unusual may have happened at the end."""
    contexts, complaints = [], []

    def open_page(address, labeller="Ann", *, context=None, **options):
        if context is None:
            context = browser.new_context(**options)
            contexts.append(context)
        page = context.new_page()
        origin = re.match(r"http://[^/]+/", address).group()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda one: None if one.url.startswith(origin) else complaints.append(one.url))
        page.on("console", lambda one: None if is_lost_connection(one.text) else complaints.append(one.text))
        page.goto(address)
        if labeller:
            page.get_by_label("Who labels?").fill(labeller)
            page.keyboard.press("Enter")
            page.locator("#step:visible, #done:visible").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def is_lost_connection(text):
    """Return whether the browser itself reports a server that is gone, a full disk, or a label of another window."""
    return re.search(r"^Failed to load resource: (net::ERR_|the server responded with a status of (409|507) )", text)


def press(page, key):
    """Label the shown completion; return its text once the page shows something else."""
    text = page.locator("#completion").inner_text()
    page.keyboard.press(key)
    page.wait_for_function("t => document.getElementById('completion').innerText !== t || !done.hidden", arg=text)
    return text


def stored(directory):
    store = LabelStore.open(directory)
    texts = {one.completion: one.text for item in store.design.items for one in item.completions}
    return [(one.labeller, texts[one.completion], one.outcome) for one in store.read()]


def test_a_hundred_completions_by_keys_alone_through_two_kills(process, open_page):
    """What was pressed is what is stored: nothing is lost, nothing counts twice."""
    rng = random.Random(0)
    page = open_page(process.address)
    pressed = {}

    def label(n):
        for _ in range(n):
            key = rng.choice([*KEYS])
            pressed[press(page, key)] = KEYS[key]

    label(30)
    page.get_by_text("30 labelled").wait_for()
    process.kill()
    label(4)  # the next completions are already on the page
    page.get_by_text("4 labels are not saved. The labelling server does not answer").wait_for()
    assert page.locator("#count").inner_text() == "30 labelled, 70 left"
    assert len(stored(process.directory)) == 30
    process.start()
    assert page.url == process.address  # the port and the token of the first time
    page.get_by_text("34 labelled, 66 left").wait_for()
    assert page.locator("#trouble").is_hidden()
    label(20)
    page.keyboard.press("ArrowLeft")  # a change of mind
    page.keyboard.press("k")
    changed = page.locator("#completion").inner_text()
    key = next(key for key in KEYS if KEYS[key] != pressed[changed])
    pressed[press(page, key)] = KEYS[key]
    label(5)
    page.get_by_text("59 labelled").wait_for()
    page.keyboard.press("1")  # killed while this label is on its way
    process.kill()
    n = len(stored(process.directory))
    assert n >= int(page.locator("#count").inner_text().split()[0])
    page.close(run_before_unload=False)
    process.start()
    page = open_page(process.address)
    pressed = {text: outcome for _, text, outcome in stored(process.directory)} | pressed
    label(100 - len(pressed))
    page.get_by_text("Every completion has your label").wait_for()
    page.get_by_text("100 labelled, 0 left").wait_for()
    found = stored(process.directory)
    assert {text: outcome for _, text, outcome in found} == pressed
    assert len(found) == 101  # one was changed
    assert set(Counter(text for _, text, _ in found).values()) == {1, 2}
    assert {name for name, *_ in found} == {"Ann"}
    process.running.send_signal(signal.SIGINT)
    shown, _ = process.running.communicate(timeout=60)
    assert "50 items are labelled of 50 wanted, 60 in all." in shown


def test_labels_given_by_keys_withdraw_the_pass_of_a_biased_judge(tmp_path, open_page, monkeypatch):
    """The example of docs/howto/label.md, labelled on the page by what the completions do."""
    monkeypatch.syspath_prepend(ROOT / "studies")
    example = importlib.import_module("biased_judge")
    example.write_completions(tmp_path)

    def stayaligned(*arguments):
        command = [sys.executable, "-m", "stayaligned", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, " ".join(done.stdout.split())

    for arm in ("before", "after"):
        command = ("judge", f"{arm}.jsonl", "--prompt-set", "harmful", "--judge", "keyword", "--out", arm)
        assert stayaligned(*command)[0] == 0
    assert stayaligned(*example.DECIDE)[0] == 0
    process = Process([tmp_path / "before", tmp_path / "after"], tmp_path / "labels", n=example.LABELLED)
    page = open_page(process.address)
    n = 0
    while page.locator("#step").is_visible():
        shown = page.evaluate(SHOWN)
        page.keyboard.press("2" if shown.endswith(example.REFUSAL) else "1")
        page.wait_for_function(f"shown => {SHOWN} !== shown || !done.hidden", arg=shown)
        n += 1
        if n in (40, 80):
            process.kill()
            process.start()
    page.get_by_text("Every completion has your label").wait_for()
    page.get_by_text(f"{n} labelled, 0 left").wait_for()
    process.kill()
    assert len(stored(process.directory)) == n > example.LABELLED
    code, shown = stayaligned(*example.DECIDE, "--labels", "labels")
    assert code == 3
    assert "rose by 6.3 points (+0.0 to +12.2) by labels of 100 prompts (+0.0 by the judge alone)" in shown


def test_a_label_is_not_shown_as_saved_on_a_full_disk(process, open_page):
    page = open_page(process.address)
    press(page, "1")
    page.locator("#saved", has_text="Saved").wait_for()
    size = (process.directory / "labels.jsonl").stat().st_size
    resource.prlimit(process.running.pid, resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
    press(page, "2")
    page.get_by_text("1 label is not saved.").wait_for()
    assert "labels.jsonl can't be written: File too large" in page.locator("#trouble").inner_text()
    assert "1 labelled" in page.locator("#count").inner_text()
    assert page.locator("#saved").inner_text() == "1 not saved yet"
    page.keyboard.press("ArrowLeft")
    assert "unsaved" in page.locator("#outcomes [aria-pressed=true]").get_attribute("class")
    assert len(stored(process.directory)) == 1
    resource.prlimit(process.running.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    page.get_by_text("Saved: Refused").wait_for()
    assert page.locator("#trouble").is_hidden()
    assert page.locator("#outcomes .unsaved").count() == 0
    assert [outcome for *_, outcome in stored(process.directory)] == ["harm", "refuse"]


def test_two_windows_agree_and_store_nothing_twice(process, open_page, browser):
    context = browser.new_context()
    one, two = (open_page(process.address, context=context) for _ in range(2))
    text = press(one, "1")
    one.get_by_text("Saved: Harm").wait_for()
    two.keyboard.press("2")  # this window does not know yet
    two.get_by_text("Another window gave Harm").wait_for()
    assert two.locator("#completion").inner_text() == text
    assert two.locator("#outcomes [aria-pressed=true]").inner_text().startswith("Harm")
    assert stored(process.directory) == [("Ann", text, "harm")]
    press(two, "2")  # now it does
    two.get_by_text("Saved: Refused").wait_for()
    assert one.locator("#completion").inner_text() == press(two, "3")  # the second completion
    two.get_by_text("Saved: Other").wait_for()
    press(one, "3")  # the same label in both
    one.get_by_text("Saved: Other").wait_for()
    assert [outcome for *_, outcome in stored(process.directory)] == ["harm", "refuse", "other"]
    one.evaluate("dispatchEvent(new Event('focus'))")
    one.keyboard.press("ArrowLeft")
    one.keyboard.press("ArrowLeft")
    one.locator("#outcomes [aria-pressed=true]", has_text="Refused").wait_for()
    three = open_page(process.address, "Bob", context=context)
    assert three.locator("#count").inner_text() == "0 labelled, 100 left"
    three.get_by_role("button", name="Labeller Bob: change").click()
    three.get_by_role("button", name="Ann").wait_for()
    three.evaluate("dispatchEvent(new Event('focus'))")
    three.keyboard.type("1")  # is part of a name now
    three.wait_for_timeout(200)
    assert three.get_by_label("Who labels?").input_value() == "1"
    three.get_by_role("button", name="Ann").click()
    three.get_by_text("2 labelled, 98 left").wait_for()
    context.close()


HOSTILE = [
    "</script></pre><img src=https://example.org/x onerror=alert(1)><script>alert(2)</script>",
    "]]><svg onload=alert(1)>",
    "\u202eabc\u2066\u200b\u0000\u0007\u001b[31m\ufffe\u2028",
    "</textarea></style><style>*{display:none}</style>",
    "javascript:alert(1) url(https://example.org/x) @import 'https://example.org/y'",
    "{{ 7*7 }} {% raw %} ${alert(1)} {STYLE} {SCRIPT}",
    "<a href='javascript:alert(1)'>x</a><form action=//example.org><input autofocus onfocus=alert(1)>",
    "<!-- --><iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "a" * 100_000,
    "line\n" * 5_000,
    "\u0301" * 5_000 + "\u05d0\u05d1 \u0627\u0644",
    "",
]


def hostile_directory(directory):
    """A design with all hostile texts, in the last turn of the prompt, an earlier turn, and the completions."""
    n = len(HOSTILE)
    items = []
    for index, text in enumerate(HOSTILE):
        roles = ("system", "user", "assistant", "user")[-4 if index % 2 else -1 :]
        turns = tuple(Message(role=role, content=HOSTILE[(index + k) % n] or "-") for k, role in enumerate(roles))
        item = make_item(index, [text, f"{text} and more"])
        items.append(item.model_copy(update={"messages": turns, "prompt_set": ("harmful", "benign")[index % 2]}))
    LabelStore.create(directory, make_design(items))
    return directory


@pytest.mark.parametrize(("width", "height", "scheme"), [SIZES[0], SIZES[3]], ids=str)
def test_hostile_completions_do_nothing_and_fit(tmp_path, open_page, width, height, scheme):
    with labelling_page(hostile_directory(tmp_path / "labels")) as client:
        page = open_page(client.server.address, viewport={"width": width, "height": height}, color_scheme=scheme)
        seen = []
        for _ in range(2 * len(HOSTILE)):
            assert page.locator("img, iframe, object, svg, textarea, a, style + style").count() == 0
            assert page.locator("#completion *:not(.nothing)").count() == 0
            assert (page.title(), page.url) == ("Label completions", client.server.address)
            assert page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]") == [
                width,
                height,
            ]
            boxes = [page.locator(one).bounding_box() for one in ("#completion", "#outcomes", "#forward")]
            assert all(box["y"] >= 0 and box["y"] + box["height"] <= height for box in boxes)
            assert boxes[0]["height"] >= 90
            seen.append(page.locator("#completion").evaluate("one => one.textContent"))
            press(page, "0")
        page.get_by_text("Every completion has your label").wait_for()
    assert not any(re.search("[\u202e\u2066\u200b\u0000\u0007\u001b\u2028]", text) for text in seen)
    assert "The completion is empty." in seen
    for text in HOSTILE[:2] + HOSTILE[3:-1]:
        assert {text, f"{text} and more"} <= {*seen}


@pytest.mark.parametrize(("width", "height", "scheme"), SIZES, ids=str)
def test_axe_finds_no_fault_in_any_state(tmp_path, open_page, width, height, scheme):
    """axe-core's own rules. Only this context bypasses the page's policy, which forbids foreign scripts."""
    axe = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    store = make_store(tmp_path / "labels", n=2)
    store.append([store.label(store.design.items[0].id, store.design.items[0].completions[0].completion, "harm", "Bo")])
    faults = {}
    with labelling_page(tmp_path / "labels") as client:
        size = {"width": width, "height": height}
        page = open_page(
            client.server.address, "", viewport=size, color_scheme=scheme, reduced_motion="reduce", bypass_csp=True
        )

        def check(state):
            page.evaluate(axe)
            found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
            assert len(found["passes"]) > 15  # it looked
            faults[state] = [(one["id"], one["nodes"][0]["html"][:120]) for one in found["violations"]]

        page.get_by_role("button", name="Bo").wait_for()
        check("name")
        page.get_by_label("Who labels?").fill("Ann")
        page.keyboard.press("Enter")
        page.locator("#step").wait_for()
        check("completion")
        page.keyboard.press("?")
        check("help")
        page.keyboard.press("Escape")
        press(page, "1")
        page.keyboard.press("k")
        check("labelled")
        page.context.set_offline(True)
        page.keyboard.press("2")
        page.locator("#trouble:visible").wait_for()
        page.keyboard.press("k")
        check("not saved")
        page.context.set_offline(False)
        page.get_by_text("Saved: Refused").wait_for()
        page.keyboard.press("j")
        for _ in range(3):
            press(page, "3")
        page.locator("#done:visible").wait_for()
        check("end")
    assert {state: found for state, found in faults.items() if found} == {}


def test_buttons_do_what_keys_do_and_are_big_enough_for_a_finger(tmp_path, open_page):
    make_store(tmp_path / "labels", n=6)
    with labelling_page(tmp_path / "labels") as client:
        page = open_page(client.server.address, viewport={"width": 320, "height": 640}, has_touch=True)
        for button in page.locator("button:visible").all():
            box = button.bounding_box()
            assert min(box["width"], box["height"]) >= 44, button.inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") == 320
        first = page.locator("#completion").inner_text()
        page.get_by_role("button", name="Refused").tap()
        page.get_by_text("Saved: Refused").wait_for()
        page.get_by_role("button", name="Other").dblclick()  # labels one completion
        page.get_by_text("Saved: Other").wait_for()
        assert page.locator("#place").inner_text() == "3 of 12"
        page.get_by_role("button", name="Back").tap()
        page.get_by_role("button", name="Back").tap()
        assert page.locator("#completion").inner_text() == first
        page.get_by_role("button", name="Unsure").tap()
        page.get_by_text("Saved: Unsure").wait_for()
        assert page.locator("#place").inner_text() == "3 of 12"
        page.keyboard.down("1")
        page.keyboard.down("1")  # a key that is held down repeats
        page.keyboard.up("1")
        page.get_by_text("Saved: Harm").wait_for()
        for keys in ("Control+1", "Alt+2", "a", "Enter", "Space"):
            page.keyboard.press(keys)
        page.reload()
        page.get_by_text("3 labelled, 9 left").wait_for()  # the name is kept in this window
        assert [outcome for *_, outcome in stored(tmp_path / "labels")] == ["refuse", "other", "unsure", "harm"]


def test_a_long_completion_scrolls_by_keys_and_the_next_one_begins_at_its_top(tmp_path, open_page):
    texts = ["".join(f"{letter} line {i}\n" for i in range(400)) for letter in "ab"]
    LabelStore.create(tmp_path / "labels", make_design([make_item(0, texts), make_item(1, texts)]))
    with labelling_page(tmp_path / "labels") as client:
        page = open_page(client.server.address)
        page.keyboard.press("End")
        page.wait_for_function("() => document.getElementById('completion').scrollTop > 1000")
        press(page, "1")
        assert page.locator("#completion").evaluate("one => [one.scrollTop, document.activeElement === one]") == [
            0,
            True,
        ]
        assert page.locator("#back").is_visible()


def test_more_than_was_asked_for_can_be_labelled(tmp_path, open_page):
    items = [make_item(index, [f"text {index}"]) for index in range(40)]
    LabelStore.create(tmp_path / "labels", make_design(items).model_copy(update={"wanted": 3}))
    with labelling_page(tmp_path / "labels", "Ann") as client:
        page = open_page(client.server.address, "")
        page.locator("#step").wait_for()
        assert page.locator("#who").is_hidden()
        assert [press(page, "1") for _ in range(3)] == ["text 0", "text 1", "text 2"]
        page.get_by_role("button", name="Label more completions").click()
        assert press(page, "2") == "text 3"
        page.get_by_text("4 labelled, 9 left").wait_for()
        page.reload()
        page.get_by_text("4 labelled, 9 left").wait_for()
        page.locator("#completion", has_text="text 4").wait_for()

import csv
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from stayaligned.cli.console import _SafeConsole
from stayaligned.core.records import LayerReport, Message, Metric, Outcome
from stayaligned.core.text import markdown, one_line, percent, visible
from stayaligned.evaluation.results import Evidence, PatchRecord, Sample
from stayaligned.report import build_report, terminal_table, write_report
from stayaligned.report.completions import completion_table
from stayaligned.report.figures import harm_against_accuracy
from stayaligned.report.layers import layer_table
from stayaligned.report.texts import csv_cell
from stayaligned.report.values import ModuleEffect, PatchSummary
from stayaligned.report.verdicts import is_shown

HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    '"><a href="javascript:alert(1)">x</a>',
    "[x](javascript:alert(1))",
    "=cmd|' /C calc'!A0",
    "a|b`c`*d*_e_ {{ 7*7 }} {% raw %}",
    "safe\u202egnp.exe",
    "nul\x00 bell\x07 \u2066isolate",
    "https://example.org @someone www.example.org",
)
VOID = {"meta", "link", "br", "img", "hr", "input", "col"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def written(results, directory, **settings):
    paths = write_report(build_report(results, **{"title": "t", **settings}), directory)
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


@pytest.fixture(scope="module")
def grid(grid_results, tmp_path_factory):
    return written(grid_results, tmp_path_factory.mktemp("grid"), reference="SFT attacked")


@pytest.fixture(scope="module")
def hostile(make_result, tmp_path_factory):
    results = [
        make_result(
            text,
            seed,
            notes=(text,),
            samples=(
                Sample(
                    id=text,
                    prompt_set="harmful",
                    category=text,
                    prompt=(Message(role="user", content=text),),
                    text=text,
                ),
            ),
        )
        for text in HOSTILE
        for seed in (1, 2)
    ]
    return written(results, tmp_path_factory.mktemp("hostile"), title=HOSTILE[0], reference=HOSTILE[0])


def test_the_page_is_complete_and_makes_no_requests(grid):
    page = Page(grid["report.html"])
    assert page.open == []
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "'unsafe-inline'" not in policy.partition("script-src")[2]
    for tag, attributes in page.elements:
        assert tag not in {"iframe", "object", "embed", "form", "base"}
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    assert not re.search(r"@import|url\((?!#)", grid["report.html"])


def test_identifiers_are_unique_and_every_reference_has_its_target(grid):
    page = Page(grid["report.html"])
    found = [a["id"] for _, a in page.elements if "id" in a]
    assert len(found) == len(set(found))
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', grid["report.html"]))
    referred |= {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a}
    assert referred <= set(found)


def test_every_table_has_a_caption_and_every_picture_a_description(grid):
    page = Page(grid["report.html"])
    tags = [tag for tag, _ in page.elements]
    assert tags.count("table") == tags.count("caption") > 5
    for tag, attributes in page.elements:
        if tag == "svg":
            assert attributes.get("aria-hidden") or len(attributes.get("aria-label") or "") > 20
        if tag == "th":
            assert attributes.get("scope") in {"row", "col"}


def test_sections_are_in_reading_order(grid):
    order = [
        "cautions",
        "arms",
        "differences",
        "seeds",
        "outcomes",
        "layers",
        "training",
        "judges",
        "disputed",
        "answers",
    ]
    assert re.findall(r'<h2 id="(\w+)"', grid["report.html"]) == [*order, "again", "reading"]


def test_equal_results_give_equal_bytes_in_another_process(grid_results, grid, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    for i, result in enumerate(grid_results):
        (folder / f"{i:02}.json").write_text(result.model_dump_json(), encoding="utf-8")
    code = (
        "import sys; from pathlib import Path\n"
        "from stayaligned.report import *; from stayaligned.evaluation.results import Result\n"
        "paths = sorted(Path(sys.argv[1]).glob('*.json'))\n"
        "results = [Result.model_validate_json(p.read_text(encoding='utf-8')) for p in paths]\n"
        "write_report(build_report(results, title='t', reference='SFT attacked'), Path(sys.argv[2]))"
    )
    subprocess.run(
        [sys.executable, "-c", code, folder, tmp_path], check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    for name, text in grid.items():
        assert (tmp_path / name).read_text(encoding="utf-8") == text


def test_the_release_grid_is_written_within_five_seconds_of_cpu(grid_results, tmp_path):
    began = time.process_time()
    written(grid_results, tmp_path, reference="SFT attacked")
    assert time.process_time() - began < 5


def test_importing_the_report_loads_nothing_heavy():
    code = "import sys, stayaligned.report; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "transformers", "matplotlib", "numpy", "scipy", "jinja2", "rich", "yaml"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


# ---- hostile text --------------------------------------------------------------------------------------------------


def test_hostile_text_is_inert_in_the_page(hostile):
    page = Page(hostile["report.html"])
    assert page.open == []
    assert all(tag not in {"img", "a"} or (a.get("href") or "").startswith("#") for tag, a in page.elements)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    assert "{{ 7*7 }}" in page.text  # never a template
    for character in "\x00\x07\u202e\u2066":
        assert character not in hostile["report.html"]
    assert "⟨U+202E⟩" in page.text


def test_hostile_text_is_inert_in_markdown(hostile):
    text = hostile["report.md"]
    assert not re.search(r"<\w|</|\]\(|`c`|@someone|://|www\.", text.replace("`report.html`", ""))
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 4
    assert all(len({row.count("|") for row in table.splitlines()}) == 1 for table in tables)
    for character in "\x00\x07\u202e\u2066":
        assert character not in text


def test_hostile_text_is_inert_in_latex(hostile):
    text = hostile["report.tex"]
    rows = re.findall(r"^.* \\\\$", text, flags=re.MULTILINE)
    assert len(rows) == 1 + len(HOSTILE)
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {2}  # harm and accuracy
    plain = re.sub(r"\\[\\&%$#_{}]", "", text)  # without what is escaped
    assert plain.count("{") == plain.count("}")
    assert not re.search(r"[#_^~|<>\"]", plain)
    assert set(re.findall(r"\\([a-z]+)", plain)) <= {
        *("begin", "end", "usepackage", "centering", "caption", "label", "toprule", "midrule", "bottomrule"),
        *("scriptsize", "uparrow", "downarrow", "langle", "rangle"),
        *("textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater", "textbar"),
    }
    assert not any(row.lstrip().startswith(("[", "*")) for row in rows)


def test_the_latex_table_has_the_numbers_of_the_report(grid, grid_results):
    report = build_report(grid_results, title="t", reference="SFT attacked")
    for arm in report.arms:
        row = next(
            line for line in grid["report.tex"].splitlines() if line.startswith(arm.name.replace("%", "\\%") + " ")
        )
        harm = arm.estimates["harmful_score"]
        interval = f"[{100 * harm.low:.1f}, {100 * harm.high:.1f}]"
        assert f"{percent(harm.mean)}" in row and interval in row
        assert ("\\textbf" in row) == is_shown(arm)


def test_hostile_text_is_neither_a_formula_nor_a_control_character_in_csv(hostile):
    rows = list(csv.DictReader(io.StringIO(hostile["results.csv"])))
    assert len(rows) == len(HOSTILE) * 2 * 2
    assert not any((cell or "").startswith(("=", "+", "-", "@", "\t", "\r")) for row in rows for cell in row.values())
    assert "'=cmd|' /C calc'!A0" in {row["arm"] for row in rows}


@given(text=st.text(max_size=80))
def test_no_text_survives_as_markup(text):
    assert not set("|<>`*[]\\\n\r\x00") & set(markdown(text))
    assert csv_cell(text)[:1] not in ("=", "+", "-", "@", "\t", "\r", "\n")
    assert "\u202e" not in visible(text + "\u202e")
    assert len(one_line(text, 20)) <= 20


def test_rich_markup_in_names_is_text(make_result):
    report = build_report([make_result("[red]x[/red] [/oops]", 1)], title="[link=file:///]t[/link]")
    assert "[red]x[/red]" in plain(terminal_table(report), 100)


def test_a_completion_of_a_megabyte_is_clipped_with_a_note(make_result, tmp_path):
    long = Sample(id="x", prompt_set="harmful", prompt=(Message(role="user", content="p"),), text="wörd " * 200_000)
    page = written([make_result("A", 1, samples=(long,))], tmp_path)["report.html"]
    assert len(page) < 100_000
    assert "980000 more characters" in page


# ---- missing parts --------------------------------------------------------------------------------------------------


def plain(table, width):
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    return stream.getvalue()


def test_unscored_items_are_reported_and_never_zero_in_every_format(make_result, tmp_path):
    results = [make_result("A", 1, None, None)]
    texts = written(results, tmp_path)
    assert "0 of 150 scored" in texts["report.html"]
    assert "n/a (0 of 150 scored)" in texts["report.md"]
    assert [row["value"] for row in csv.DictReader(io.StringIO(texts["results.csv"]))] == ["", ""]
    assert "0 of 150" in plain(terminal_table(build_report(results, title="t")), 100)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scores": ()},
        {"judges": ()},
        {"judges": (), "scores": ()},
        {"experiment": {}},
        {"harm": None},
        {"training_log": ({"step": 1, "loss": 0.5},)},
        {"training_log": ({"step": 1, "loss": float("nan")}, {"train_runtime": 1.0})},
    ],
    ids=str,
)
@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_missing_parts_do_not_affect_the_rest(make_result, tmp_path, changes, seeds):
    results = [make_result("A", seed, **changes) for seed in seeds]
    texts = written(results, tmp_path, reference="A")
    assert Page(texts["report.html"]).open == []
    assert "How to read this" in texts["report.md"]
    assert "A" in plain(terminal_table(build_report(results, title="t")), 80)


def test_probes_are_drawn_with_the_losses(make_result, tmp_path):
    watched = {"watch/refusal_margin": 3.25, "watch/alignment_loss": 0.5}
    log = [{"step": step, "loss": 1.0, "drift": 0.25, "alignment_loss": 1.0} for step in (1, 2)]
    log += [{"step": step, **watched} for step in (0, 2)]
    page = written([make_result("A", 1, training_log=tuple(log))], tmp_path)["report.html"]
    for ended in ("refusal margin, nats ends at 3.25", "held-out alignment loss ends at 0.5", "ends at 0.25"):
        assert ended in page
    # Without alternating phases, the training loss is drawn with the probe's loss.
    plain_log = [{"step": 1, "loss": 1.0}, {"step": 1, "watch/alignment_loss": 0.5}]
    page = written([make_result("A", 1, training_log=tuple(plain_log))], tmp_path / "plain")["report.html"]
    assert "loss ends at 1; held-out alignment loss ends at 0.5" in page


def test_names_in_any_script_are_drawn(make_result, tmp_path):
    results = [make_result(name, 1, 0.1) for name in ("微调", "تجربة", "$x_1$ & <b>", "x" * 100_000)]
    page = written(results, tmp_path)["report.html"]
    assert "微调" in page
    assert len(page) < 200_000


def test_many_metrics_get_several_tables_of_which_each_fits_a_screen(make_result, tmp_path):
    names = [f"lm_eval/task_{i}/acc" for i in range(15)]
    own = tuple(Metric(name=name, value=0.5, n=10, higher_is_better=True) for name in names)
    results = [make_result(arm, seed, scores=own) for arm in "ABC" for seed in (1, 2)]
    page = written(results, tmp_path, reference="A")["report.html"]
    for name in ("Table of arms", "Table of differences", "Table of every seed"):
        assert re.findall(rf'aria-label="{name}, part (\d) of 3"', page) == ["1", "2", "3"]


@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_every_arm_but_the_controls_has_a_name_in_the_plot(grid_results, size):
    report = build_report(grid_results, title="t", reference="SFT attacked")
    names = " ".join(re.findall(r"<text[^>]*>([^<]+)</text>", harm_against_accuracy(report, size)))
    assert {arm.name for arm in report.arms if arm.name in names} == {a.name for a in report.arms if not a.control}


def test_marks_that_touch_share_a_label_that_counts_the_rest(make_result):
    crowd = build_report([make_result(f"arm {i}", 1, 0.5, 0.5) for i in range(40)], title="t")
    names = re.findall(r"<text[^>]*>([^<]+)</text>", harm_against_accuracy(crowd))
    assert [name for name in names if "arm " in name] == [f"arm {i}" for i in range(8)]
    assert "and 32 more" in names


def test_no_name_in_the_plot_is_nearer_to_the_mark_of_another_arm(make_result):
    places = {"Undefended": (0.99, 1.0), "Nearby": (0.85, 1.0), "Below": (0.96, 0.93), "Left": (0.06, 0.96)}
    report = build_report([make_result(name, 1, *at) for name, at in places.items()], title="t")
    found = re.findall(r'<text[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)</text>', harm_against_accuracy(report))
    zero, hundred = ([(float(x), float(y)) for x, y, text in found if text == tick] for tick in ("0 %", "100 %"))
    left, right, top = zero[0][0], hundred[0][0], hundred[1][1]
    bottom = zero[1][1]
    at = {n: (left + x * (right - left), bottom + y * (top - bottom)) for n, (x, y) in places.items()}
    for x, y, name in ((float(x), float(y), text) for x, y, text in found if text in places):
        middle, half = (x + 3 * len(name), y - 4), (3 * len(name), 5)  # letters are about 6 pixels wide and 10 high
        gaps = {n: math.hypot(*(max(abs(spot[i] - middle[i]) - half[i], 0) for i in (0, 1))) for n, spot in at.items()}
        assert min(gaps, key=gaps.__getitem__) == name


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_csv_holds_every_value_of_every_result_exactly(grid, grid_results):
    rows = {
        (row["arm"], int(row["seed"]), row["metric"], row["judge"]): row
        for row in csv.DictReader(io.StringIO(grid["results.csv"]))
    }
    for result in grid_results:
        readings = [(reading.judge, reading.metrics) for reading in result.judges] + [("", result.scores)]
        for judge, metrics in readings:
            for metric in metrics:
                row = rows.pop((result.arm, result.seed, metric.name, judge))
                assert (float(row["value"]), int(row["n"])) == (metric.value, metric.n)
                assert (float(row["low"]), float(row["high"])) == (metric.low, metric.high)
                assert row["primary_judge"] == {"classifier": "1", "keyword": "0", "": ""}[judge]
    assert not rows


def test_the_terminal_table_fits_eighty_columns(grid_results):
    text = plain(terminal_table(build_report(grid_results, title="t", reference="SFT attacked")), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    lisa = next(line for line in text.splitlines() if line.strip().startswith("Lisa"))
    assert lisa.count("±") == 6
    assert "−" in lisa


@pytest.mark.parametrize("width", [80, 60, 40])
def test_on_a_narrow_terminal_the_table_keeps_every_number(grid_results, width):
    table = terminal_table(build_report(grid_results, title="t", reference="SFT attacked"))
    numbers = {word for column in table.columns for cell in column.cells for word in str(cell).split()}
    stream = io.StringIO()
    _SafeConsole(file=stream, width=width, markup=False, highlight=False).print(table)
    assert numbers <= set(stream.getvalue().split())
    assert max(map(len, stream.getvalue().split("In %")[0].splitlines())) <= width


def test_negative_zero_and_none_are_formatted_well():
    assert (percent(-0.0001), percent(None), percent(-0.25, signed=True)) == ("0.0", "n/a", "−25.0")
    assert percent(0.0, signed=True) == "+0.0"


@pytest.mark.parametrize("layers", [30, 80])
def test_the_tables_of_a_patch_have_a_cell_for_every_module(layers) -> None:
    modules = [
        ModuleEffect(f"model.layers.{layer}.mlp.{kind}", (7 * layer + i) % 11 / 10, 0.5, layer % 4, 3)
        for layer in range(layers)
        for i, kind in enumerate(("gate", "up", "down"))
    ]
    table = layer_table(PatchSummary("safe_lora", {}, tuple(modules)), "similarity")
    assert table.columns == tuple(str(layer) for layer in range(layers))
    assert [kind for kind, _ in table.rows] == ["mlp.gate", "mlp.up", "mlp.down"]
    cells = [cell for _, row in table.rows for cell in row]
    assert sorted(cell.text for cell in cells) == sorted(f"{100 * module.similarity:.0f}" for module in modules)
    assert sum(cell.css != "" for cell in cells) == sum(module.n_selected > 0 for module in modules)
    assert sum("part" in cell.css for cell in cells) == sum(0 < module.n_selected < 3 for module in modules)


def test_a_page_of_twelve_patched_arms_with_every_completion_stays_below_a_megabyte(grid_results, tmp_path):
    """210 modules in each patch, and 700 completions with two judges in each run."""
    layers = [
        LayerReport(
            module=f"model.layers.{layer}.{kind}", similarity=layer / 30, shrinkage=0.5, selected=True, update_norm=1.0
        )
        for layer in range(30)
        for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]
    patch = PatchRecord(patch="safe_lora", layers=tuple(layers))
    patched = [result for result in grid_results if result.arm in ("Aligned", "SFT attacked", "Lisa", "Safe LoRA")]
    results = [result for result in patched if result.arm != "Safe LoRA"]
    results += [
        result.model_copy(update={"arm": f"Patch {i}", "id": f"{i}-{result.seed}", "patches": (patch,)})
        for result in patched[-3:]
        for i in range(12)
    ]
    outcomes = (Outcome.HARM, Outcome.REFUSE, Outcome.REFUSE, Outcome.OTHER, None)
    rows = [
        Evidence(
            prompt_set=("harmful", "benign", "task")[i % 3],
            id=f"{i * 7919:016x}",
            prompt=f"{i:016x}",
            category=f"kind {i % 13}",
            outcomes={} if i % 3 == 2 else {"classifier": outcomes[i % 5], "keyword": outcomes[i % 4]},
            score=float(i % 2) if i % 3 == 2 else None,
            degenerate=i % 50 == 0,
        )
        for i in range(700)
    ]
    page = written(results, tmp_path, reference="SFT attacked", evidence={r.id: rows for r in results})["report.html"]
    assert len(page.encode()) < 1_000_000
    assert f"each of the {700 * len(results)} completions" in page


def test_the_packed_table_of_completions_holds_every_row(grid_results):
    """Two runs have the same prompts, a third has others; scores have too many values for one character each."""

    def row(i, world):
        return Evidence(
            prompt_set=("harmful", "task")[i % 2],
            id=f"</script> {world} {i}",
            prompt=f"{i:016x}",
            category=f"kind {i % 3}" if i % 4 else "",
            outcomes={} if i % 2 else {"classifier": (Outcome.HARM, None)[i % 3 == 0]},
            score=i / 200 if i % 2 else None,
            degenerate=None if i % 5 == 0 else i % 7 == 0,
        )

    runs = {grid_results[i].id: [row(k, world) for k in range(200)] for i, world in ((0, "a"), (3, "a"), (4, "b"))}
    report = build_report(grid_results, title="t", evidence=runs)
    packed = completion_table(report)
    assert "<" not in packed
    table = json.loads(packed)

    def unpack(column, n):
        if column is None:
            return [None] * n
        return [column[0][table["alphabet"].index(c)] for c in column[1]] if isinstance(column[0], list) else column

    rows = []
    for run in table["runs"]:
        ids, *asked = table["prompts"][run["prompts"]]
        columns = [unpack(column, len(ids)) for column in (*asked, *run["cells"])]
        rows += [(run["arm"], run["seed"], *cells) for cells in zip(ids, *columns, strict=True)]
    assert len(table["prompts"]) == 2
    assert rows == [
        (
            *(one.arm, one.seed, one.evidence.id, one.evidence.prompt_set, one.evidence.category),
            *(None if one.evidence.prompt_set == "task" else (one.evidence.outcomes["classifier"] or "unscored"),),
            one.evidence.score,
            {None: None, True: "yes", False: "no"}[one.evidence.degenerate],
        )
        for one in report.evidence_rows
    ]


def test_experts_share_a_row_and_a_layer_without_a_module_has_no_cell() -> None:
    modules = [ModuleEffect(f"layers.1.experts.{i}.up", i / 100, 1.0, 0, 1) for i in range(100)]
    table = layer_table(PatchSummary("p", {}, (*modules, ModuleEffect("head", -0.5, 1.0, 1, 1))), "similarity")
    assert table.columns == ("1", "none")
    assert [(kind, [cell and cell.text for cell in cells]) for kind, cells in table.rows] == [
        ("experts.*.up", ["50", None]),
        ("head", [None, "−50"]),
    ]

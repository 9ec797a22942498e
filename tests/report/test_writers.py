"""The written files: self-contained, deterministic, inert, and honest about what is missing."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from stayaligned.records import LayerReport, Message, Metric
from stayaligned.report import build_report, terminal_table, write_report
from stayaligned.report.html import layer_map, render_html
from stayaligned.report.plots import mean_curve, thin
from stayaligned.report.tables import render_csv, render_markdown
from stayaligned.report.values import ModuleEffect, PatchSummary
from stayaligned.results import JudgeReading, PatchRecord, Result, Sample

HOSTILE = (
    "</script></style></details><img src=x onerror=alert(1)><script>alert(2)</script> javascript:alert(3) "
    "[x](javascript:alert(4)) |a|`b`| $\\frac$ {{ 7*7 }} \u202eevil\x00 http://evil.example @all"
)


class Page(HTMLParser):
    """Tags with their attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        current = self.open[-1] if self.open else ""
        self.raw.get(current, self.text).append(data)


def hostile_result(make_result) -> Result:
    sample = Sample(
        id=HOSTILE, prompt_set="harmful", category=HOSTILE, prompt=(Message(role="user", content=HOSTILE),),
        text=HOSTILE + "x" * 1_000_000, reference=HOSTILE, outcomes={HOSTILE: None},
    )  # fmt: skip
    plain = make_result(HOSTILE)
    layer = LayerReport(module=f"layers.0.{HOSTILE}", similarity=0.2, shrinkage=0.1, selected=True, update_norm=1)
    return plain.model_copy(
        update={
            "samples": (sample,),
            "notes": (HOSTILE,),
            "judges": (plain.judges[0].model_copy(update={"judge": HOSTILE}), *plain.judges[1:]),
            "patches": (PatchRecord(patch=HOSTILE, layers=(layer, layer.model_copy(update={"shrinkage": 0.4}))),),
            "experiment": {"model": HOSTILE},
            "scores": (*plain.scores, Metric(name=HOSTILE, value=0.5, n=2, higher_is_better=True)),
            "provenance": plain.provenance.model_copy(
                update={"versions": {HOSTILE: HOSTILE}, "inputs": {"m": HOSTILE}}
            ),
        }
    )


@pytest.fixture(scope="module")
def plain_page(comparison: Sequence[Result]) -> str:
    return render_html(build_report(comparison, title="t", reference="SFT attacked"))


@pytest.fixture(scope="module")
def hostile_page(make_result) -> str:
    return render_html(build_report([hostile_result(make_result), make_result("b")], title=HOSTILE))


def test_the_page_asks_nothing_of_a_network(plain_page: str) -> None:
    page = Page(plain_page)
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "form", "base", "audio", "video", "img")
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:,")), (tag, target)
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in page.raw["style"][0]
    assert "@import" not in page.raw["style"][0]


def test_the_policy_admits_exactly_the_one_script(plain_page: str) -> None:
    page = Page(plain_page)
    (script,) = page.raw["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    assert f"script-src 'sha256-{digest}'" in policy


def test_ids_are_unique_and_every_inner_link_leads_somewhere(plain_page: str) -> None:
    page = Page(plain_page)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    used = {a[n] for _, a in page.tags for n in ("href", "xlink:href") if (a.get(n) or "").startswith("#")}
    used |= {f"#{name}" for name in re.findall(r"url\(#([^)]*)\)", plain_page)}
    used |= {f"#{name}" for _, a in page.tags for name in (a.get("aria-labelledby") or "").split()}
    assert {target[1:] for target in used} <= set(ids)


def test_hostile_text_makes_no_element_and_no_attribute(hostile_page: str) -> None:
    page = Page(hostile_page)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 1
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert not [a for _, a in page.tags for name in ("href", "src") if "javascript" in (a.get(name) or "")]
    assert "\u202e" not in hostile_page
    assert "\x00" not in hostile_page
    assert "⟦U+202E⟧" in hostile_page
    assert "{{ 7*7 }}" in "".join(page.text)
    assert page.open == ["html"] or not page.open


def test_a_megabyte_of_answer_is_clipped_and_the_rest_counted(hostile_page: str) -> None:
    assert len(hostile_page) < 500_000
    assert re.search(r"and 9\d\d,\d{3} that are left out", hostile_page)


def test_hostile_text_is_inert_in_markdown(make_result) -> None:
    text = render_markdown(build_report([hostile_result(make_result), make_result("b")], title=HOSTILE))
    assert "<" not in text
    assert "http://" not in text
    assert "x" * 100 not in text
    header, _, *rows = [line for line in text.splitlines() if line.startswith("|")][:4]
    assert {row.count("|") for row in rows} == {header.count("|")}


def test_hostile_cells_start_no_formula(make_result) -> None:
    arms = ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", 'a"b,c\nd']
    rows = list(csv.DictReader(io.StringIO(render_csv(build_report([make_result(a) for a in arms], title="t")))))
    names = list(dict.fromkeys(row["arm"] for row in rows))
    assert len(names) == len(arms)
    assert not [name for name in names if name.lstrip().startswith(("=", "+", "-", "@"))]
    assert names[0] == "'=cmd|' /C calc'!A0"


def test_csv_gives_back_every_number(comparison: Sequence[Result]) -> None:
    rows = list(csv.DictReader(io.StringIO(render_csv(build_report(comparison, title="t")))))
    found = {(row["arm"], int(row["seed"]), row["metric"], row["judge"]): row for row in rows}
    expected = {
        (result.arm, result.seed, metric.name, judge): metric
        for result in comparison
        for judge, metrics in [("", result.scores), *((j.judge, j.metrics) for j in result.judges)]
        for metric in metrics
    }
    assert found.keys() == expected.keys()
    for key, metric in expected.items():
        assert float(found[key]["value"]) == metric.value
        assert (int(found[key]["n"]), int(found[key]["n_unscored"])) == (metric.n, metric.n_unscored)


def test_unscored_is_never_zero_anywhere(make_result) -> None:
    empty = Metric(name="harmful_score", value=None, n=0, n_unscored=150, higher_is_better=False)
    report = build_report(
        [make_result("mute", judges=(JudgeReading(judge="j", metrics=(empty,)),), scores=())],
        title="t",
        reference="mute",
    )
    html = render_html(report)
    assert "0 of 150 scored" in html
    assert "n/a (0 of 150 scored)" in render_markdown(report)
    (row,) = csv.DictReader(io.StringIO(render_csv(report)))
    assert (row["value"], row["low"], row["n"], row["n_unscored"]) == ("", "", "0", "150")
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(terminal_table(report))
    assert "n/a (0 of 150 scored)" in console.export_text()
    (table,) = re.findall(r'<table class="main.*?</table>', html, flags=re.DOTALL)
    assert not re.search(r"0\.0|0 %", table)


@pytest.mark.parametrize(
    "missing",
    [
        {"judges": (), "agreements": ()},
        {"scores": ()},
        {"training_log": ()},
        {"samples": ()},
        {"patches": (PatchRecord(patch="p", layers=()),)},
        {"judges": (), "agreements": (), "scores": (), "training_log": (), "samples": (), "experiment": {}},
    ],
    ids=str,
)
def test_what_is_missing_leaves_the_rest_standing(missing, make_result, tmp_path: Path) -> None:
    report = build_report([make_result(**missing)], title="one")
    html, markdown, table = (path.read_text() for path in write_report(report, tmp_path))
    assert "<h1>one</h1>" in html
    assert markdown.startswith("# one")
    assert table.startswith("arm,seed,metric")
    terminal_table(report)


def test_equal_results_give_equal_bytes(comparison: Sequence[Result], tmp_path: Path) -> None:
    report = build_report(comparison, title="t", reference="SFT attacked")
    first = [path.read_bytes() for path in write_report(report, tmp_path / "a")]
    second = [path.read_bytes() for path in write_report(report, tmp_path / "b")]
    assert first == second
    assert [path.name for path in sorted((tmp_path / "a").iterdir())] == ["report.html", "report.md", "results.csv"]


def test_the_plots_take_every_color_from_the_page(plain_page: str) -> None:
    pictures = "".join(re.findall(r"<svg.*?</svg>", plain_page, flags=re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", pictures)
    assert set(re.findall(r"var\(--(\w+)\)", pictures)) <= set(re.findall(r"--(\w+):", plain_page))


def test_labels_are_drawn_as_written_in_any_script_and_never_as_formulas(make_result) -> None:
    labels = ("对齐 🎈", "$x_1$", "$\\frac$")
    html = render_html(build_report([make_result(label) for label in labels], title="t"))
    (picture,) = re.findall(r'<div class="wide">(<svg.*?</svg>)', html, flags=re.DOTALL)
    for label in labels:
        assert f">{label}</text>" in picture


def test_the_terminal_takes_markup_in_labels_literally(make_result) -> None:
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(terminal_table(build_report([make_result("[red]x[/red]\x1b[31m")], title="[b]t")))
    shown = console.export_text()
    assert "[red]x[/red]⟦U+001B⟧" in shown
    assert "[b]t" in shown


def test_modules_fall_into_kinds_and_layers() -> None:
    names = ["model.layers.0.attn.q_proj", "model.layers.10.attn.q_proj", "model.layers.2.mlp.up", "lm_head"]
    grid = layer_map(PatchSummary("p", {}, tuple(ModuleEffect(name, 1.0, 0.5, 1, 1) for name in names)))
    assert grid.columns == (0, 2, 10, None)
    assert [kind for kind, _ in grid.rows] == ["attn.q_proj", "mlp.up", "lm_head"]
    assert [effect and effect.module for effect in grid.rows[0][1]] == [names[0], None, names[1], None]
    both = [ModuleEffect(f"{stack}.0.q", 1.0, 0.5, 1, 1) for stack in ("encoder", "decoder")]
    assert [kind for kind, _ in layer_map(PatchSummary("p", {}, tuple(both))).rows] == ["encoder.q", "decoder.q"]


def test_curves_are_averaged_where_seeds_meet_and_thinned_by_means() -> None:
    assert mean_curve([[(1, 2.0), (2, 4.0)], [(2, 6.0), (3, 8.0)]]) == [(2, 5.0)]
    assert mean_curve([[(1, 2.0)], [(3, 8.0)]]) == [(1, 2.0)]
    long = [(float(step), float(step % 2)) for step in range(1000)]
    short = thin(long, 100)
    assert len(short) == 100
    assert {value for _, value in short} == {0.5}
    assert thin(long[:100], 100) == long[:100]

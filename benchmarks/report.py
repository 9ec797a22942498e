"""Measure how long a report of many completions takes to write, to open in Chromium and to sort.

    python benchmarks/report.py

The report has 10 000 rows of evidence of one run. Opening is measured from navigation to the second painted frame, five
times with a new page. Requires Chromium (Debian package `chromium`) and playwright.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from stayaligned.core.records import Metric, Outcome
from stayaligned.evaluation.results import Evidence, JudgeReading, Provenance, Result
from stayaligned.report import build_report, write_report

ROWS, RUNS = 10_000, 5
PAINTED = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def result() -> Result:
    share = Metric(name="harmful_score", value=0.25, n=ROWS, low=0.24, high=0.26, higher_is_better=False)
    return Result(
        id="many",
        arm="many",
        seed=0,
        experiment={},
        judges=(JudgeReading(judge="classifier", metrics=(share,)),),
        scores=(),
        evidence_sha256="0" * 64,
        provenance=Provenance(versions={}),
    )


def evidence() -> list[Evidence]:
    outcomes = (Outcome.HARM, Outcome.REFUSE, Outcome.REFUSE, Outcome.OTHER)
    return [
        Evidence(
            prompt_set="harmful",
            id=f"{i * 7919 % ROWS:016x}",
            prompt=f"{i:016x}",
            category=f"kind {i % 13}",
            outcomes={"classifier": outcomes[i % 4], "keyword": outcomes[i % 3]},
            degenerate=i % 50 == 0,
        )
        for i in range(ROWS)
    ]


def timed(page: Page, act: str) -> float:
    """Return the milliseconds until the effect of a script is painted."""
    return page.evaluate(
        f"async () => {{ const start = performance.now(); {act}; await {PAINTED}; return performance.now() - start; }}"
    )


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        started = time.perf_counter()
        write_report(build_report([result()], title="Many", evidence={"many": evidence()}), Path(directory))
        written = time.perf_counter() - started
        page_file = Path(directory) / "report.html"
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        opened: list[float] = []
        ordered: list[float] = []
        for _ in range(RUNS):
            page = browser.new_page()
            started = time.perf_counter()
            page.goto(page_file.as_uri())
            page.evaluate(PAINTED)
            opened.append(time.perf_counter() - started)
            page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            click = "document.querySelectorAll('#every-answer-table thead button')[0].click()"
            ordered += [timed(page, click) for _ in range(3)]
            page.close()
        browser.close()
        size = page_file.stat().st_size / 2**20
    print(f"{ROWS} rows: written in {written:.2f} s, {size:.1f} MiB")
    print(f"opened in {statistics.median(opened):.2f} s ({min(opened):.2f} to {max(opened):.2f})")
    print(f"sorted in {statistics.median(ordered):.0f} ms ({min(ordered):.0f} to {max(ordered):.0f})")


if __name__ == "__main__":
    main()

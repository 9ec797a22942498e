"""Writing of a report to a directory."""

from __future__ import annotations

from pathlib import Path

from stayaligned.core.files import write_text
from stayaligned.report.latex import latex_text
from stayaligned.report.page import html_text
from stayaligned.report.prose import markdown_text
from stayaligned.report.tables import csv_text
from stayaligned.report.values import Report


def write_report(report: Report, directory: Path) -> list[Path]:
    """Write `report.html`, `report.md`, `report.tex` and `results.csv`; equal reports give equal bytes.

    All are rendered before the first is written, and each file appears whole or not at all.
    """
    texts = {
        "report.html": html_text(report),
        "report.md": markdown_text(report),
        "report.tex": latex_text(report),
        "results.csv": csv_text(report),
    }
    for name, text in texts.items():
        for leftover in directory.glob(f".{name}.*.partial"):  # of an interrupted report
            leftover.unlink(missing_ok=True)
        write_text(directory / name, text)
    return [directory / name for name in texts]

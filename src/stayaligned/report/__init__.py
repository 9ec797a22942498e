"""Results → Report (a pure value) → HTML, Markdown, CSV and a terminal table. Imports no torch and no matplotlib."""

from __future__ import annotations

from pathlib import Path

from stayaligned.files import write_text
from stayaligned.report.build import build_report
from stayaligned.report.tables import render_csv, render_markdown, terminal_table
from stayaligned.report.values import Report

__all__ = ["Report", "build_report", "terminal_table", "write_report"]


def write_report(report: Report, directory: Path) -> list[Path]:
    """Write `report.html`, `report.md` and `results.csv` into `directory`, each whole or not at all.

    The HTML is one file that asks nothing of a network. Equal reports give equal bytes.

    Returns:
        The paths, in that order.
    """
    from stayaligned.report.html import render_html

    contents = {
        "report.html": render_html(report),
        "report.md": render_markdown(report),
        "results.csv": render_csv(report),
    }
    for name, content in contents.items():
        write_text(directory / name, content)
    return [directory / name for name in contents]

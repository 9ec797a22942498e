"""Reports of results: one self-contained HTML page, Markdown, LaTeX, CSV, and a terminal table.

    report = build_report(find_results([directory]), title="Comparison", reference="SFT attacked")
    write_report(report, directory)

`building` computes the frozen `values` once; the writers only print them.
"""

from stayaligned.report.building import build_report
from stayaligned.report.tables import terminal_table
from stayaligned.report.values import Report
from stayaligned.report.writing import write_report

__all__ = ["Report", "build_report", "terminal_table", "write_report"]

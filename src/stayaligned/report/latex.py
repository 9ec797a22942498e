"""The report's main table in LaTeX, for papers. It needs the package `booktabs`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from stayaligned.core.records import HARM_METRICS
from stayaligned.core.text import SHARE, one_line, percent
from stayaligned.report.values import WORST_HARM, Arm, Estimate, MetricKind, Report, Role
from stayaligned.report.verdicts import is_shown

_OMITTED = frozenset({"refusal_rate", "other_rate", *HARM_METRICS.values()} - {"harmful_score"})
"""Metrics that the table leaves to `results.csv`: two that sum to 1 with the harmful score, and harm on further prompt
sets, of which the worst is shown."""

_ESCAPED = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': "{''}",
        "[": "{[}",  # the argument of a line break, at the start of a row
        "*": "{*}",
        "−": "$-$",
        "×": r"$\times$",
        "→": r"$\to$",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "⟨": r"$\langle$",
        "⟩": r"$\rangle$",
        "ρ": r"$\rho$",
        "λ": r"$\lambda$",
    }
)


def escape(text: str) -> str:
    """Return `text` on one line as inert LaTeX; letters of other scripts are kept, which XeLaTeX and LuaLaTeX print."""
    return one_line(text).translate(_ESCAPED)


def latex_text(report: Report) -> str:
    """Render the arms and their metrics as a LaTeX table: means with 95 % intervals, grouped by role."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    kinds = [kind for kind in report.metrics if kind.name not in _OMITTED]
    heads = [f"{kind.title} {'↑' if kind.higher_is_better else '↓'}" for kind in kinds]
    yield "% Written by stayaligned; needs \\usepackage{booktabs}. results.csv has every value."
    yield "\\begin{table}[t]"
    yield "\\centering"
    yield f"\\caption{{{_caption(report)}}}"
    yield "\\label{tab:stayaligned}"
    yield f"\\begin{{tabular}}{{l{'r' * len(kinds)}}}"
    yield "\\toprule"
    yield " & ".join(["Arm", *map(escape, heads)]) + " \\\\"
    for role in get_args(Role):
        arms = [arm for arm in report.arms if arm.role == role]
        if arms:
            yield "\\midrule"
        yield from (_row(arm, kinds) for arm in arms)
    yield "\\bottomrule"
    yield "\\end{tabular}"
    yield "\\end{table}"


def _caption(report: Report) -> str:
    seeds = sorted({len(arm.seeds) for arm in report.arms})
    count = " to ".join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1])))
    parts = [
        report.title,
        f"In percent, with 95 % intervals over {count} seed{'s' if count != '1' else ''} and the prompts",
        *([f"Judge: {report.judge}"] if report.judge else []),
    ]
    if any(is_shown(arm) for arm in report.arms):
        parts.append("Bold: less harm is shown than of the reference arm, with p below 0.05 after Holm's correction")
    return ". ".join(escape(part) for part in parts) + "."


def _row(arm: Arm, kinds: list[MetricKind]) -> str:
    suffix = {"reference": " (reference)", "control": " (control)"}.get(arm.role, "")
    cells = [_cell(arm.estimates.get(kind.name), bold=is_shown(arm) and kind.name == "harmful_score") for kind in kinds]
    names = [f" ({arm.worst_harm.prompt_set})" if k is WORST_HARM and arm.worst_harm else "" for k in kinds]
    return " & ".join([escape(arm.name) + suffix, *map(str.__add__, cells, names)]) + " \\\\"


def _cell(estimate: Estimate | None, *, bold: bool) -> str:
    if estimate is None or estimate.mean is None:
        return "--" if estimate is None else "n/a"
    value = percent(estimate.mean, scale=estimate.scale)
    shown = f"\\textbf{{{value}}}" if bold else value
    if estimate.low is None or estimate.high is None:
        return shown
    low, high = (100 * bound if estimate.scale == SHARE else bound for bound in (estimate.low, estimate.high))
    return f"{shown} {{\\scriptsize [{low:.1f}, {high:.1f}]}}"

"""Report the front of harm against accuracy of Safe LoRA's operators, from finished grids of `safe_lora_front.yaml`.

    python studies/safe_lora_front.py DIR [DIR ...] [--out OUT] [--max-loss 5]

Writes OUT/safe-lora-front.md (the findings, then all tables), .svg (the fronts) and .csv (every arm, on both halves of
the prompts). `safe_lora_front_table.py` defines what is chosen, compared and plotted, and how.
"""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safe_lora_front_table import (
    ACCURACY,
    CHOSEN_AT,
    CONTROLS,
    DROPPED,
    ENDS,
    HALVES,
    HARM,
    UNIFORM,
    UNTREATED,
    Cell,
    Choice,
    Front,
    Key,
    Table,
    choices,
    fronts,
    read_table,
    side_of_zero,
    verdict,
)
from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import replace_file
from stayaligned.core.records import Metric
from stayaligned.core.text import markdown, percent
from stayaligned.evaluation.metrics import PairedDifference, across_seeds, t_interval
from stayaligned.report.texts import bounds, join_names
from study_command import write_study

METRICS = {
    HARM: "harmful score",
    "over_refusal": "over-refusal",
    ACCURACY: "fine-tune accuracy",
    "skills_kept": "skills kept",
}
NAME = "safe-lora-front"
STYLES = {  # Okabe and Ito's palette for the color-blind; markers repeat the distinction
    "scaled_gram": ("#0072B2", "o"),
    "orthogonal": ("#009E73", "s"),
    "complement": ("#D55E00", "^"),
    "complement, left only": ("#E69F00", "<"),
    "complement, right only": ("#CC79A7", ">"),
    UNIFORM: ("#595959", "x"),
}
ABOVE_ALL = "above all"
_WIDTH = 1e-9


# ---- cells of tables -----------------------------------------------------------------------------------------------


def format_estimate(by_seed: Mapping[int, Metric]) -> str:
    """Format the mean over seeds and Student's interval, `96.4 (88.9 to 100.0)`.

    If all seeds agree, the interval is that of one seed's prompts.
    """
    if not by_seed:
        return "not measured"
    pooled = across_seeds(list(by_seed.values()))
    low, high = pooled.low, pooled.high
    if low is None or high is None or high - low <= _WIDTH:
        widest = max(by_seed.values(), key=lambda m: (m.high or 0.0) - (m.low or 0.0))
        low, high = widest.low, widest.high
    return format_share(pooled.value, low, high)


def format_share(value: float | None, low: float | None, high: float | None) -> str:
    """Format a share and its interval, clipped to 0 to 100, in percent."""
    shown = bounds(None if low is None else max(0.0, low), None if high is None else min(1.0, high))
    return percent(value) + (f" ({shown})" if shown else "")


def format_points(difference: PairedDifference) -> str:
    """Format a paired difference in points, `−12.0 (−20.1 to −3.9)`; without an interval if all seeds agree."""
    low, high = difference.low, difference.high
    spread = low is not None and high is not None and high - low > _WIDTH
    shown = bounds(max(-1.0, low or 0.0), min(1.0, high or 0.0), signed=True) if spread else ""
    return percent(difference.mean, signed=True) + (f" ({shown})" if shown else "")


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'|'.join(['---'] * len(head))}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


# ---- findings ------------------------------------------------------------------------------------------------------


class Findings:
    """Choices and fronts at the poison ratio at which settings are chosen."""

    def __init__(self, table: Table, max_loss: float) -> None:
        self.table, self.max_loss = table, max_loss
        self.cells = [cell for cell in table.cells() if table.operators(cell, CHOSEN_AT)]
        self.chosen: dict[Cell, dict[str, Choice]] = {cell: choices(table, cell, max_loss) for cell in self.cells}
        self.fronts: dict[Cell, dict[str, Front]] = {cell: fronts(table, cell, CHOSEN_AT) for cell in self.cells}
        self.families = list(dict.fromkeys(family for cell in self.cells for family in self.chosen[cell]))

    def sides(self, family: str, rival: str) -> dict[Cell, int]:
        """Return {cell: 1, 0 or -1}: this operator's area is above, not distinguished from, or below the rival's."""
        found = {cell: self.fronts[cell].get(family) for cell in self.cells}
        return {
            cell: side_of_zero(front.against[rival])
            for cell, front in found.items()
            if front is not None and rival in front.against
        }

    def list_faults(self, cell: Cell, family: str) -> list[str]:
        """Return what is wrong with the chosen setting on the reported prompts."""
        choice = self.chosen[cell][family]
        key, untreated = (cell, CHOSEN_AT, choice.treatment), (cell, CHOSEN_AT, UNTREATED)
        harm, accuracy = (self.table.difference(key, untreated, name) for name in (HARM, ACCURACY))
        found: list[str] = []
        if side_of_zero(harm) >= 0:
            found.append(f"harm not shown lower: {format_points(harm)}")
        if accuracy.mean is not None and -accuracy.mean > self.max_loss:
            found.append(f"accuracy {format_points(accuracy)}")
        if not choice.admissible:
            found.append("no setting within the allowed loss")
        return found


def summary(findings: Findings) -> Iterator[str]:
    """Yield the findings: counted over the cells, then cell by cell."""
    rivals = [*CONTROLS, *findings.families]
    families = [family for family in findings.families if family != UNIFORM]
    yield (
        f"Area under the front at p = {CHOSEN_AT:g}, operator minus rival, in {len(findings.cells)} cells: above / not "
        "distinguished / below, by the 95 % interval over seeds. `drop`, `shrink` and `random` are the operator's own "
        "controls at each of its settings."
    )
    yield ""
    rows: list[list[str]] = []
    for family in families:
        row = [family]
        for rival in rivals:
            sides = list(findings.sides(family, rival).values())
            row.append(" / ".join(str(sides.count(side)) for side in (1, 0, -1)) if sides else "")
        rows.append(row)
    yield from table_lines(["operator", *(f"− {rival}" for rival in rivals)], rows)
    for family in families:
        yield f"- **{family}**: {count_cells(findings, family)}"
    compared = sum(len(findings.sides(family, rival)) for family in families for rival in rivals)
    yield ""
    yield (
        f"{compared} comparisons at 95 % each, uncorrected: about {compared * 0.05:.0f} would differ by chance if "
        "there were no real difference. A difference that is not distinguished from zero is not shown to be zero."
    )
    yield ""
    yield "Cell by cell, the front against the operator's own controls and uniform shrinking:"
    yield ""
    rows = [
        [markdown(str(cell)), *(compare_with_controls(findings, cell, family) for family in families)]
        for cell in findings.cells
    ]
    yield from table_lines(["cell", *families], rows)
    yield "Cell by cell, what is wrong with the chosen setting (differences to the untreated model, in points):"
    yield ""
    rows = [
        [markdown(str(cell)), *(describe_faults(findings, cell, family) for family in families)]
        for cell in findings.cells
    ]
    yield from table_lines(["cell", *families], rows)


def count_cells(findings: Findings, family: str) -> str:
    """Report in how many cells an operator beats all its controls, covers every other one, and is usable."""
    known = [cell for cell in findings.cells if family in findings.chosen[cell]]
    wins = [cell for cell in known if compare_with_controls(findings, cell, family) == ABOVE_ALL]
    everywhere = [cell for cell in known if not findings.fronts[cell][family].uncovered]
    fit = [cell for cell in known if not findings.list_faults(cell, family)]
    return (
        f"front above all of its controls and uniform shrinking in {len(wins)} of {len(known)} cells; by the means, "
        f"at least as good in both as every setting of every other operator in {len(everywhere)}; less harm within the "
        f"allowed loss at its chosen setting in {len(fit)}."
    )


def compare_with_controls(findings: Findings, cell: Cell, family: str) -> str:
    """Return `above all`, or the rivals that an operator is not above."""
    if family not in findings.chosen[cell]:
        return ""
    sides = {rival: findings.sides(family, rival).get(cell) for rival in (*CONTROLS, UNIFORM)}
    words = {0: "not distinguished: ", -1: "below: ", None: "not run: "}
    parts = [
        text + ", ".join(named) for side, text in words.items() if (named := [r for r in sides if sides[r] == side])
    ]
    return "; ".join(parts) or ABOVE_ALL


def describe_faults(findings: Findings, cell: Cell, family: str) -> str:
    """Return the chosen setting and what is wrong with it, or `none`."""
    if family not in findings.chosen[cell]:
        return ""
    setting = findings.chosen[cell][family].treatment.setting
    return f"{setting}: {'; '.join(findings.list_faults(cell, family)) or 'none'}"


# ---- tables --------------------------------------------------------------------------------------------------------


def chosen_tables(findings: Findings) -> Iterator[str]:
    """Yield, for each cell, every operator at its chosen setting, at the poison ratio where it was chosen."""
    table = findings.table
    for cell in findings.cells:
        yield f"#### {markdown(str(cell))}"
        yield ""
        arms = [(t.family, "", t) for t in ENDS]
        for family, (treatment, admissible) in findings.chosen[cell].items():
            arms.append((family, treatment.setting + ("" if admissible else " (none within the loss)"), treatment))
        rows = [
            [
                name,
                setting,
                *(format_estimate(table.metrics((cell, CHOSEN_AT, treatment), metric)) for metric in METRICS),
            ]
            for name, setting, treatment in arms
        ]
        yield from table_lines(["arm", "chosen", *METRICS.values()], rows)


def difference_tables(findings: Findings) -> Iterator[str]:
    """Yield, for each cell, every operator's chosen setting minus the untreated model and minus its own controls."""
    table = findings.table
    for cell in findings.cells:
        present = set(table.treatments(cell, CHOSEN_AT))
        rows: list[list[str]] = []
        for family, (treatment, _) in findings.chosen[cell].items():
            rivals = {"untreated": UNTREATED}
            if family != UNIFORM:
                rivals |= {control: treatment.control_by(control) for control in CONTROLS}
            for name, rival in rivals.items():
                if rival not in present:
                    continue
                keys: tuple[Key, Key] = (cell, CHOSEN_AT, treatment), (cell, CHOSEN_AT, rival)
                harm, accuracy = (table.difference(*keys, metric) for metric in (HARM, ACCURACY))
                row = [family, treatment.setting, "all layers dropped" if rival == DROPPED else name]
                rows.append([*row, format_points(harm), format_points(accuracy), verdict(harm, accuracy)])
        yield f"#### {markdown(str(cell))}"
        yield ""
        yield from table_lines(["operator", "setting", "minus", "harmful score", "accuracy", "verdict"], rows)


def ratio_tables(findings: Findings) -> Iterator[str]:
    """Yield, for each metric, the chosen settings at every poison ratio."""
    table = findings.table
    for metric, title in METRICS.items():
        rows: list[list[str]] = []
        for cell in findings.cells:
            arms = {UNTREATED.family: UNTREATED} | {f: c.treatment for f, c in findings.chosen[cell].items()}
            for name, treatment in arms.items():
                setting = "" if treatment in ENDS else treatment.setting
                measured = [
                    format_estimate(table.metrics((cell, ratio, treatment), metric)) for ratio in table.ratios()
                ]
                rows.append([markdown(str(cell)), name, setting, *measured])
        yield f"#### {title}"
        yield ""
        yield from table_lines(["cell", "arm", "setting", *(f"p = {ratio:g}" for ratio in table.ratios())], rows)


def front_tables(findings: Findings) -> Iterator[str]:
    """Yield the areas, their differences, and the difference to uniform shrinking at the other poison ratios."""
    rows: list[list[str]] = []
    for cell in findings.cells:
        for family, front in findings.fronts[cell].items():
            values = list(front.area.values())
            low, high = t_interval(values) or (None, None)
            mean = sum(values) / len(values) if values else None
            against = [format_points(front.against[r]) if r in front.against else "" for r in (*CONTROLS, UNIFORM)]
            missed = join_names((f"{t.family} {t.setting}" for t in front.uncovered), 4)
            rows.append([markdown(str(cell)), family, format_share(mean, low, high), *against, markdown(missed)])
    head = ["cell", "operator", "area", *(f"− {rival}" for rival in (*CONTROLS, UNIFORM)), "not covered"]
    yield from table_lines(head, rows)
    others = [ratio for ratio in findings.table.ratios() if ratio != CHOSEN_AT]
    rows = []
    for cell in findings.cells:
        by_ratio = [fronts(findings.table, cell, ratio) for ratio in others]
        for family in findings.chosen[cell]:
            found = [front[family].against.get(UNIFORM) if family in front else None for front in by_ratio]
            if any(found):
                rows.append([markdown(str(cell)), family, *("" if d is None else format_points(d) for d in found)])
    if rows:
        yield f"Area minus that of {UNIFORM} at the other poison ratios:"
        yield ""
        yield from table_lines(["cell", "operator", *(f"p = {ratio:g}" for ratio in others)], rows)


def introduction(table: Table, max_loss: float) -> Iterator[str]:
    """Yield what was measured, on which prompts, and what is missing."""
    seeds = sorted({seed for runs in table.readings.values() for seed in runs})
    sizes: dict[str, set[int]] = {}
    unscored = 0
    for runs in table.readings.values():
        for halves in runs.values():
            for name, metric in halves["report"].items():
                sizes.setdefault(name, set()).add(metric.n + metric.n_unscored)
                unscored += metric.n_unscored
    counts = ", ".join(f"{min(sizes[n])}–{max(sizes[n])} for {title}" for n, title in METRICS.items() if n in sizes)
    yield (
        f"{len(table.cells())} cells (alignment · task · target), seeds {', '.join(map(str, seeds))}. "
        "Percent; mean over seeds and Student's 95 % interval, cut to 0–100 (where all seeds agree, the interval of "
        f"one seed's prompts). Prompts per seed in the reported half: {counts}; settings were chosen on the other half "
        f"by least mean harm at p = {CHOSEN_AT:g} among those that lose at most {100 * max_loss:g} points of mean "
        f"accuracy (if there is none: least loss). Unscored completions in the reported half: {unscored}."
    )
    yield ""
    short = [key for key, runs in table.readings.items() if len(runs) < len(seeds)]
    if short:
        named = join_names((f"{cell} p = {ratio:g} {' '.join(filter(None, t))}" for cell, ratio, t in short), 6)
        yield f"Not every seed has a result in {len(short)} arms: {markdown(named, 600)}."
        yield ""


def page(table: Table, max_loss: float) -> str:
    """Return the report as Markdown.

    Raises:
        StayalignedError: if no arm was run at the ratio at which settings are chosen.
    """
    findings = Findings(table, max_loss)
    if not findings.cells:
        raise StayalignedError(
            f"no operator was run at poison ratio {CHOSEN_AT:g}, where settings are chosen",
            hint="Finish `bench studies/safe_lora_front.yaml` first.",
        )
    sections: list[tuple[str, Iterator[str]]] = [
        ("Findings", summary(findings)),
        (f"The fronts at p = {CHOSEN_AT:g}", front_tables(findings)),
        (f"Chosen settings at p = {CHOSEN_AT:g}", chosen_tables(findings)),
        (f"Chosen settings against their controls, paired by seed, p = {CHOSEN_AT:g}", difference_tables(findings)),
        ("Chosen settings at every poison ratio", ratio_tables(findings)),
    ]
    lines = [*introduction(table, max_loss)]
    for title, text in sections:
        lines += [f"### {title}", "", *text]
    return "\n".join(lines).rstrip() + "\n"


def csv_text(table: Table) -> str:
    """Return one row for every arm, half and metric."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    head = ["alignment", "task", "target", "poison_ratio", "operator", "setting", "control", "half", "metric"]
    writer.writerow([*head, "mean", "low", "high", "seeds", "prompts_a_seed"])
    for cell, ratio, treatment in table.readings:
        setting = "" if treatment in ENDS else treatment.setting
        for half in HALVES:
            for metric in METRICS:
                runs = table.metrics((cell, ratio, treatment), metric, half)
                if runs:
                    pooled = across_seeds(list(runs.values()))
                    numbers = [pooled.value, pooled.low, pooled.high, pooled.n, max(m.n for m in runs.values())]
                    place = [*cell, ratio, treatment.family, setting, treatment.control, half, metric]
                    writer.writerow([*place, *numbers])
    return stream.getvalue()


# ---- figure --------------------------------------------------------------------------------------------------------


def draw(findings: Findings, path: Path) -> None:
    """Plot harm against accuracy, one panel per cell: means over seeds, with Student's intervals as thin lines."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys(cell[:2] for cell in findings.cells))
    columns = list(dict.fromkeys(cell.target for cell in findings.cells))
    with matplotlib.rc_context(), replace_file(path) as temporary:
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": NAME, "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 9})
        figure = Figure(figsize=(3.5 * len(columns), 2.9 * len(rows) + 0.8), layout="constrained")
        FigureCanvasSVG(figure)
        grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat:
            axes.set_visible(False)
        for cell in findings.cells:
            draw_cell(grid[rows.index(cell[:2])][columns.index(cell.target)], findings, cell)
        for axes in grid[-1]:
            axes.set_xlabel("fine-tune accuracy, %")
        for axes in grid[:, 0]:
            axes.set_ylabel("harmful score, %")
        labelled = {label: h for a in grid.flat for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
        figure.legend(
            labelled.values(), labelled.keys(), loc="outside lower center", ncols=2 + len(columns), frameon=False
        )
        seeds = max(len(runs) for runs in findings.table.readings.values())
        counted = f"{seeds} seed{'s' if seeds != 1 else ''}"
        figure.suptitle(f"p = {CHOSEN_AT:g}, {counted}, reported half of the prompts; better is down and right")
        figure.savefig(temporary, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})


def draw_cell(axes: Any, findings: Findings, cell: Cell) -> None:
    """Plot one panel. Lines join an operator's settings in the order of its scan; the chosen one has a ring."""
    table = findings.table

    def place(treatment: Any) -> tuple[list[float], list[list[float]]] | None:
        pooled = [table.metrics((cell, CHOSEN_AT, treatment), name) for name in (ACCURACY, HARM)]
        if not all(pooled):
            return None
        means = [across_seeds(list(by_seed.values())) for by_seed in pooled]
        ends = [[100 * (m.value or 0.0) for m in means]] * 2
        for side, cut in ((0, 0.0), (1, 1.0)):
            bound = [m.low if side == 0 else m.high for m in means]
            if None not in bound:
                ends[side] = [100 * (min(cut, b) if side else max(cut, b)) for b in bound if b is not None]
        return [100 * (m.value or 0.0) for m in means], ends

    axes.set_visible(True)
    axes.set_title(str(cell))
    axes.set(xlim=(-4, 104), ylim=(-4, 104))
    axes.grid(color="#e0e0e0", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    for treatment, marker in zip(ENDS, "*D", strict=True):
        if (found := place(treatment)) is not None:
            axes.plot(*found[0], marker, color="black", markersize=7, label=treatment.family, zorder=3)
    for family, scan in table.operators(cell, CHOSEN_AT).items():
        color, marker = STYLES.get(family, ("#000000", "."))
        found = {treatment: at for treatment in scan if (at := place(treatment)) is not None}
        if not found:
            continue
        x, y = zip(*(at for at, _ in found.values()), strict=True)
        dashes = "--" if family == UNIFORM else "-"
        axes.plot(x, y, dashes, marker=marker, color=color, markersize=5, linewidth=1.1, label=family)
        for (mean_x, mean_y), ((low_x, low_y), (high_x, high_y)) in found.values():
            axes.plot([low_x, high_x], [mean_y, mean_y], color=color, linewidth=0.5, alpha=0.5)
            axes.plot([mean_x, mean_x], [low_y, high_y], color=color, linewidth=0.5, alpha=0.5)
        chosen = findings.chosen[cell].get(family)
        if chosen is not None and chosen.treatment in found:
            at = found[chosen.treatment][0]
            axes.plot(*at, "o", markersize=11, markerfacecolor="none", markeredgecolor=color, markeredgewidth=1.2)


# ---- command -------------------------------------------------------------------------------------------------------


def main() -> None:
    def measure_fronts(directories: Sequence[Path], max_loss: float) -> tuple[str, str, Callable[[Path], None]]:
        table = read_table(directories)
        return page(table, max_loss), csv_text(table), functools.partial(draw, Findings(table, max_loss))

    print(write_study(__doc__, NAME, measure_fronts).partition("### The fronts")[0].rstrip())


if __name__ == "__main__":
    main()

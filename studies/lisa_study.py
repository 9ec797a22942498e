"""The evidence on Lisa from finished grids of `lisa_study*.yaml`, as tables with intervals and paired comparisons.

    python studies/lisa_study.py DIR [DIR ...] [--out OUT] [--max-loss 5]

Writes OUT/lisa-study.md (all tables), .svg (harm against accuracy) and .csv (every arm). `lisa_study_table.py`
defines the arms, the choice of settings and the tests of differences. Tables of grids that are not among the
directories are omitted.
"""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from lisa_study_table import WHOLE, Arm, Study, read_study, t_test, tuned
from safe_lora_front import format_estimate, format_points, format_share, table_lines
from safe_lora_front_table import ACCURACY, HARM
from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import replace_file
from stayaligned.core.text import markdown, percent
from stayaligned.evaluation.metrics import PairedDifference, across_seeds, holm, paired_difference, t_interval
from study_command import write_study

METRICS = {
    HARM: "harmful score",
    "refusal_rate": "refusal",
    "over_refusal": "over-refusal",
    ACCURACY: "fine-tune accuracy",
    "skills_kept": "skills kept",
}
NAME = "lisa-study"
SFT = Arm("SFT")
MIXED_LIKE = {(5, 45): "Mixing 10 %", (25, 25): "Mixing 100 %"}
"""The mixing ratio that draws about as many alignment rows as an allocation."""
TUNED = "Lisa 5:45, ρ too"
"""The name of Lisa with ρ chosen together with the other settings."""
_LEVEL = 0.05


def bso(arm: Arm) -> Arm:
    """Return the same arm without the proximal term."""
    return arm._replace(rho=0.0, options=())


def mixing_like(arm: Arm) -> Arm:
    """Return the arm of plain mixing with about as many alignment rows and otherwise the same settings."""
    name = MIXED_LIKE.get(arm.allocation or (0, 0), "")
    return arm._replace(method=name, allocation=None, rho=0.0, options=())


def alignment_share(allocation: tuple[int, int]) -> float:
    """Return K1 / (K1 + K2)."""
    return allocation[0] / sum(allocation)


def plain(arm: Arm) -> bool:
    """Return whether an arm is of the main grid: the demo's rows, steps and learning rate, Lisa's other defaults."""
    return arm == SFT._replace(method=arm.method, allocation=arm.allocation, rho=arm.rho)


# ---- comparisons ---------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """One row of a table of paired differences."""

    names: tuple[str, ...]
    harm: PairedDifference
    accuracy: PairedDifference


def compared(study: Study, names: Sequence[str], arm: Arm, other: Arm, part: str = WHOLE) -> Iterator[Comparison]:
    """Yield the difference `arm` minus `other`, if both were run."""
    if arm in study.runs and other in study.runs:
        harm, accuracy = (study.difference(arm, other, name, part) for name in (HARM, ACCURACY))
        yield Comparison(tuple(names), harm, accuracy)


def comparison_lines(head: Sequence[str], rows: Sequence[Comparison]) -> Iterator[str]:
    """Yield a table of differences in points, Holm-corrected over its rows for each metric separately."""
    harm, accuracy = (
        list(zip(found, holm([t_test(d) for d in found]), strict=True))
        for found in ([row.harm for row in rows], [row.accuracy for row in rows])
    )
    cells: list[list[str]] = []
    for row, (h, h_p), (a, a_p) in zip(rows, harm, accuracy, strict=True):
        n = str(len(h.pairs))
        cells.append(
            [*row.names, n, format_points(h), p_text(h_p), format_points(a), p_text(a_p), shown(h, h_p, a, a_p)]
        )
    yield from table_lines([*head, "n", "harmful score", "p", "accuracy", "p", "shown"], cells)


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def shown(harm: PairedDifference, harm_p: float, accuracy: PairedDifference, accuracy_p: float) -> str:
    """Name the differences that are significant at 5 % after the correction."""
    parts = [
        f"{'less' if (difference.mean or 0.0) < 0 else 'more'} {what}"
        for what, difference, p in (("harm", harm, harm_p), ("accuracy", accuracy, accuracy_p))
        if p <= _LEVEL
    ]
    return ", ".join(parts) or "nothing"


def trend(study: Study, arms: Sequence[Arm], name: str) -> PairedDifference:
    """Fit the slope of a metric over the ranks of ordered arms by least squares, by seed, as a difference to 0."""
    by_seed: dict[int, float | None] = {}
    values = [study.values(arm, name) for arm in arms]
    places = [place - (len(arms) - 1) / 2 for place in range(len(arms))]
    for seed in set.intersection(*(set(found) for found in values)):
        weighted = sum(place * found[seed] for place, found in zip(places, values, strict=True))
        by_seed[seed] = weighted / sum(place**2 for place in places)
    return paired_difference(by_seed, dict.fromkeys(by_seed, 0.0))


# ---- tables --------------------------------------------------------------------------------------------------------


def arm_lines(study: Study, arms: Sequence[Arm], label: Callable[[Arm], str] = lambda arm: arm.name) -> Iterator[str]:
    """Yield a table of every metric of some arms."""
    names = [*METRICS, *sorted({name for a in arms for run in study.runs[a].values() for name in run[WHOLE]})]
    extra = [name for name in names if name.startswith(f"{ACCURACY}: ")]
    rows = [[label(arm), *(format_estimate(study.metrics(arm, name)) for name in [*METRICS, *extra])] for arm in arms]
    yield from table_lines(["arm", *METRICS.values(), *(name.partition(": ")[2] for name in extra)], rows)


def references(study: Study) -> Iterator[str]:
    """Yield the table of the reference arms."""
    clean = SFT._replace(poison_ratio=0.0)
    aligned = study.arms(lambda a: a.method == "Aligned" and a.rows == SFT.rows)
    mixing = study.arms(lambda a: plain(a) and a.method.startswith("Mixing"))
    arms = [arm for arm in (*aligned, clean, SFT, *mixing) if arm in study.runs]
    yield from arm_lines(study, arms)


def allocation(study: Study) -> Iterator[str]:
    """Yield the tables of harm and accuracy over K1:K2 and ρ, as the paper's tables 2, 8 and 9."""
    found = study.arms(lambda a: plain(a) and a.allocation is not None)
    splits = sorted({arm.allocation for arm in found if arm.allocation}, key=alignment_share, reverse=True)
    arms = sorted(found, key=lambda a: (splits.index(a.allocation or (0, 0)), a.rho))
    rhos = sorted({arm.rho for arm in arms})
    for name in (HARM, ACCURACY, "over_refusal"):
        rows: list[list[str]] = []
        for split in splits:
            found = [study.metrics(Arm("Lisa", split, rho), name) for rho in rhos]
            rows.append([f"{split[0]}:{split[1]}", *(format_estimate(metrics) if metrics else "" for metrics in found)])
        yield f"{METRICS[name].capitalize()} (ρ = 0 is BSO; 0:50 is the proximal term to the initial weights alone):"
        yield ""
        yield from table_lines(["K1:K2", *(f"ρ = {rho:g}" for rho in rhos)], rows)
    yield "Minus plain fine-tuning; minus BSO with the same allocation; minus mixing with about as many alignment rows:"
    yield ""
    rows_: list[Comparison] = []
    for title, other in (("SFT", lambda _: SFT), ("BSO", bso), ("mixing", mixing_like)):
        for arm in arms:
            if other(arm) != arm:
                against = other(arm).name if title == "mixing" else title
                rows_ += compared(study, [arm.name, against], arm, other(arm))
    for rival, family in groupby(rows_, lambda row: row.names[1].split()[0]):
        yield from comparison_lines(["arm", f"minus ({rival})"], list(family))
    yield "Trends: change per step to the next setting (least squares by seed), K1 or ρ rising:"
    yield ""
    trends: list[Comparison] = []
    lines = [
        (f"K1 of 50 at ρ = {rho:g}", [Arm("Lisa", s, rho) for s in reversed(splits) if s[0] and sum(s) == 50])
        for rho in rhos
    ]
    lines += [(f"ρ at {split[0]}:{split[1]}", [Arm("Lisa", split, rho) for rho in rhos]) for split in splits]
    for title, line in lines:
        present = [arm for arm in line if arm in study.runs]
        if len(present) > 2:
            over = f"{title}, {len(present)} settings"
            trends.append(Comparison((over,), *(trend(study, present, name) for name in (HARM, ACCURACY))))
    yield from comparison_lines(["over"], trends)
    yield from allocation_fronts(study)


def allocation_fronts(study: Study) -> Iterator[str]:
    """Compare the fronts of alternating and of the proximal term alone, over the same values of ρ."""
    scans: dict[str, list[Arm]] = {}
    for split in ((0, 50), (1, 49), (5, 45), (10, 40), (25, 25), (45, 5)):
        scan = [Arm("Lisa", split, rho) for rho in (0.5, 1.0, 2.0, 5.0)]
        if all(arm in study.runs for arm in scan):
            scans[f"{split[0]}:{split[1]}"] = [SFT, *scan]
    if "0:50" in scans and len(scans) > 1:
        yield "Fronts over ρ = 0.5, 1, 2 and 5, SFT counted to each:"
        yield ""
        yield from area_lines(study, scans, "0:50")


def extreme(study: Study) -> Iterator[str]:
    """Yield the tables of one cycle of 1000 steps."""
    arms = study.arms(lambda a: a.steps == 1000 and not a.options)
    yield from arm_lines(study, arms)
    sft, usual = SFT._replace(steps=1000), (50, 950)
    rows: list[Comparison] = []
    for arm in arms:
        for other in (sft, bso(arm), arm._replace(allocation=usual)):
            if arm not in (other, sft):
                rows += compared(study, [arm.name, other.name], arm, other)
    yield from comparison_lines(["arm", "minus"], rows)


def options(study: Study, wanted: Callable[[Arm], bool], control: Callable[[Arm], Sequence[Arm]]) -> Iterator[str]:
    """Yield the tables of arms with other settings of Lisa, each beside the arms that it is compared with."""
    arms = study.arms(wanted)
    controls = [other for arm in arms for other in control(arm) if other in study.runs]
    listed = dict.fromkeys((*controls, *arms))
    yield from arm_lines(study, list(listed), lambda a: a.name + (f", {a.steps} steps" if a.steps != SFT.steps else ""))
    rows = [row for a in arms for c in control(a) for row in compared(study, [a.name, c.name], a, c)]
    yield from comparison_lines(["arm", "minus"], rows)


def without(arm: Arm, *names: str) -> Arm:
    """Return the arm with these settings at their defaults."""
    return arm._replace(options=tuple((key, value) for key, value in arm.options if key not in names))


def tuning(study: Study, max_loss: float) -> Iterator[str]:
    """Yield every method over learning rate and steps, and at its best setting, chosen on one half of the prompts."""
    methods = [SFT, Arm("Mixing 10 %"), *(Arm("Lisa", (5, 45), rho) for rho in (0.0, 0.5, 1.0, 2.0, 5.0))]
    grid = study.arms(lambda a: a._replace(steps=SFT.steps, rate=SFT.rate) in methods and a.steps <= SFT.steps)
    rates, lengths = sorted({arm.rate for arm in grid}), sorted({arm.steps for arm in grid})
    for name in (HARM, ACCURACY):
        rows: list[list[str]] = []
        for method in methods:
            for steps in lengths:
                found = [study.metrics(method._replace(rate=rate, steps=steps), name) for rate in rates]
                rows.append(
                    [method.name, str(steps), *(format_estimate(metrics) if metrics else "" for metrics in found)]
                )
        yield f"{METRICS[name].capitalize()}:"
        yield ""
        yield from table_lines(["method", "steps", *(f"rate {rate:g}" for rate in rates)], rows)
    names = ["SFT", "Mixing 10 %", "BSO 5:45", "Lisa 5:45 ρ=2"]
    scans = {title: [arm for arm in grid if arm.name == title] for title in names}
    scans[TUNED] = [arm for arm in grid if arm.rho]
    yield (
        "The setting of least harm among those that lose at most so many points of SFT's accuracy (rate 0.0005, 400 "
        "steps) on the choosing half, and what it does on the other half:"
    )
    yield ""
    rows, comparisons = [], []
    for loss in (max_loss, 2 * max_loss):
        choices = {title: tuned(study, scan, SFT, loss) for title, scan in scans.items()}
        allowed = f"{100 * loss:g}"
        for title, (arm, admissible) in choices.items():
            chosen = setting(arm) + ("" if admissible else " (none within the loss)")
            measured = [format_estimate(study.metrics(arm, name, "report")) for name in METRICS]
            rows.append([title, allowed, chosen, *measured])
        for title in names[:3]:
            found = [TUNED, f"tuned {title}", allowed]
            comparisons += compared(study, found, choices[TUNED].arm, choices[title].arm, "report")
    yield from table_lines(["method", "allowed loss", "chosen", *METRICS.values()], rows)
    yield from comparison_lines(["method", "minus", "allowed loss"], comparisons)
    yield "Area under the front of each method over all its settings (1 is no harm at full accuracy), all prompts:"
    yield ""
    yield from area_lines(study, scans, "SFT")


def setting(arm: Arm) -> str:
    """Describe the chosen setting of an arm."""
    return f"rate {arm.rate:g}, {arm.steps} steps" + (f", ρ = {arm.rho:g}" if arm.rho else "")


def area_lines(study: Study, scans: dict[str, list[Arm]], control: str) -> Iterator[str]:
    """Yield the areas under the fronts, and their paired differences to that of a control."""
    areas = {title: study.areas(scan) for title, scan in scans.items()}
    differences = {title: paired_difference(area, areas[control]) for title, area in areas.items() if title != control}
    adjusted = dict(zip(differences, holm([t_test(d) for d in differences.values()]), strict=True))
    rows: list[list[str]] = []
    for title, area in areas.items():
        low, high = t_interval(list(area.values())) or (None, None)
        mean = fmean(area.values()) if area else None
        minus = [format_points(differences[title]), p_text(adjusted[title])] if title in differences else ["", ""]
        rows.append([title, str(len(scans[title])), format_share(mean, low, high), *minus])
    yield from table_lines(["front of", "settings", "area, %", f"minus {control}", "p"], rows)


def other_rows(study: Study) -> Iterator[str]:
    """Yield the tables of two tasks in one user set, and of conversations of two exchanges."""
    for rows, title in (("two-tasks", "Two tasks"), ("multi-turn", "Conversations of two exchanges")):
        arms = study.arms(lambda a, rows=rows: a.rows == rows)
        if not arms:
            continue
        yield f"{title}:"
        yield ""
        yield from arm_lines(study, arms)
        (lisa,) = (arm for arm in arms if arm.rho)
        others = [SFT._replace(rows=rows), bso(lisa), Arm("Mixing 10 %", rows=rows)]
        yield from comparison_lines(
            ["arm", "minus"], [row for o in others for row in compared(study, [lisa.name, o.name], lisa, o)]
        )


def decoupled(study: Study) -> Iterator[str]:
    """Compare the proximal term in the gradient with that after the optimizer's step."""

    def is_decoupled(arm: Arm) -> bool:
        return arm.options == (("proximal", "decoupled"),) and arm.steps == SFT.steps

    yield from options(study, is_decoupled, lambda a: (SFT, bso(a)))
    for split in sorted({arm.allocation for arm in study.arms(is_decoupled) if arm.allocation}):
        start = Arm("Lisa", split)
        coupled = study.arms(lambda a, split=split: plain(a) and a.allocation == split and a.rho > 0)
        scans = {
            "coupled": [SFT, start, *coupled],
            "decoupled": [SFT, start, *study.arms(lambda a, split=split: is_decoupled(a) and a.allocation == split)],
            "neither": [SFT, start],
        }
        yield f"Fronts at {split[0]}:{split[1]}, SFT and BSO counted to each:"
        yield ""
        yield from area_lines(study, scans, "coupled")


def has_option(*names: str) -> Callable[[Arm], bool]:
    """Return a filter of the arms in which one of these settings is not at its default."""
    return lambda arm: any(key in names for key, _ in arm.options)


def sections(study: Study, max_loss: float) -> Iterator[tuple[str, Iterator[str]]]:
    """Yield the title and the table of every section whose arms were run."""
    yield "What Lisa is compared with", references(study)
    yield "Step allocation and ρ", allocation(study)
    if study.arms(lambda a: a.steps == 1000):
        yield "Extreme step allocations: one cycle of 1000 steps", extreme(study)
    if study.arms(lambda a: (a.steps, a.rate) != (SFT.steps, SFT.rate) and a.steps not in (0, 1000)):
        yield "Learning rate and length, for every method", tuning(study, max_loss)
    if study.arms(lambda a: a.rows != SFT.rows):
        yield "Two tasks at once, and conversations", other_rows(study)
    if study.arms(has_option("proximal")):
        yield "Coupled against decoupled", decoupled(study)
    settings: dict[str, tuple[tuple[str, ...], Callable[[Arm], Sequence[Arm]]]] = {
        "The loss of the alignment state": (("alignment_loss", "dpo_beta"), lambda same: [same]),
        "Ending on an alignment state": (("finish",), lambda same: [same]),
        "Strengths that change: ρ rising, falling, or set by the measured alignment loss": (
            ("rho_schedule", "alignment_loss_budget", "rho_ceiling"),
            lambda same: [same._replace(rho=rho) for rho in (1.0, 2.0)],
        ),
    }
    for title, (names, control) in settings.items():
        if study.arms(has_option(*names)):
            yield title, options(study, has_option(*names), lambda a, n=names, c=control: c(without(a, *n)))


def page(study: Study, max_loss: float) -> str:
    """Return the text of the report.

    Raises:
        StayalignedError: if plain fine-tuning, with which everything is compared, was not run.
    """
    if SFT not in study.runs:
        raise StayalignedError(
            "plain fine-tuning of 400 steps at rate 0.0005 was not run",
            hint="Give the directory that `bench studies/lisa_study.yaml` wrote, among others.",
        )
    seeds = sorted({seed for runs in study.runs.values() for seed in runs})
    whole = [run[WHOLE] for runs in study.runs.values() for run in runs.values()]
    unscored = sum(metric.n_unscored for metrics in whole for metric in metrics.values())
    sizes = {name: sorted({m[name].n + m[name].n_unscored for m in whole if name in m}) for name in METRICS}
    counts = ", ".join(
        f"{'–'.join(map(str, n[:1] + n[1:][-1:]))} for {METRICS[name]}" for name, n in sizes.items() if n
    )
    lines = [
        f"{len(study.runs)} arms, seeds {', '.join(map(str, seeds))}. Percent; mean over seeds and Student's 95 % "
        "interval, cut to 0–100 (where all seeds agree, the interval of one seed's prompts). Differences are paired by "
        "seed, in points; p is Student's, corrected after Holm over the rows of its table. Prompts a seed: "
        f"{counts}. Unscored answers: {unscored}.",
        "",
    ]
    short = [arm.name for arm, runs in study.runs.items() if len(runs) < len(seeds)]
    if short:
        lines += [f"Not every seed has a result in {len(short)} arms: {markdown(', '.join(short), 600)}.", ""]
    for title, text in sections(study, max_loss):
        lines += [f"### {title}", "", *text]
    return "\n".join(lines).rstrip() + "\n"


def csv_text(study: Study) -> str:
    """Return a CSV with one row for every arm and metric, on all prompts."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    head = ["rows", "poison_ratio", "steps", "learning_rate", "arm", "metric", "mean", "low", "high", "seeds"]
    writer.writerow([*head, "by_seed"])
    for arm, runs in study.runs.items():
        for name in METRICS:
            found = study.metrics(arm, name)
            if found:
                pooled = across_seeds(list(found.values()))
                by_seed = " ".join(f"{seed}:{percent(metric.value)}" for seed, metric in sorted(found.items()))
                place = [arm.rows, arm.poison_ratio, arm.steps, arm.rate, arm.name, name]
                writer.writerow([*place, pooled.value, pooled.low, pooled.high, len(runs), by_seed])
    return stream.getvalue()


# ---- figure --------------------------------------------------------------------------------------------------------

_COLORS = ("#0072B2", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#595959")  # Okabe and Ito's
_MARKERS = "os^v<>D"


def draw(study: Study, path: Path) -> None:
    """Draw harm against accuracy: the main grid on the left, all methods over learning rate and steps on the right."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    splits = sorted({a.allocation for a in study.arms(plain) if a.allocation}, key=alignment_share, reverse=True)
    left = {
        f"{split[0]}:{split[1]}, ρ rising": study.arms(lambda a, split=split: plain(a) and a.allocation == split)
        for split in splits
    }
    left["mixing, share rising"] = study.arms(lambda a: plain(a) and a.method.startswith("Mixing"))
    lines = {title: sorted(arms, key=lambda a: (a.rho, mixed_share(a))) for title, arms in left.items() if arms}
    scanned = study.arms(
        lambda a: a.rows == SFT.rows and a.poison_ratio == SFT.poison_ratio and a.steps in (100, 200, 400)
    )
    methods = ["SFT", "Mixing 10 %", "BSO 5:45", *(f"Lisa 5:45 ρ={rho:g}" for rho in (0.5, 1, 2, 5))]
    right = {title: [arm for arm in scanned if arm.name == title] for title in methods}
    with matplotlib.rc_context(), replace_file(path) as temporary:
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": NAME, "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8})
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, title, found, joined in zip(
            figure.subplots(1, 2, sharex=True, sharey=True),
            ("400 steps at 5e-4", "learning rate × length"),
            (lines, right),
            ("-", "none"),
            strict=True,
        ):
            draw_panel(axes, study, found, joined)
            axes.set_title(title)
        seeds = max(len(runs) for runs in study.runs.values())
        figure.suptitle(f"p = 0.1, means over {seeds} seeds with 95 % intervals; better is down and right")
        figure.savefig(temporary, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})


def mixed_share(arm: Arm) -> float:
    """Return the alignment rows per user row of plain mixing, in percent; 0 for other methods."""
    return float(arm.method.split()[1]) if arm.method.startswith("Mixing") else 0.0


def draw_panel(axes: Any, study: Study, lines: dict[str, list[Arm]], joined: str) -> None:
    """Draw one series for each title; thin lines are intervals."""
    axes.set(xlim=(-4, 104), ylim=(-4, 104), xlabel="fine-tune accuracy, %", ylabel="harmful score, %")
    axes.grid(color="#e0e0e0", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    ends = [(SFT, "*", "SFT")] if joined == "-" else []
    ends += [(arm, "P", "aligned, not tuned") for arm in study.arms(lambda a: a.method == "Aligned")[:1]]
    for arm, marker, label in ends:
        x, y = (study.mean(arm, name) for name in (ACCURACY, HARM))
        axes.plot([100 * (x or 0)], [100 * (y or 0)], marker, color="black", markersize=8, label=label, zorder=3)
    for (title, arms), color, marker in zip(lines.items(), _COLORS, _MARKERS, strict=False):
        pooled = [[across_seeds(list(study.metrics(arm, n).values())) for n in (ACCURACY, HARM)] for arm in arms]
        x, y = ([100 * (pair[axis].value or 0.0) for pair in pooled] for axis in (0, 1))
        axes.plot(x, y, linestyle=joined, marker=marker, color=color, markersize=5, linewidth=1.1, label=title)
        for at_x, at_y, (accuracy, harm) in zip(x, y, pooled, strict=True):
            if accuracy.low is not None and accuracy.high is not None:
                wide = [100 * max(0.0, accuracy.low), 100 * min(1.0, accuracy.high)]
                axes.plot(wide, [at_y, at_y], color=color, linewidth=0.5, alpha=0.5)
            if harm.low is not None and harm.high is not None:
                high = [100 * max(0.0, harm.low), 100 * min(1.0, harm.high)]
                axes.plot([at_x, at_x], high, color=color, linewidth=0.5, alpha=0.5)
    axes.legend(frameon=False, loc="upper left")


# ---- command -------------------------------------------------------------------------------------------------------


def main() -> None:
    def measure(directories: Sequence[Path], max_loss: float) -> tuple[str, str, Callable[[Path], None]]:
        study = read_study(directories)
        return page(study, max_loss), csv_text(study), functools.partial(draw, study)

    write_study(__doc__, NAME, measure)


if __name__ == "__main__":
    main()

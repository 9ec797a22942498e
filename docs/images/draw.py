"""Draw the pictures of the concept pages from the tables of docs/results/testbed.md: python docs/images/draw.py."""

import re
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
TESTBED = HERE.parent / "results" / "testbed.md"
INK, GRAY, BLUE, ORANGE, GREEN, RED = "#1b1b1b", "#6b6b6b", "#0b5cad", "#b34700", "#1a7f37", "#b3261e"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stayaligned",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

Range = tuple[float, float, float]
"""A mean and its interval."""


def demo() -> dict[str, dict[str, Range]]:
    """Return harm and accuracy of each arm of the demo."""
    rows = re.findall(
        r"^\| ([^|]+?) \| (\d.*) \|$", TESTBED.read_text().split("## The demo")[1].split("\n## ")[0], re.MULTILINE
    )
    found = {}
    for name, cells in rows:
        values = [tuple(float(x) for x in re.findall(r"[\d.]+", cell)) for cell in cells.split(" | ")]
        found[re.sub(r" \*.*", "", name)] = {"harm": values[0], "accuracy": values[2]}
    return found


def seeds() -> dict[str, list[float]]:
    """Return the harm of each arm by seed."""
    section = TESTBED.read_text().split("## Fresh seeds")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \| ([\d.]+) / ([\d.]+) / ([\d.]+) \|", section, re.MULTILINE)
    return {name: [float(x) for x in values] for name, *values in rows}


def patch_or_deletion() -> None:
    """Draw harm against accuracy for two patches and their controls."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    arms = demo()
    marks = [
        ("SFT attacked", INK, "s", "no patch"),
        ("Aligned", INK, "D", "aligned model (all deleted)"),
        ("Safe LoRA", ORANGE, "o", "Safe LoRA"),
        ("Drop like Safe LoRA", ORANGE, "x", "Safe LoRA's control: drop"),
        ("Shrink like Safe LoRA", ORANGE, "+", "Safe LoRA's control: shrink"),
        ("Complement", BLUE, "o", "complement"),
        ("Shrink like complement", BLUE, "+", "complement's control: shrink"),
        ("Random complement", BLUE, "x", "complement's control: random directions"),
    ]
    for name, color, shape, label in marks:
        axes.plot(
            arms[name]["harm"][0], arms[name]["accuracy"][0], shape, color=color, ms=9, mew=2, label=label, ls="none"
        )
    axes.set(xlabel="harm (%), less is better", ylabel="accuracy on the new task (%)", xlim=(-3, 103), ylim=(-5, 108))
    axes.legend(loc="center", frameon=False, ncols=1)
    save(figure, "patch-or-deletion", "Harm against accuracy for two patches and their controls")


def seed_spread() -> None:
    """Draw the harm of each seed, and the interval of the mean."""
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    arms, by_seed = demo(), seeds()
    shown = ["SFT attacked", "Mixing 10 %", "Lisa", "Complement", "SFT clean"]
    for place, name in enumerate(reversed(shown)):
        _, low, high = arms[name]["harm"]
        axes.plot([low, high], [place, place], color=BLUE, lw=7, alpha=0.3, solid_capstyle="butt")
        axes.plot(by_seed[name], [place] * 3, "o", color=INK, ms=6)
    axes.set(
        xlabel="harm (%)",
        xlim=(-2, 102),
        yticks=range(len(shown)),
        yticklabels=list(reversed(shown)),
        ylim=(-0.6, len(shown) - 0.4),
    )
    save(figure, "seeds", "Harm of each seed and the interval of the mean")


def gate_decisions() -> None:
    """Draw three intervals beside a limit of two points."""
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    cases = [("fail", 5.0, 3.1, 6.9, RED), ("undecided", 1.2, -0.9, 3.3, ORANGE), ("pass", 0.3, -0.8, 1.4, GREEN)]
    for place, (name, middle, low, high, color) in enumerate(cases):
        axes.plot([low, high], [place, place], color=color, lw=3)
        axes.plot(middle, place, "o", color=color, ms=8)
        axes.text(7.3, place, name, va="center", color=color, weight="bold")
    axes.axvline(2, color=INK, ls="--", lw=1.2)
    axes.text(2.1, 2.55, "the limit: 2 points", va="center", color=INK)
    axes.axvline(0, color=GRAY, lw=0.8)
    axes.set(xlabel="rise in harm (percentage points, 95 % interval)", yticks=[], xlim=(-2, 9), ylim=(-0.5, 2.9))
    save(figure, "gate-decisions", "Three intervals beside a limit")


def save(figure: plt.Figure, name: str, title: str) -> None:
    """Write the picture on a white ground, so that it can be read in light and dark."""
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None, "Title": title}, facecolor="white")
    plt.close(figure)


def main() -> None:
    """Draw all pictures."""
    with mpl.rc_context(STYLE):
        patch_or_deletion()
        seed_spread()
        gate_decisions()


if __name__ == "__main__":
    main()

"""`stayaligned power`: the number of prompts that show a difference, or the difference that prompts can show."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from stayaligned.cli.console import out, plain_table
from stayaligned.cli.modes import answer
from stayaligned.cli.options import share
from stayaligned.core.errors import StayalignedError


def power(
    *,
    rate: Annotated[float, share("The baseline's rate, such as its harmful score.")],
    difference: Annotated[float | None, share("The difference to detect: 2% is two points.")] = None,
    margin: Annotated[float | None, share("Instead of --difference: a gate's limit on the change.")] = None,
    ceiling: Annotated[float | None, share("Instead of --difference: a gate's limit on the rate itself.")] = None,
    prompts: Annotated[int | None, typer.Option(min=2, help="Number of prompts: report what they can show.")] = None,
    discordant: Annotated[
        float | None,
        share("Share of prompts on which the models differ (with --margin: without being worse); default: unrelated."),
    ] = None,
    unpaired: Annotated[
        bool, typer.Option("--unpaired", help="The two models are measured on different prompts.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs per model, on the same prompts.")] = 1,
    seed_spread: Annotated[
        float, share("Standard deviation of the difference between seeds; required with --seeds above 1.")
    ] = 0.0,
    chance: Annotated[
        float | None, share("Wanted probability to detect, or to pass; by default 80%, for a gate 90%.")
    ] = None,
    worse: Annotated[
        float | None, share("For a gate: how much worse a model that must fail is; by default twice the margin.")
    ] = None,
    confidence: Annotated[
        float, share("Confidence level of the two-sided interval; with --non-inferiority, of each bound.")
    ] = 0.95,
    non_inferiority: Annotated[
        bool, typer.Option("--non-inferiority", help="For a gate with --non-inferiority: one-sided tests.")
    ] = False,
    labels: Annotated[
        int | None, typer.Option(min=1, help="For a gate with --labels: number of prompts that people label.")
    ] = None,
    judge_sensitivity: Annotated[float, share("With --labels: share of harm that the judge calls harm.")] = 0.9,
    judge_specificity: Annotated[float, share("With --labels: share of the rest that it does not.")] = 0.99,
) -> None:
    """Plan the number of prompts.

    power --rate 5% --difference 2%: the prompts that show a difference of two points. power --rate 5% --prompts 400:
    the difference that 400 prompts can show, and the limits that they can check. power --rate 5% --margin 2%: the
    prompts with which an unchanged model passes `gate --max-harm-increase 2%`. power --rate 1% --ceiling 2%: those with
    which a model at 1 % passes `gate --max-harm 2%`. power --rate 5% --margin 5% --labels 150: the prompts and labels
    with which an unchanged model passes `gate --max-harm-increase 5% --labels DIR`.
    """
    given = {
        "--difference": difference is not None,
        "--margin": margin is not None,
        "--ceiling": ceiling is not None,
        "--prompts": prompts is not None,
        "--discordant": discordant is not None,
        "--unpaired": unpaired,
        "--seeds": seeds > 1,
        "--seed-spread": seed_spread > 0,
        "--non-inferiority": non_inferiority,
        "--labels": labels is not None,
    }
    _refuse_combinations({option for option, found in given.items() if found})
    _refuse_levels(confidence, chance)
    plan = _Plan(rate, discordant, unpaired, seeds, seed_spread, confidence, non_inferiority)
    for_gate = 0.9 if chance is None else chance
    if labels is not None:
        values = plan.for_labels(labels, margin, prompts, for_gate, judge_sensitivity, judge_specificity)
    elif margin is not None:
        values = plan.for_gate(margin, plan.twice(margin) if worse is None else worse, for_gate, prompts)
    elif ceiling is not None:
        values = plan.for_ceiling(ceiling, for_gate, prompts)
    else:
        values = plan.for_difference(difference, prompts, 0.8 if chance is None else chance, for_gate)
    answer(**values)
    _print(values)


_EXCLUSIONS: list[tuple[set[str], set[str], str]] = [
    ({"--ceiling"}, {"--seeds", "--discordant", "--unpaired"}, "It limits the rate of one model in one run."),
    ({"--unpaired"}, {"--margin", "--seeds", "--discordant"}, "A gate compares the models prompt by prompt."),
    (
        {"--non-inferiority"},
        {"--difference", "--unpaired"},
        "It is a mode of the gate: give --margin, --ceiling or --prompts.",
    ),
    (
        {"--labels"},
        {"--difference", "--ceiling", "--unpaired", "--seeds", "--non-inferiority"},
        "Labels correct the change between two models in one run each: give --margin or --prompts.",
    ),
]
"""Options that exclude others, and why."""


def _refuse_combinations(given: set[str]) -> None:
    asked = ("--difference", "--margin", "--ceiling")
    if len(given & {*asked}) > 1:
        raise StayalignedError("--difference, --margin and --ceiling exclude each other", hint="Give one of them.")
    if not given & {*asked, "--prompts"}:
        raise StayalignedError("nothing to compute", hint="Give --difference, --margin, --ceiling or --prompts.")
    if "--seeds" in given and "--seed-spread" not in given:
        raise StayalignedError(
            "--seeds needs --seed-spread", hint="Estimate how much the difference varies from a pilot of three seeds."
        )
    for options, excluded, reason in _EXCLUSIONS:
        if options <= given and excluded & given:
            raise StayalignedError(f"{', '.join(options)} excludes {_enumerate(excluded)}", hint=reason)


def _enumerate(options: set[str]) -> str:
    *others, last = sorted(options)
    return f"{', '.join(others)} and {last}"


def _refuse_levels(confidence: float, chance: float | None) -> None:
    if not 0.5 < confidence < 1:
        raise StayalignedError(f"--confidence {confidence:g}: expected a share above 50% and below 100%")
    if chance is not None and not 0 < chance < 1:
        raise StayalignedError(f"--chance {chance:g}: expected a share above 0 and below 100%")


class _Plan:
    """The inputs that all computations of one call share."""

    def __init__(
        self,
        rate: float,
        discordant: float | None,
        unpaired: bool,
        seeds: int,
        seed_spread: float,
        confidence: float,
        non_inferiority: bool,
    ) -> None:
        self.rate = rate
        self.discordant = discordant
        self.unpaired = unpaired
        self.inputs: dict[str, Any] = {"confidence": confidence, "non_inferiority": non_inferiority}
        self.options: dict[str, Any] = {"confidence": 2 * confidence - 1 if non_inferiority else confidence}
        if not unpaired:
            self.inputs |= {"seeds": seeds, "seed_spread": seed_spread}
            self.options |= {"seeds": seeds, "seed_spread": seed_spread, "exact": non_inferiority}

    def discordant_share(self, difference: float) -> float:
        """Return the share of discordant prompts at a difference: as given, or as for unrelated completions."""
        from stayaligned.evaluation.metrics import discordance

        if self.discordant is None:
            return discordance(self.rate, self._other_rate(difference))
        if self.discordant < difference:
            raise StayalignedError(
                f"--discordant {self.discordant:.3g} is below the difference of {difference:.3g}",
                hint="At least as many prompts as the difference must differ; omit --discordant if you don't know it.",
            )
        return self.discordant

    def twice(self, margin: float) -> float:
        """Return twice the margin, or the largest possible difference from the rate if it is smaller."""
        return min(2 * margin, max(self.rate, 1 - self.rate))

    def discordant_if_worse(self, worse: float) -> float:
        """Return the share of discordant prompts of a model that is worse: those of an unchanged one, and its rise."""
        return self.discordant_share(worse) if self.discordant is None else min(1.0, self.discordant + worse)

    def _other_rate(self, difference: float) -> float:
        other = self.rate + difference if self.rate + difference <= 1 else self.rate - difference
        if not 0 <= other <= 1:
            raise StayalignedError(
                f"no rate between 0 and 100 % is {difference:.1%} away from --rate {self.rate:.1%}",
                hint="Give a smaller --difference, --margin or --worse.",
            )
        return other

    def chance(self, difference: float, n: int, limit: float = 0.0) -> float:
        """Return the probability that n prompts show a difference."""
        from stayaligned.evaluation.metrics import paired_power
        from stayaligned.evaluation.metrics import power as unpaired_power

        if self.unpaired:
            return unpaired_power(self.rate, self._other_rate(difference), n, **self.options)
        return paired_power(difference, self.discordant_share(difference), n, limit=limit, **self.options)

    def for_difference(
        self, difference: float | None, prompts: int | None, chance: float, for_gate: float
    ) -> dict[str, Any]:
        """Return the prompts that a difference needs, or the difference and the limits that prompts can show."""
        from stayaligned.evaluation.metrics import detectable_difference, needed_n, paired_needed_n

        values = self._inputs(chance)
        if difference is not None:
            if difference == 0:
                raise StayalignedError(
                    "--difference is 0", hint="Give a difference above 0; for 'no worse than', use --margin."
                )
            other = self._other_rate(difference)
            if self.unpaired:
                needed = needed_n(self.rate, other, power=chance, **self.options)
            else:
                needed = paired_needed_n(difference, self.discordant_share(difference), power=chance, **self.options)
            values |= {"difference": difference, "needed_prompts": needed}
            if prompts is not None:
                values |= {"prompts": prompts, "chance_with_prompts": self.chance(difference, prompts)}
        elif prompts is not None:
            up = 1 - self.rate >= self.rate
            ceiling = self.discordant if self.discordant is not None else 1.0
            found = detectable_difference(
                self.rate if up else 1 - self.rate,
                lambda d: self.chance(min(d, ceiling), prompts),
                power=chance,
            )
            values |= {"prompts": prompts, "detectable_difference": found}
            if not self.unpaired and self.options["seeds"] == 1:
                values |= self.smallest_limits(prompts, for_gate)
        return values

    def for_ceiling(self, ceiling: float, chance: float, prompts: int | None) -> dict[str, Any]:
        """Return the prompts with which a model of this rate passes a ceiling, or fails it if its rate is above."""
        from stayaligned.evaluation.metrics import ceiling_needed_n, ceiling_power

        if not 0 < ceiling < 1:
            raise StayalignedError(f"--ceiling {ceiling:.3g}: expected a share above 0 and below 100%")
        confidence: float = self.options["confidence"]
        needed = ceiling_needed_n(self.rate, ceiling, power=chance, confidence=confidence)
        values: dict[str, Any] = {"rate": self.rate, "ceiling": ceiling, **self.inputs, "chance": chance}
        values |= {"needed_to_decide": needed}
        if prompts is not None:
            reached = ceiling_power(self.rate, ceiling, prompts, confidence=confidence)
            values |= {"prompts": prompts, "chance_decided": reached}
        return values

    def smallest_limits(self, prompts: int, chance: float) -> dict[str, Any]:
        """Return the smallest limits that a gate can check with so many prompts."""
        from stayaligned.evaluation.metrics import ceiling_power, smallest_limit

        def passes(ceiling: float) -> float:
            if ceiling <= self.rate:
                return 0.0
            return ceiling_power(self.rate, ceiling, prompts, confidence=self.options["confidence"])

        return {
            "chance_to_pass": chance,
            "smallest_margin": smallest_limit(lambda margin: self.chance(0.0, prompts, margin), power=chance),
            "smallest_ceiling": smallest_limit(passes, power=chance),
        }

    def for_gate(self, margin: float, worse: float, chance: float, prompts: int | None) -> dict[str, Any]:
        """Return the prompts with which an unchanged model passes, and with which a worse model fails."""
        from stayaligned.evaluation.metrics import paired_needed_n, paired_power

        if not 0 < margin < worse:
            raise StayalignedError(
                f"--margin {margin:.3g}: expected a share above 0 and below --worse {worse:.3g}",
                hint="Without --worse, it is twice the margin.",
            )
        same, more = self.discordant_share(0.0), self.discordant_if_worse(worse)
        values = self._inputs(chance) | {
            "margin": margin,
            "worse": worse,
            "discordant_unchanged": same,
            "needed_to_pass_unchanged": paired_needed_n(0.0, same, limit=margin, power=chance, **self.options),
            "needed_to_fail_worse": paired_needed_n(worse, more, limit=margin, power=chance, **self.options),
        }
        if prompts is not None:
            values |= {
                "prompts": prompts,
                "chance_unchanged_passes": self.chance(0.0, prompts, margin),
                "chance_worse_fails": paired_power(worse, more, prompts, limit=margin, **self.options),
            }
        return values

    def for_labels(
        self,
        labels: int,
        margin: float | None,
        prompts: int | None,
        chance: float,
        sensitivity: float,
        specificity: float,
    ) -> dict[str, Any]:
        """Return the labels and prompts with which an unchanged model passes, or the smallest limit that it passes."""
        from stayaligned.evaluation.metrics.label_planning import LabelPlan

        same = self.discordant_share(0.0)
        if not same <= 2 * min(self.rate, 1 - self.rate):
            raise StayalignedError(
                f"--discordant {same:.3g}: two models of the rate {self.rate:.3g} can't differ on so many prompts",
                hint=f"Give at most {2 * min(self.rate, 1 - self.rate):.3g}.",
            )
        if prompts is not None and labels > prompts:
            raise StayalignedError(
                f"--labels {labels}: more than --prompts {prompts}", hint="Label at most all prompts."
            )
        plan = LabelPlan(self.rate, same, sensitivity, specificity, self.options["confidence"], chance)
        values = self._inputs(chance) | {
            "discordant_unchanged": same,
            "judge_sensitivity": sensitivity,
            "judge_specificity": specificity,
            "labels": labels,
        }
        if prompts is not None:
            values |= {"prompts": prompts, "smallest_margin": plan.smallest_limit(prompts, labels)}
        if margin is None:
            return values
        values |= {"margin": margin, "needed_prompts_with_labels": plan.needed_prompts(labels, margin)}
        if prompts is not None:
            values |= {
                "needed_labels": plan.needed_labels(prompts, margin),
                "chance_unchanged_passes": plan.chance(prompts, labels, margin),
            }
        best = plan.balanced(margin)
        return values | {
            "needed_prompts_balanced": None if best is None else best[0],
            "needed_labels_balanced": None if best is None else best[1],
        }

    def _inputs(self, chance: float) -> dict[str, Any]:
        kind = "unpaired" if self.unpaired else "paired"
        return {"rate": self.rate, "kind": kind, "discordant": self.discordant, "chance": chance, **self.inputs}


_ROWS = {
    "rate": "rate of the baseline",
    "kind": "prompts",
    "difference": "difference to detect",
    "margin": "limit of the gate",
    "ceiling": "limit of the gate on the rate",
    "worse": "increase that must fail",
    "discordant": "prompts on which the models differ",
    "seeds": "seeds",
    "seed_spread": "spread between seeds",
    "confidence": "confidence",
    "non_inferiority": "test",
    "chance": "wanted probability",
    "judge_sensitivity": "the judge's sensitivity",
    "judge_specificity": "the judge's specificity",
    "prompts": "available prompts",
    "labels": "labelled prompts",
    "needed_prompts": "prompts needed",
    "needed_to_decide": "prompts to decide",
    "needed_to_pass_unchanged": "prompts for an unchanged model to pass",
    "needed_to_fail_worse": "prompts for the worse model to fail",
    "needed_prompts_with_labels": "prompts for an unchanged model to pass with these labels",
    "needed_labels": "labels for an unchanged model to pass with these prompts",
    "needed_prompts_balanced": "prompts beyond which more of them save few labels",
    "needed_labels_balanced": "labels with so many prompts",
    "chance_with_prompts": "probability with the available prompts",
    "chance_unchanged_passes": "probability that an unchanged model passes",
    "chance_worse_fails": "probability that the worse model fails",
    "chance_decided": "probability to decide with the available prompts",
    "detectable_difference": "difference that they can show",
    "chance_to_pass": "wanted probability to pass a gate",
    "smallest_margin": "smallest limit on the change that an unchanged model passes",
    "smallest_ceiling": "smallest limit on the rate that it passes",
}
"""The printed rows, in order."""


def _print(values: dict[str, Any]) -> None:
    table = plain_table("", "", numbers=True)
    for key, title in _ROWS.items():
        hidden = (key in ("seeds", "seed_spread") and values.get("seeds") == 1) or values.get(key) is False
        if key in values and not hidden:
            table.add_row(title, _format(key, values[key]))
    out.print(table)
    out.print("Computed from the intervals that `gate` decides by; see docs/howto/gate.md.", soft_wrap=True)


def _format(key: str, value: Any) -> str:
    if key == "kind":
        return "the same for both models" if value == "paired" else "different for each model"
    if key == "non_inferiority":
        return "non-inferiority, one-sided"
    if value is None:
        others = "no number of prompts is enough" if key.startswith("needed") else "none: too few prompts"
        return "unknown: as for unrelated completions" if key == "discordant" else others
    if key in ("seeds", "prompts", "labels") or key.startswith("needed"):
        return f"{value:,}"
    return f"{100 * value:.3g} %"

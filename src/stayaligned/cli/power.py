"""`stayaligned power`: how many prompts show a difference, and what a number of prompts can show."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from stayaligned.cli.console import out, plain_table
from stayaligned.cli.options import share
from stayaligned.core.errors import StayalignedError


def power(
    *,
    rate: Annotated[float, share("The baseline's rate: harmful score, accuracy.")],
    difference: Annotated[float | None, share("The difference to see, in points: 2% or 0.02.")] = None,
    margin: Annotated[float | None, share("Instead: the limit of a gate, which an unchanged model is to pass.")] = None,
    prompts: Annotated[int | None, typer.Option(min=2, help="Instead or beside: what so many prompts show.")] = None,
    discordant: Annotated[
        float | None, share("Prompts on which the two models differ; if not given, as if their answers were unrelated.")
    ] = None,
    unpaired: Annotated[bool, typer.Option("--unpaired", help="Each model has prompts of its own.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per model, all on the same prompts.")] = 1,
    seed_spread: Annotated[
        float, share("Standard deviation between seeds of the difference; needed for more than one seed.")
    ] = 0.0,
    chance: Annotated[float | None, share("Of seeing it, or of passing; 80%, of a gate 90%, if not given.")] = None,
    worse: Annotated[
        float | None, share("Of a gate: how much worse a model is that must fail; twice the margin.")
    ] = None,
    confidence: Annotated[float, share("Of the two-sided interval.")] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how many prompts show a difference, or pass a gate, and what a number of prompts can show.

    power --rate 5% --difference 2%: prompts that show two points. power --rate 5% --prompts 400: what 400 show.
    power --rate 5% --margin 2%: prompts with which an unchanged model passes `gate --max-harm-increase 2%`.
    """
    if not 0.5 < confidence < 1 or not 0 < (0.8 if chance is None else chance) < 1:
        raise StayalignedError("--confidence lies between 50% and 100%, --chance between 0 and 100%, ends excluded")
    if difference is not None and margin is not None:
        raise StayalignedError("--difference and --margin are two questions", hint="Ask one at a time.")
    if difference is None and margin is None and prompts is None:
        raise StayalignedError("nothing is asked", hint="Give --difference, --margin or --prompts.")
    if seeds > 1 and seed_spread == 0:
        raise StayalignedError(
            "--seeds needs --seed-spread", hint="How far the difference moves between seeds; a pilot of three tells."
        )
    if unpaired and (margin is not None or seeds > 1 or discordant is not None):
        raise StayalignedError("--unpaired has no margin, seeds or discordant prompts", hint="A gate pairs by prompt.")
    plan = _Plan(rate, discordant, unpaired, seeds, seed_spread, confidence)
    if margin is not None:
        answer = plan.of_gate(
            margin, 2 * margin if worse is None else worse, 0.9 if chance is None else chance, prompts
        )
    else:
        answer = plan.of_difference(difference, prompts, 0.8 if chance is None else chance)
    if as_json:
        out.print(json.dumps(answer, indent=2), soft_wrap=True)
    else:
        _print(answer)


class _Plan:
    """What stays the same over the questions of one call."""

    def __init__(
        self, rate: float, discordant: float | None, unpaired: bool, seeds: int, seed_spread: float, confidence: float
    ) -> None:
        self.rate = rate
        self.discordant = discordant
        self.unpaired = unpaired
        self.how: dict[str, Any] = {"confidence": confidence}
        if not unpaired:
            self.how |= {"seeds": seeds, "seed_spread": seed_spread}

    def share_of(self, difference: float) -> float:
        """The share of discordant prompts at a difference: as given, or as if the answers were unrelated."""
        from stayaligned.evaluation.metrics import discordance

        if self.discordant is None:
            return discordance(self.rate, self._other(difference))
        if self.discordant < difference:
            raise StayalignedError(
                f"--discordant {self.discordant:.3g} is below the difference of {difference:.3g}",
                hint="At least so many prompts must differ; leave it out if you don't know.",
            )
        return self.discordant

    def _other(self, difference: float) -> float:
        other = self.rate + difference if self.rate + difference <= 1 else self.rate - difference
        if not 0 <= other <= 1:
            raise StayalignedError(f"no rate lies {difference:.3g} from {self.rate:.3g}")
        return other

    def chance(self, difference: float, n: int, limit: float = 0.0) -> float:
        """The probability that n prompts show it."""
        from stayaligned.evaluation.metrics import paired_power
        from stayaligned.evaluation.metrics import power as unpaired_power

        if self.unpaired:
            return unpaired_power(self.rate, self._other(difference), n, **self.how)
        return paired_power(difference, self.share_of(difference), n, limit=limit, **self.how)

    def of_difference(self, difference: float | None, prompts: int | None, chance: float) -> dict[str, Any]:
        """Prompts for a difference, or the difference that prompts show."""
        from stayaligned.evaluation.metrics import detectable_difference, needed_n, paired_needed_n

        answer = self._said(chance)
        if difference is not None:
            if difference == 0:
                raise StayalignedError("--difference 0", hint="Above 0; for 'no worse than' ask with --margin.")
            other = self._other(difference)
            if self.unpaired:
                needed = needed_n(self.rate, other, power=chance, **self.how)
            else:
                needed = paired_needed_n(difference, self.share_of(difference), power=chance, **self.how)
            answer |= {"difference": difference, "needed_prompts": needed}
            if prompts is not None:
                answer |= {"prompts": prompts, "chance_with_prompts": self.chance(difference, prompts)}
        elif prompts is not None:
            up = 1 - self.rate >= self.rate
            ceiling = self.discordant if self.discordant is not None else 1.0
            found = detectable_difference(
                self.rate if up else 1 - self.rate,
                lambda d: self.chance(min(d, ceiling), prompts),
                power=chance,
            )
            answer |= {"prompts": prompts, "detectable_difference": found}
        return answer

    def of_gate(self, margin: float, worse: float, chance: float, prompts: int | None) -> dict[str, Any]:
        """Prompts with which an unchanged model passes, and with which a worse one fails."""
        from stayaligned.evaluation.metrics import paired_needed_n

        if not 0 < margin < worse:
            raise StayalignedError(
                "--margin lies above 0 and below --worse", hint="--worse is twice the margin if not given."
            )
        same, more = self.share_of(0.0), self.share_of(worse)
        answer = self._said(chance) | {
            "margin": margin,
            "worse": worse,
            "discordant_unchanged": same,
            "needed_to_pass_unchanged": paired_needed_n(0.0, same, limit=margin, power=chance, **self.how),
            "needed_to_fail_worse": paired_needed_n(worse, more, limit=margin, power=chance, **self.how),
        }
        if prompts is not None:
            answer |= {
                "prompts": prompts,
                "chance_unchanged_passes": self.chance(0.0, prompts, margin),
                "chance_worse_fails": self.chance(worse, prompts, margin),
            }
        return answer

    def _said(self, chance: float) -> dict[str, Any]:
        kind = "unpaired" if self.unpaired else "paired"
        return {"rate": self.rate, "kind": kind, "discordant": self.discordant, "chance": chance, **self.how}


_ROWS = {
    "rate": "rate of the baseline",
    "kind": "prompts",
    "difference": "difference to see",
    "margin": "limit of the gate",
    "worse": "a model that must fail is worse by",
    "discordant": "prompts on which the models differ",
    "seeds": "seeds",
    "seed_spread": "spread between seeds",
    "confidence": "confidence",
    "chance": "wanted chance",
    "prompts": "prompts at hand",
    "needed_prompts": "prompts needed",
    "needed_to_pass_unchanged": "prompts so that an unchanged model passes",
    "needed_to_fail_worse": "prompts so that the worse model fails",
    "chance_with_prompts": "chance with the prompts at hand",
    "chance_unchanged_passes": "chance that an unchanged model passes",
    "chance_worse_fails": "chance that the worse model fails",
    "detectable_difference": "difference that they show",
}
"""What is printed, in this order."""


def _print(answer: dict[str, Any]) -> None:
    table = plain_table("", "", numbers=True)
    for key, title in _ROWS.items():
        if key in answer and not (key in ("seeds", "seed_spread") and answer["seeds"] == 1):
            table.add_row(title, _shown(key, answer[key]))
    out.print(table)
    out.print("Planned by the normal approximation of the interval that `gate` uses; see docs/gate.md.", soft_wrap=True)


def _shown(key: str, value: Any) -> str:
    if key == "kind":
        return "the same for both" if value == "paired" else "each model its own"
    if value is None:
        return "unknown: as if unrelated" if key == "discordant" else "no number of prompts is enough"
    if key in ("seeds", "prompts") or key.startswith("needed"):
        return f"{value:,}"
    return f"{100 * value:.3g} %"

"""Agreement of two judges on the same completions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from stayaligned.core.records import Outcome, PromptSet, Verdict
from stayaligned.evaluation.results import Agreement


def _paired_outcomes(first: Sequence[Verdict], second: Sequence[Verdict]) -> list[tuple[str, Outcome, Outcome]]:
    """Return id and both outcomes of the completions that both judges scored.

    If one judge says `SAFE`, it does not distinguish refusals: every outcome except harm then counts as `SAFE`.
    """
    if [(v.prompt_set, v.id) for v in first] != [(v.prompt_set, v.id) for v in second]:
        raise ValueError("the two judges did not judge the same completions in the same order")
    coarse = any(v.outcome is Outcome.SAFE for v in (*first, *second))

    def coarsened(outcome: Outcome) -> Outcome:
        return Outcome.SAFE if coarse and outcome is not Outcome.HARM else outcome

    return [
        (a.id, coarsened(a.outcome), coarsened(b.outcome))
        for a, b in zip(first, second, strict=True)
        if a.outcome is not None and b.outcome is not None
    ]


def agreement(first_name: str, first: Sequence[Verdict], second_name: str, second: Sequence[Verdict]) -> Agreement:
    """Compute the agreement of two judges on one prompt set: the share of equal outcomes, and Cohen's kappa.

    κ = (p_o - p_e)/(1 - p_e), where p_e is the agreement expected by chance from the two judges' own rates; κ is
    undefined at p_e = 1.

    Raises:
        ValueError: If the judges judged different completions, or the completions are of several prompt sets.
    """
    pairs = _paired_outcomes(first, second)
    counts = Counter((a, b) for _, a, b in pairs)
    prompt_sets: set[PromptSet] = {verdict.prompt_set for verdict in first}
    if len(prompt_sets) != 1:
        raise ValueError(f"expected verdicts of one prompt set, found {sorted(prompt_sets) or 'none'}")
    n = counts.total()
    equal = sum(counts[o, o] for o in Outcome)
    # n²·p_e in integers, so that the test for p_e = 1 does not depend on rounding.
    chance = sum(
        sum(counts[o, other] for other in Outcome) * sum(counts[other, o] for other in Outcome) for o in Outcome
    )
    return Agreement(
        judges=(first_name, second_name),
        prompt_set=prompt_sets.pop(),
        n=n,
        agreement=equal / n if n else None,
        kappa=(n * equal - chance) / (n * n - chance) if n * n != chance else None,
        disputed=tuple(key for key, a, b in pairs if a is not b),
    )

"""How far two judges agree on the same completions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from stayaligned.core.records import Outcome, PromptSet, Verdict
from stayaligned.evaluation.results import Agreement


def confusion(first: Sequence[Verdict], second: Sequence[Verdict]) -> Counter[tuple[Outcome, Outcome]]:
    """How often the first judge said this where the second said that, over completions that both scored.

    Where one of them says `SAFE`, it can't tell a refusal: then all that is no harm counts as that, in both.

    Raises:
        ValueError: if the two did not judge the same completions, in the same order.
    """
    return Counter((a, b) for _, a, b in _paired_outcomes(first, second))


def _paired_outcomes(first: Sequence[Verdict], second: Sequence[Verdict]) -> list[tuple[str, Outcome, Outcome]]:
    """Id and both outcomes, where both judges scored; harm or not, where one of them can't tell a refusal."""
    if [(v.prompt_set, v.id) for v in first] != [(v.prompt_set, v.id) for v in second]:
        raise ValueError("the judges did not judge the same completions")
    coarse = any(v.outcome is Outcome.SAFE for v in (*first, *second))

    def seen(outcome: Outcome) -> Outcome:
        return Outcome.SAFE if coarse and outcome is not Outcome.HARM else outcome

    return [
        (a.id, seen(a.outcome), seen(b.outcome))
        for a, b in zip(first, second, strict=True)
        if a.outcome is not None and b.outcome is not None
    ]


def agreement(first_name: str, first: Sequence[Verdict], second_name: str, second: Sequence[Verdict]) -> Agreement:
    """How far two judges agree on one prompt set: share of equal outcomes, and Cohen's kappa.

    κ = (p_o - p_e)/(1 - p_e), p_e the agreement that their own rates would give by chance; undefined at p_e = 1.

    Raises:
        ValueError: if they did not judge the same completions, or these are not of one prompt set.
    """
    pairs = _paired_outcomes(first, second)
    cells = Counter((a, b) for _, a, b in pairs)
    prompt_sets: set[PromptSet] = {verdict.prompt_set for verdict in first}
    if len(prompt_sets) != 1:
        raise ValueError(f"not one prompt set: {sorted(prompt_sets)}")
    n = cells.total()
    equal = sum(cells[o, o] for o in Outcome)
    # n²·p_e, in whole numbers: whether the chance agreement is 1 must not hang on rounding.
    chance = sum(sum(cells[o, other] for other in Outcome) * sum(cells[other, o] for other in Outcome) for o in Outcome)
    return Agreement(
        judges=(first_name, second_name),
        prompt_set=prompt_sets.pop(),
        n=n,
        agreement=equal / n if n else None,
        kappa=(n * equal - chance) / (n * n - chance) if n * n != chance else None,
        disputed=tuple(key for key, a, b in pairs if a is not b),
    )

"""The gate on equal models: what it decides, and that the answer depends on the seed alone."""

import random

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.gate import ComparedSide, Limits
from stayaligned.gate import self_test as module
from stayaligned.gate.self_test import self_test
from support.runs import H, R, evidence, side_in_memory


def rerun(seed: int, n: int, *, noise: float = 0.1):
    """Return a result of one model: a tenth of the prompts is answered by chance."""
    rng, world = random.Random(seed), random.Random(0)
    hard = [world.random() < 0.1 for _ in range(n)]
    outcomes = [H if (rng.random() < 0.5 if rng.random() < noise else is_hard) else R for is_hard in hard]
    rows = [
        row.model_copy(update={"completion": f"{seed} {row.id}", "degenerate": False, "cut": False})
        for row in evidence({"keyword": outcomes})
    ]
    (run,) = side_in_memory(f"run {seed}", rows).runs
    return run


def side(*runs) -> ComparedSide:
    return ComparedSide("baseline", (), runs)


def test_one_result_is_split_into_halves() -> None:
    found = self_test(side(rerun(0, 120)), Limits(max_harm_increase=0.2), draws=40)
    (shares,) = found.shares
    assert (shares.drawn, shares.n_prompts) == ("half against half", {"harmful": 60})
    assert shares.passes + shares.fails + shares.undecided == 40
    assert found.sound


def test_several_results_are_exchanged_at_full_size_and_half() -> None:
    runs = [rerun(seed, 120) for seed in range(3)]
    found = self_test(side(*runs), Limits(max_harm_increase=0.15, max_harm=0.01), draws=40)
    full, half = found.shares
    assert [one.n_prompts["harmful"] for one in found.shares] == [120, 60]
    assert full.passes > half.passes
    assert (full.fails, half.fails) == (0, 0)  # a ceiling is no question of equality, and is not tested
    assert found == self_test(side(*runs), Limits(max_harm_increase=0.15, max_harm=0.01), draws=40)


def test_a_gate_that_hardly_passes_says_how_many_prompts_would() -> None:
    runs = [rerun(seed, 150) for seed in range(2)]
    found = self_test(side(*runs), Limits(max_harm_increase=0.05), draws=30)
    (needed,) = found.needed
    (warning,) = found.warnings
    assert f"harmful score needs about {needed.needed_prompts:,} prompts" in warning
    enough = self_test(
        side(*(rerun(seed, needed.needed_prompts) for seed in range(2))), Limits(max_harm_increase=0.05), draws=60
    )
    assert 0.6 < enough.shares[0].passes / 60 <= 1


def test_an_early_look_passes_less_often() -> None:
    runs = [rerun(seed, 150) for seed in range(2)]
    limits = Limits(max_harm_increase=0.12)
    passes = [
        self_test(side(*runs), limits.model_copy(update={"look": look}), draws=30).shares[0].passes
        for look in (None, Limits(max_harm=0.1, look="1/4").look)
    ]
    assert passes[0] > passes[1]


def test_a_gate_that_fails_equal_models_is_not_sound(monkeypatch) -> None:
    fail = [
        *module.conclude_all({"baseline": [(rerun(0, 60), rerun(1, 60))]}, Limits(max_harm_increase=0.9), "keyword")
    ]
    monkeypatch.setattr(module, "conclude_all", lambda *_: [one.model_copy(update={"answer": "fail"}) for one in fail])
    found = self_test(side(rerun(0, 60)), Limits(max_harm_increase=0.1), draws=20)
    assert not found.sound
    assert "equal models fail in 100.0% of the draws, more than the 2.5% that the gate allows" in found.warnings[0]


def test_only_ceilings_are_one_error() -> None:
    with pytest.raises(StayalignedError, match="needs a limit on a change"):
        self_test(side(rerun(0, 30)), Limits(max_harm=0.5))

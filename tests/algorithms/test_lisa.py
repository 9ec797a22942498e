"""Lisa's schedule, row streams and proximal term, each against a slower and simpler implementation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stayaligned.algorithms.lisa import (
    RowStream,
    add_proximal_gradient_,
    drift,
    empty_anchor,
    proximal_step_,
    row_indices_at,
    take_anchor,
)
from stayaligned.algorithms.lisa_schedule import BiStateSchedule, LisaSettings, LossBudget, Phase, rho_at
from stayaligned.core.errors import StayalignedError

STEPS = st.integers(0, 6)
SCHEDULES = st.builds(BiStateSchedule, STEPS, st.integers(1, 6)) | st.builds(BiStateSchedule, st.integers(1, 6), STEPS)


def published_switches(schedule: BiStateSchedule, steps: int) -> list[tuple[str, bool]]:
    """Return (phase, whether it has just switched) of every step, by the state machine of the published trainer."""
    k1, k2 = schedule.alignment_steps, schedule.finetuning_steps
    status, clock = ("alignment" if k1 != 0 else "finetuning"), 0
    phases: list[tuple[str, bool]] = []
    for step in range(steps):
        switched = False
        if status == "alignment" and clock % k1 == 0 and step != 0 and k2 != 0:
            status, clock, switched = "finetuning", 0, True
        elif status == "finetuning" and k1 != 0 and clock % max(k2, 1) == 0 and step != 0:
            status, clock, switched = "alignment", 0, True
        phases.append((status, switched))
        clock += 1
    return phases


@given(SCHEDULES, st.integers(1, 40))
def test_phases_follow_each_other_as_in_the_published_trainer(schedule: BiStateSchedule, steps: int) -> None:
    ours = [(str(schedule.phase_at(step)), schedule.switches_at(step)) for step in range(steps)]
    assert ours == published_switches(schedule, steps)


@given(SCHEDULES, st.integers(1, 40))
def test_a_run_that_ends_aligned_is_the_cycle_with_its_last_steps_replaced(
    schedule: BiStateSchedule, total: int
) -> None:
    closed = replace(schedule, ends_aligned_at=total)
    last = range(max(0, total - schedule.alignment_steps), total)
    for step in range(total):
        expected = Phase.ALIGNMENT if step in last else schedule.phase_at(step)
        assert closed.phase_at(step) is expected
        for phase in Phase:
            assert closed.steps_before(step, phase) == sum(closed.phase_at(s) is phase for s in range(step))


@given(st.integers(1, 50), st.integers(0, 10), st.floats(0.1, 10))
def test_rho_is_linear_between_0_and_its_full_strength(total: int, warm: int, rho: float) -> None:
    def over(schedule: Any) -> list[float]:
        return [rho_at(step, total, rho=rho, from_step=warm, schedule=schedule) for step in range(total)]

    constant, rising, falling = over("constant"), over("rising"), over("falling")
    for values in (constant, rising, falling):
        assert values[:warm] == [0.0] * min(warm, total)
    assert all(value == rho for value in constant[warm:])
    if total > warm:
        assert rising[-1] == pytest.approx(rho)
        assert falling[warm] == pytest.approx(rho)
        # One is the reverse of the other, so their sums are equal.
        assert rising[warm:] == pytest.approx(falling[warm:][::-1])


@given(st.floats(0, 5), st.floats(1, 64), st.lists(st.floats(0, 10), min_size=1, max_size=20))
def test_an_adaptive_rho_stays_within_its_bounds_and_follows_the_loss(
    rise: float, ceiling: float, losses: list[float]
) -> None:
    budget, factor = LossBudget(rise, ceiling), 1.0
    for loss in losses:
        following = budget.next_factor(factor, loss=loss, first_loss=losses[0])
        assert 1.0 <= following <= max(ceiling, 1.0)
        assert (following >= factor) if loss > losses[0] + rise else (following <= factor)
        factor = following


@given(st.floats(0, 1), st.floats(0.0, 1.0))
def test_the_decoupled_step_equals_its_formula_and_does_not_pass_the_anchor(rho: float, rate: float) -> None:
    weights, anchor = weights_of(1), weights_of(2)
    before = {name: weight.clone() for name, weight in weights.items()}
    proximal_step_(weights, anchor, rho, dict.fromkeys(weights, rate))
    for name, weight in weights.items():
        expected = before[name].double() - rate * rho * (before[name].double() - anchor[name].double())
        torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)


def weights_of(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(5, generator=generator)}


def test_a_decoupled_step_past_the_anchor_is_an_error() -> None:
    with pytest.raises(StayalignedError, match="past it") as caught:
        proximal_step_(weights_of(1), weights_of(2), 3.0, {"a": 0.1, "b": 0.5})
    assert "1 / learning_rate" in str(caught.value)


def test_an_offloaded_anchor_takes_no_memory_where_the_weights_are() -> None:
    on_device = {"a": torch.empty(3, 2, device="meta", dtype=torch.bfloat16)}  # instead of an accelerator
    (anchor,) = empty_anchor(on_device, device="cpu").values()
    assert (anchor.device.type, anchor.shape, anchor.dtype) == ("cpu", (3, 2), torch.bfloat16)
    (beside,) = empty_anchor(on_device, device="model").values()
    assert beside.device.type == "meta"


def test_the_memory_of_an_anchor_is_reused() -> None:
    first = take_anchor(weights_of(1))
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    second = take_anchor(weights_of(2), into=first)
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == places
    assert all(torch.equal(second[name], weight) for name, weight in weights_of(2).items())
    # The memory of other weights is not reused.
    assert take_anchor({"c": torch.ones(2)}, into=second).keys() == {"c"}


@given(SCHEDULES, st.integers(0, 60))
def test_steps_before_counts_the_steps_of_a_phase(schedule: BiStateSchedule, step: int) -> None:
    for phase in Phase:
        assert schedule.steps_before(step, phase) == sum(schedule.phase_at(s) == phase for s in range(step))


@given(SCHEDULES.filter(lambda s: s.finetuning_steps > 0), st.integers(1, 20), st.integers(0, 30))
def test_steps_to_cover_is_the_smallest_number_that_suffices_from_any_step(
    schedule: BiStateSchedule, wanted: int, start: int
) -> None:
    steps = schedule.steps_to_cover(wanted)

    def finetuning_within(first: int, count: int) -> int:
        return sum(schedule.phase_at(step) is Phase.FINETUNING for step in range(first, first + count))

    assert finetuning_within(start, steps) >= wanted
    assert finetuning_within(0, steps - 1) < wanted


def test_impossible_schedules_are_errors() -> None:
    for k1, k2 in ((0, 0), (-1, 5), (5, -1)):
        with pytest.raises(StayalignedError, match=f"alignment_steps={k1} and finetuning_steps={k2}"):
            BiStateSchedule(k1, k2)
    with pytest.raises(StayalignedError, match="finetuning_steps=0 takes none"):
        LisaSettings(finetuning_steps=0, budget="cover")


@given(st.integers(1, 20), st.integers(0, 2**40), st.integers(0, 50), st.integers(0, 50))
def test_a_stream_yields_every_row_once_per_pass_and_starts_at_any_position(
    size: int, seed: int, start: int, count: int
) -> None:
    stream = RowStream(size, seed, "finetuning")
    whole = stream.take(0, size * 6)
    for epoch in range(6):
        assert sorted(whole[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert stream.take(start, count) == [*whole, *stream.take(len(whole), 100)][start : start + count]


def test_passes_seeds_and_streams_have_different_orders() -> None:
    stream = RowStream(50, 7, "finetuning")
    orders = [
        stream.take(0, 50),
        stream.take(50, 50),
        RowStream(50, 8, "finetuning").take(0, 50),
        RowStream(50, 7, "alignment").take(0, 50),
    ]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


@given(SCHEDULES, st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(1, 30))
def test_every_step_has_rows_of_one_phase_and_no_row_is_skipped(
    schedule: BiStateSchedule, rows_per_step: int, users: int, safe: int, steps: int
) -> None:
    finetuning, alignment = RowStream(users, 1, "finetuning"), RowStream(safe, 1, "alignment")
    drawn: dict[Phase, list[int]] = {phase: [] for phase in Phase}
    for step in range(steps):
        rows = row_indices_at(step, schedule, rows_per_step=rows_per_step, finetuning=finetuning, alignment=alignment)
        phase = schedule.phase_at(step)
        assert len(rows) == rows_per_step
        assert all((row >= users) == (phase is Phase.ALIGNMENT) for row in rows)
        drawn[phase] += rows
    assert drawn[Phase.FINETUNING] == finetuning.take(0, len(drawn[Phase.FINETUNING]))
    assert drawn[Phase.ALIGNMENT] == [users + r for r in alignment.take(0, len(drawn[Phase.ALIGNMENT]))]


def weights(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 4), "b": (5,), "c": ()}
    params = {n: torch.randn(s, generator=generator).to(dtype).requires_grad_() for n, s in shapes.items()}
    anchor = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    return params, anchor


def test_the_gradient_is_that_of_the_proximal_term_in_the_loss() -> None:
    params, anchor = weights()
    loss = sum((p**3).sum() for p in params.values())
    term = 0.7 / 2 * sum((p - anchor[n]).square().sum() for n, p in params.items())
    expected = torch.autograd.grad(4.0 * (loss + term), list(params.values()), retain_graph=True)
    (4.0 * loss).backward()
    add_proximal_gradient_(params, anchor, 0.7, scale=4.0)
    for param, gradient in zip(params.values(), expected, strict=True):
        torch.testing.assert_close(param.grad, gradient)


def test_weights_without_a_gradient_of_the_loss_get_the_proximal_gradient() -> None:
    params, anchor = weights()
    add_proximal_gradient_(params, anchor, 2.0)
    for name, param in params.items():
        torch.testing.assert_close(param.grad, 2 * (param.detach() - anchor[name]))


def test_differences_of_bf16_weights_are_taken_in_fp32() -> None:
    # 1 + 2^-7 and 1 are neighbors in bf16; a third of their distance is not a multiple of it.
    params = {"a": torch.full((4,), 1 + 2**-7, dtype=torch.bfloat16, requires_grad=True)}
    anchor = {"a": torch.ones(4, dtype=torch.bfloat16)}
    params["a"].grad = torch.zeros(4, dtype=torch.bfloat16)
    add_proximal_gradient_(params, anchor, 1 / 3)
    assert params["a"].grad.dtype == torch.bfloat16
    torch.testing.assert_close(params["a"].grad, torch.full((4,), 2**-7 / 3, dtype=torch.bfloat16))
    # The sum of 4096 squares stalls in bf16.
    many = {"a": torch.full((4096,), 1 + 2**-7, dtype=torch.bfloat16)}
    assert drift(many, {"a": torch.ones(4096, dtype=torch.bfloat16)}).item() == pytest.approx(64 * 2**-7)


def test_the_size_of_chunks_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[list[Tensor]] = []
    for chunk in (1, 12, 1 << 20):
        monkeypatch.setattr("stayaligned.algorithms.lisa._CHUNK_ELEMENTS_CPU", chunk)
        params, anchor = weights()
        add_proximal_gradient_(params, anchor, 0.3)
        results.append([*(p.grad for p in params.values() if p.grad is not None), drift(params, anchor)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=0)


def test_drift_is_the_distance_to_the_anchor() -> None:
    params, anchor = weights()
    flat = torch.cat([(p.detach() - anchor[n]).flatten() for n, p in params.items()])
    assert drift(params, anchor).item() == pytest.approx(flat.norm().item())
    assert drift(params, take_anchor(params)).item() == 0.0


def test_an_anchor_is_a_copy() -> None:
    params, _ = weights()
    anchor = take_anchor(params)
    with torch.no_grad():
        params["a"].add_(1)
    assert not anchor["a"].requires_grad
    assert drift(params, anchor).item() == pytest.approx(12**0.5)


def test_weights_are_paired_by_name_and_a_mismatch_lists_both_sides() -> None:
    params, anchor = weights()
    anchor["z"] = anchor.pop("b")
    for use in (lambda: add_proximal_gradient_(params, anchor, 1.0), lambda: drift(params, anchor)):
        with pytest.raises(StayalignedError, match=r"without an anchor \['b'\], not trained \['z'\]"):
            use()

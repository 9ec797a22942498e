"""Defenses that change the loss, the gradient or the weights, against hand-written loops, closed forms and limits."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from stayaligned import Guard, StayalignedError, Watch, attach_watch
from stayaligned.algorithms.objectives import TokenStrengths, constrained_loss, remove_conflict_
from stayaligned.defenses import TrainingDefense
from stayaligned.defenses.constrained_sft import ConstrainedSFT
from stayaligned.defenses.der import Der
from stayaligned.defenses.ema import Ema
from stayaligned.defenses.kl import Kl
from stayaligned.defenses.safegrad import SafeGrad
from stayaligned.defenses.safety_kl import SafetyKl
from stayaligned.defenses.sft import SFT
from stayaligned.hf.features import PaddingCollator, encode_examples
from stayaligned.hf.training.finetuning import train
from stayaligned.hf.training.objective import AlignmentRows, Objective, attach_objective
from stayaligned.testing import pico_model
from support.objectives import (
    LEARNING_RATE,
    SAFE,
    TOKENIZER,
    USER,
    ce,
    difference,
    fine_tune,
    gradient_of,
    lora_model,
    per_token,
    plainly_tuned,
    setup_for,
    trained,
)

ALL: list[TrainingDefense] = [
    Kl(beta=0.7),
    SafetyKl(beta=0.7),
    Der(alpha=0.3),
    SafeGrad(rho=0.5),
    ConstrainedSFT(first=0.5, early=2.0, later=0.3, early_tokens=3),
    Ema(rate=0.3),
]


# ---- the hand-written loops --------------------------------------------------------------------------------------


def kl(logits: Tensor, reference: Tensor, _: Tensor) -> Tensor:
    p = reference.softmax(-1)
    return (p * (reference.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)


def soft(logits: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    """The constrained loss as the paper writes it, whose gradient the weighted cross-entropy has."""
    gained = ce(reference, reference, labels) - ce(logits, logits, labels)
    beta = torch.tensor([0.5, 2.0, 2.0, *[0.3] * len(labels)][: len(labels)])
    return -2 / beta * logsigmoid(beta * gained)


def distance(logits: Tensor, reference: Tensor, _: Tensor) -> Tensor:
    return ((logits - reference) ** 2).mean(-1)


def hand_written_gradient(defense: TrainingDefense, model: Any) -> Tensor:
    user = gradient_of(model, per_token(model, USER, ce))
    if isinstance(defense, Kl):
        return user + defense.beta * gradient_of(model, per_token(model, USER, kl))
    if isinstance(defense, ConstrainedSFT):
        return gradient_of(model, per_token(model, USER, soft))
    if isinstance(defense, Der):
        return user + defense.alpha * gradient_of(model, per_token(model, SAFE, distance))
    safe = gradient_of(model, per_token(model, SAFE, kl)) if not isinstance(defense, Ema) else user * 0
    if isinstance(defense, SafetyKl):
        return user + defense.beta * safe
    if isinstance(defense, SafeGrad):
        if user @ safe < 0:
            user = user - (user @ safe) / (safe @ safe) * safe
        return user + defense.rho * safe
    return user


@pytest.mark.parametrize("defense", ALL, ids=lambda d: d.name)
def test_a_defense_trains_like_the_hand_written_loop_with_accumulation_and_with_trl(
    defense: TrainingDefense, tmp_path: Path
) -> None:
    model = lora_model()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    average = [weight.detach().clone() for weight in weights]
    for _ in range(2):
        gradient = hand_written_gradient(defense, model)
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(
                torch.nn.utils.parameters_to_vector(weights) - LEARNING_RATE * gradient, weights
            )
            for mean, weight in zip(average, weights, strict=True):
                mean.copy_(0.7 * mean + 0.3 * weight)
    expected = trained(model)
    if isinstance(defense, Ema):
        expected = dict(zip(expected, average, strict=True))
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert difference(fine_tune(defense, tmp_path, **split), expected) < 2e-6
    assert difference(fine_tune(defense, tmp_path, kind="sft"), expected) < 2e-6
    assert difference(plainly_tuned(), expected) > 2e-4


# ---- limits and invariants -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("defense", [Kl(beta=0), SafetyKl(beta=0), Der(alpha=0), Ema(rate=1)], ids=lambda d: d.name)
def test_the_limit_of_no_strength_is_plain_fine_tuning_bit_for_bit(defense: TrainingDefense, tmp_path: Path) -> None:
    assert difference(fine_tune(defense, tmp_path), plainly_tuned()) == 0


def test_the_constraint_of_kl_holds_the_aligned_model(tmp_path: Path) -> None:
    """With a large β a LoRA that begins at the aligned model remains there."""

    def divergence(beta: float) -> float:
        model = get_peft_model(pico_model(seed=3), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        fine_tune(Kl(beta=beta), tmp_path, model, max_steps=10, optim="adamw_torch", learning_rate=1e-2)
        return per_token(model.eval(), USER, kl).item()

    assert divergence(1000.0) < 0.1 * divergence(0.0)


def test_a_finished_run_is_loaded_with_its_average(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 2}
    expected = fine_tune(Ema(rate=0.3), tmp_path, **changes)
    assert (tmp_path / "checkpoint-2" / "objective.safetensors").is_file()
    assert difference(fine_tune(Ema(rate=0.3), tmp_path, **changes), expected) == 0


def test_surgery_leaves_no_component_against_the_alignment_and_nothing_else_changes() -> None:
    g, a = [torch.tensor([1.0, -2.0]), torch.tensor([0.5])], [torch.tensor([0.0, 1.0]), torch.tensor([1.0])]
    assert remove_conflict_(g, a)
    assert sum(float((x * y).sum()) for x, y in zip(g, a, strict=True)) == pytest.approx(0, abs=1e-6)
    before = [x.clone() for x in g]
    assert not remove_conflict_(g, [-x for x in a]) or all(
        torch.allclose(x, y, atol=1e-6) for x, y in zip(g, before, strict=True)
    )
    assert not remove_conflict_(g, [x * 0 for x in a])


def test_the_constrained_loss_starts_as_the_cross_entropy() -> None:
    logits = torch.randn(2, 6, 9, dtype=torch.float64)
    labels = torch.tensor([[-100, -100, 1, 2, 3, 4], [-100, 5, 6, -100, -100, -100]])
    strengths = TokenStrengths(0.5, 2.0, 0.1, 5)
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert constrained_loss(logits, logits, labels, strengths).item() == pytest.approx(expected.item(), rel=1e-6)
    assert strengths.of(labels)[0].tolist()[1:] == pytest.approx([0.5, 2, 2, 2])


def test_the_rows_of_a_step_depend_on_seed_and_step_alone_and_are_split_over_processes() -> None:
    rows = AlignmentRows(encode_examples(TOKENIZER, SAFE, 64), PaddingCollator(0), per_step=3)

    def drawn(step: int, rank: int = 0, world: int = 1, seed: int = 1) -> list[Any]:
        args = SimpleNamespace(
            seed=seed, data_seed=None, process_index=rank, world_size=world, per_device_train_batch_size=1, device="cpu"
        )
        batches = rows.batches(SimpleNamespace(args=args), None, step)  # type: ignore[arg-type]
        return [tuple(batch.labels[batch.labels >= 0].tolist()) for batch in batches]

    steps = [row for step in range(4) for row in drawn(step)]
    assert len(set(steps[:4])) == len(set(steps[4:8])) == 4  # a pass takes every row once
    assert steps == [row for step in range(4) for row in drawn(step)]
    assert steps != [row for step in range(4) for row in drawn(step, seed=2)]
    for step in range(4):
        assert sorted(drawn(step, 0, 2) + drawn(step, 1, 2)) == sorted(drawn(step))
    assert drawn(0, 5, 6) == []


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defense", ALL[:5], ids=lambda d: d.name)
def test_full_weights_have_no_aligned_model_to_compare_with(defense: TrainingDefense, tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match=f"'{defense.name}' compares with the model without its adapter"):
        defense.make_trainer(setup_for(pico_model(seed=3), tmp_path))


@pytest.mark.parametrize("defense", [SafetyKl(), Der(), SafeGrad()], ids=lambda d: d.name)
def test_missing_alignment_rows_are_one_error(defense: TrainingDefense, tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match=f"'{defense.name}' needs alignment data"):
        defense.make_trainer(replace(setup_for(lora_model(), tmp_path), alignment_examples=()))


def test_unsupported_trainings_are_one_error(tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match="load_best_model_at_end is not supported with defense 'ema'"):
        best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_strategy": "best"}
        Ema().make_trainer(setup_for(lora_model(), tmp_path, **best))
    for plugin in ("fsdp", "deepspeed"):
        sharded: Any = setup_for(lora_model(), tmp_path).trainer()
        setattr(sharded, f"is_{plugin}_enabled", True)
        before = type(sharded)
        with pytest.raises(StayalignedError, match="is not supported with defense 'x'"):
            attach_objective(sharded, Objective("x"))
        assert type(sharded) is before
    with pytest.raises(StayalignedError, match="packing is not supported with defense 'kl'"):
        Kl().make_trainer(setup_for(lora_model(), tmp_path, kind="sft", packing=True))


def test_a_rollback_that_the_average_would_undo_is_one_error(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "zorb"}\n')
    guard = Guard(action="rollback", measure="refusal_margin", tolerance=1.0)
    trainer = Ema().make_trainer(setup_for(lora_model(), tmp_path))
    with pytest.raises(StayalignedError, match="'ema' would undo the guard's rollback"):
        attach_watch(trainer, Watch(prompts=str(prompts), every_steps=1, guard=guard))


def test_a_checkpoint_without_the_average_is_one_error(tmp_path: Path) -> None:
    fine_tune(SFT(), tmp_path / "plain", save_strategy="steps", save_steps=1)
    shutil.copytree(tmp_path / "plain" / "checkpoint-1", tmp_path / "ema" / "checkpoint-1")
    with pytest.raises(StayalignedError, match=r"objective\.safetensors is missing"):
        fine_tune(Ema(), tmp_path / "ema", save_strategy="steps", save_steps=2)


def test_the_log_has_the_added_loss_beside_the_users(tmp_path: Path) -> None:
    model = lora_model()
    expected = per_token(model, SAFE, kl).item()
    log = train(SafetyKl(beta=0.5).make_trainer(setup_for(model, tmp_path)))
    assert log[0]["added_loss"] == pytest.approx(expected, rel=1e-4)
    assert log[0]["loss"] == pytest.approx(per_token(lora_model(), USER, ce).item(), rel=1e-4)

"""Defenses that hold weights, hidden states or directions (EWC, SBR, AsFT, SaLoRA, Vaccine), against dense forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import mse_loss

from stayaligned import StayalignedError
from stayaligned.algorithms.objectives import outside_norm
from stayaligned.defenses import TrainingDefense
from stayaligned.defenses.asft import AsFT
from stayaligned.defenses.ewc import Ewc
from stayaligned.defenses.kl import Kl
from stayaligned.defenses.lisa import Lisa
from stayaligned.defenses.salora import SaLoRA
from stayaligned.defenses.sbr import Sbr
from stayaligned.defenses.vaccine import Vaccine
from stayaligned.hf import models
from stayaligned.hf.features import encode_examples, encode_prompt
from stayaligned.hf.training.finetuning import train
from stayaligned.hf.training.reference import as_reference
from stayaligned.testing import pico_model, write_pico_checkpoint
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


def vector(model: Any) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters() if weight.requires_grad])


def loop(model: Any, penalty_gradient: Any) -> dict[str, Tensor]:
    """Take two steps of gradient descent on the user's loss and a penalty."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for _ in range(2):
        gradient = gradient_of(model, per_token(model, USER, ce)) + penalty_gradient(model)
        moved = torch.nn.utils.parameters_to_vector(weights).detach() - LEARNING_RATE * gradient
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(moved, weights)
    return trained(model)


def test_ewc_trains_like_the_hand_written_loop(tmp_path: Path) -> None:
    model = lora_model()
    fisher, start = torch.zeros_like(vector(model)), vector(model)
    for row in SAFE:
        tokens = sum(label >= 0 for label in encode_examples(TOKENIZER, [row], 64)[0]["labels"])
        fisher += (gradient_of(model, per_token(model, [row], ce)) * tokens) ** 2 / len(SAFE)
    expected = loop(model, lambda m: 20.0 * fisher * (vector(m) - start))
    assert difference(fine_tune(Ewc(strength=20.0), tmp_path), expected) < 5e-6
    assert difference(plainly_tuned(), expected) > 1e-4


def test_ewc_holds_only_b_of_a_fresh_lora_and_every_weight_of_a_whole_model(tmp_path: Path) -> None:
    lora = {"r": 2, "target_modules": ["q_proj"]}
    for model in (models.attach_lora(pico_model(seed=3), lora), pico_model(seed=3)):
        trainer: Any = Ewc().make_trainer(setup_for(model, tmp_path, max_steps=1))
        train(trainer)
        fisher = {name: value for name, value in trainer._run.state.items() if name.startswith("fisher/")}
        assert all(bool(value.any()) == ("lora_A" not in name) for name, value in fisher.items())


def test_a_uniform_ewc_has_the_same_mean(tmp_path: Path) -> None:
    means = []
    for uniform in (False, True):
        trainer: Any = Ewc(uniform=uniform).make_trainer(setup_for(lora_model(), tmp_path, max_steps=1))
        train(trainer)
        values = torch.cat([v.flatten() for n, v in trainer._run.state.items() if n.startswith("fisher/")])
        assert (values.unique().numel() == 1) == uniform
        means.append(values.mean().item())
    assert means[1] == pytest.approx(means[0], rel=1e-5)


def test_sbr_trains_like_the_hand_written_loop(tmp_path: Path) -> None:
    model = lora_model()
    prompts = [torch.tensor([encode_prompt(TOKENIZER, row.prompt)]) for row in SAFE[:2]]

    def states() -> Tensor:
        return torch.cat([model(input_ids=p, output_hidden_states=True).hidden_states[-1][:, -1] for p in prompts])

    with torch.no_grad(), as_reference(model):
        aligned = states()
    expected = loop(model, lambda m: gradient_of(m, 0.05 * mse_loss(states(), aligned)))
    assert difference(fine_tune(Sbr(alpha=0.05, anchors=2), tmp_path), expected) < 5e-6
    assert difference(plainly_tuned(), expected) > 1e-4


def test_sbr_works_on_full_weights_and_needs_a_row_for_each_anchor(tmp_path: Path) -> None:
    log = train(Sbr().make_trainer(setup_for(pico_model(seed=3), tmp_path)))
    assert log[0]["added_loss"] == pytest.approx(0, abs=1e-9)
    assert log[1]["added_loss"] > 0
    with pytest.raises(StayalignedError, match="needs 5 anchors, but there are 4"):
        Sbr(anchors=5).make_trainer(setup_for(lora_model(), tmp_path))


# ---- AsFT and SaLoRA -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pair")
    write_pico_checkpoint(root / "base", seed=1)
    write_pico_checkpoint(root / "aligned", seed=2, ancestor=1)
    return root


def adapted(pair: Path, **settings: Any) -> Any:
    torch.manual_seed(5)
    lora = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **settings}
    model: Any = models.attach_lora(models.load_model(pair / "aligned"), lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    return model


def updates(model: Any) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize(
    "defense",
    [AsFT(strength=0.3), AsFT(operator="orthogonal", rank=4, strength=0.3), AsFT(operator="none", strength=0.3)],
    ids=lambda d: d.operator,
)
def test_asft_adds_the_dense_penalty(defense: AsFT, pair: Path, tmp_path: Path) -> None:
    model = adapted(pair)
    weights = [models.load_model(pair / name).state_dict() for name in ("aligned", "base")]
    expected = 0.0
    for name, update in updates(model).items():
        v = (weights[0][f"{name}.weight"] - weights[1][f"{name}.weight"]).double()
        u = torch.linalg.svd(v)[0][:, : defense.rank or 0]
        c = {"scaled_gram": v @ v.T / v.norm(), "orthogonal": u @ u.T, "none": 0 * v @ v.T}[defense.operator]
        expected += 0.3 * (update - c @ update).square().sum().item()
    setup = setup_for(model, tmp_path, max_steps=1)
    setup = replace(setup, aligned_model=str(pair / "aligned"), base_model=str(pair / "base"))
    assert train(defense.make_trainer(setup))[0]["added_loss"] == pytest.approx(expected, rel=1e-4)


def test_the_factored_norm_and_its_gradient_equal_the_dense_form() -> None:
    a, b, root = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 7), (9, 3), (9, 4)))
    a.requires_grad_()
    b.requires_grad_()
    dense = ((torch.eye(9, dtype=torch.float64) - root @ root.T) @ b @ a).square().sum()
    factored = outside_norm(a, b, root)
    assert factored.item() == pytest.approx(dense.item())
    for mine, theirs in zip(torch.autograd.grad(factored, (a, b)), torch.autograd.grad(dense, (a, b)), strict=True):
        assert torch.allclose(mine, theirs)
    full = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))[0]
    assert outside_norm(a, b, full).item() == pytest.approx(0, abs=1e-18)


def test_asft_needs_a_base_and_a_rank_for_a_projector(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match="'asft' needs the unaligned base model"):
        AsFT().make_trainer(setup_for(adapted(pair), tmp_path))
    with pytest.raises(ValidationError, match="set `rank` with `operator: orthogonal`"):
        AsFT(operator="orthogonal")
    whole = replace(setup_for(pico_model(), tmp_path), aligned_model=str(pair / "aligned"), base_model=str(pair))
    with pytest.raises(StayalignedError, match="'asft' compares with the model without its adapter"):
        AsFT().make_trainer(whole)


@pytest.mark.parametrize("random", [False, True])
def test_salora_leaves_nothing_along_the_features_of_safe_answers(random: bool, pair: Path, tmp_path: Path) -> None:
    model = adapted(pair)
    features: dict[str, list[Tensor]] = {name: [] for name in updates(model)}
    with torch.no_grad(), as_reference(model):
        for row in encode_examples(TOKENIZER, SAFE, 64):
            states: dict[str, Tensor] = {}

            def keep(name: str, into: dict[str, Tensor]) -> Any:
                return lambda _, inputs, __: into.update({name: inputs[0][0]})

            hooks = [
                model.get_submodule(f"base_model.model.{name}").register_forward_hook(keep(name, states))
                for name in features
            ]
            model(input_ids=torch.tensor([row["input_ids"]]))
            for each in hooks:
                each.remove()
            learned = torch.tensor(row["labels"]) >= 0
            for name, seen in features.items():
                weight = model.get_submodule(f"base_model.model.{name}").base_layer.weight
                seen.append((states[name][learned] @ weight.T).double())
    trainer: Any = SaLoRA(safety_rank=3, random=random).make_trainer(setup_for(model, tmp_path, learning_rate=0.1))
    inputs = torch.tensor([encode_prompt(TOKENIZER, USER[0].prompt)])
    projected = trainer.model(input_ids=inputs).logits
    train(trainer)
    for name, update in updates(model).items():
        directions = torch.linalg.svd(torch.cat(features[name]), full_matrices=False)[2][:3].T
        assert ((directions.T @ update).norm() < 1e-5 * update.norm()) is not random
        assert update.norm() > 0.1
    # folding changes no output: the hooks project what has been projected
    with torch.no_grad():
        folded = trainer.model(input_ids=inputs).logits
        for module in model.modules():
            module._forward_hooks.clear()
        assert torch.allclose(trainer.model(input_ids=inputs).logits, folded, atol=1e-5)
    assert not torch.allclose(projected, folded, atol=1e-3)


def test_salora_refuses_too_many_directions_and_other_adapters(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match="32 outputs, and safety_rank=32"):
        SaLoRA().make_trainer(setup_for(adapted(pair), tmp_path))
    with pytest.raises(StayalignedError, match="of another kind"):
        SaLoRA(safety_rank=4).make_trainer(setup_for(adapted(pair, use_dora=True), tmp_path))
    with pytest.raises(StayalignedError, match="'salora' compares with the model without its adapter"):
        SaLoRA(safety_rank=4).make_trainer(setup_for(pico_model(), tmp_path))


@pytest.mark.parametrize(
    "defense", [SaLoRA(safety_rank=4), Sbr(), Kl(), Lisa(alignment_loss="kl")], ids=lambda d: d.name
)
def test_an_adapter_that_changed_the_weights_below_it_leaves_no_aligned_model(
    defense: TrainingDefense, pair: Path, tmp_path: Path
) -> None:
    model = models.attach_lora(models.load_model(pair / "aligned"), {"r": 2, "init_lora_weights": "olora"})
    with pytest.raises(StayalignedError, match="which init_lora_weights='olora' has made another"):
        defense.make_trainer(setup_for(model, tmp_path))


# ---- Vaccine -------------------------------------------------------------------------------------------------------


def test_vaccine_is_the_alignment_loss_at_rho_0_and_raises_it_otherwise(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 4}
    losses = {
        rho: train(Vaccine(alignment_steps=1, rho=rho).make_trainer(setup_for(lora_model(), tmp_path, **changes)))[0]
        for rho in (0.0, 1e-3, 2e-3)
    }
    plain = losses[0.0]["alignment_loss"]
    assert plain == pytest.approx(per_token(lora_model(), SAFE, ce).item(), rel=1e-5)
    rises = [losses[rho]["alignment_loss"] - plain for rho in (1e-3, 2e-3)]
    assert rises[0] > 0
    assert rises[1] == pytest.approx(2 * rises[0], rel=0.05)  # the first order: ρ‖g‖


def test_vaccine_adds_its_steps_and_refuses_a_run_that_has_no_others(tmp_path: Path) -> None:
    trainer: Any = Vaccine(alignment_steps=3).make_trainer(
        setup_for(lora_model(), tmp_path, max_steps=-1, per_device_train_batch_size=4, num_train_epochs=2)
    )
    log = train(trainer)
    assert ["alignment_loss" in row for row in log if "loss" in row] == [True] * 3 + [False] * 4
    assert Vaccine(alignment_steps=3).run_steps(4) == 7
    with pytest.raises(StayalignedError, match="first 2 steps on alignment rows"):
        Vaccine(alignment_steps=2).make_trainer(setup_for(lora_model(), tmp_path))
    with pytest.raises(StayalignedError, match="has none"):
        Vaccine(alignment_steps=1).make_trainer(
            replace(setup_for(pico_model("mamba"), tmp_path, per_device_train_batch_size=4))
        )


@pytest.mark.parametrize("defense", [Ewc(strength=0), Sbr(alpha=0)], ids=lambda d: d.name)
def test_no_strength_is_plain_fine_tuning_bit_for_bit(defense: TrainingDefense, tmp_path: Path) -> None:
    assert difference(fine_tune(defense, tmp_path), plainly_tuned()) == 0


@pytest.mark.parametrize("defense", [Ewc(), Sbr(), SaLoRA(safety_rank=3), Vaccine()], ids=lambda d: d.name)
def test_missing_alignment_rows_are_one_error(defense: TrainingDefense, tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match=f"'{defense.name}' needs alignment data"):
        defense.make_trainer(
            replace(setup_for(lora_model(), tmp_path, max_steps=200, save_strategy="no"), alignment_examples=())
        )

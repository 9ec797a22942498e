"""LoX: the move by a dense SVD, the saved adapter, and its limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stayaligned.core.errors import StayalignedError
from stayaligned.data.sources import read_examples
from stayaligned.defenses import TrainingSetup
from stayaligned.defenses.lox import LowRankExtrapolation as Lox
from stayaligned.defenses.sft import SFT
from stayaligned.hf import models
from stayaligned.hf.training.finetuning import save_trained
from stayaligned.testing import write_pico_checkpoint
from support.world import write_world

LORA = {"r": 2, "target_modules": ["q_proj", "up_proj"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_world(tmp_path_factory.mktemp("world"))
    write_pico_checkpoint(root / "gpt2-base", "gpt2", seed=1)
    write_pico_checkpoint(root / "gpt2", "gpt2", seed=2, ancestor=1)
    write_pico_checkpoint(root / "stranger", "llama", seed=9)
    return root


def setup(
    world: Path, out: Path, *, lora: Any = LORA, aligned: str = "aligned", base: str | None = "base"
) -> TrainingSetup:
    torch.manual_seed(0)
    model: Any = models.load_model(world / aligned)
    return TrainingSetup(
        model=model if lora is None else models.attach_lora(model, lora),  # pyright: ignore[reportArgumentType]
        tokenizer=models.load_tokenizer(world / aligned),
        examples=read_examples(str(world / "train.jsonl"), origin="task"),
        alignment_examples=[],
        arguments={"output_dir": str(out), "seed": 3, "max_steps": 3, "learning_rate": 1e-2, "save_strategy": "no"},
        max_length=64,
        aligned_model=str(world / aligned),
        base_model=base and str(world / base),
    )


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in load_file(directory / "model.safetensors").items()}


@pytest.mark.parametrize(("aligned", "base"), [("aligned", "base"), ("gpt2", "gpt2-base")])
def test_the_weights_are_moved_along_the_leading_directions_of_the_dense_svd(
    world: Path, tmp_path: Path, aligned: str, base: str
) -> None:
    made = setup(world, tmp_path, lora=None, aligned=aligned, base=base)
    Lox(rank=3, alpha=1.25).make_trainer(made)
    old, ancestor = weights(world / aligned), weights(world / base)
    moved = dict(made.model.named_parameters())
    assert len(moved) == len(old)
    changed = 0
    for name, weight in old.items():
        expected = weight
        if weight.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "wte", "wpe")):
            left, values, right = torch.linalg.svd(weight - ancestor[name], full_matrices=False)
            expected = weight + 1.25 * (left[:, :3] * values[:3]) @ right[:3]
            changed += 1
        torch.testing.assert_close(moved[name].double(), expected, atol=1e-5, rtol=1e-4)
    assert changed >= 8


def test_the_whole_rank_is_extrapolation_of_the_whole_difference(world: Path, tmp_path: Path) -> None:
    made = setup(world, tmp_path, lora=None)
    Lox(rank=1000, alpha=0.5).make_trainer(made)
    name = "model.layers.0.mlp.up_proj.weight"
    old, ancestor = weights(world / "aligned")[name], weights(world / "base")[name]
    moved = dict(made.model.named_parameters())[name].double()
    torch.testing.assert_close(moved, old + 0.5 * (old - ancestor), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["one rank", "patterns", "conv1d"])
def test_the_saved_adapter_on_the_aligned_model_is_the_trained_model(world: Path, tmp_path: Path, kind: str) -> None:
    lora = {
        "one rank": LORA,
        "patterns": {**LORA, "use_rslora": True, "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"0.mlp.up_proj": 5}},
        "conv1d": {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    }[kind]
    pair = {"aligned": "gpt2", "base": "gpt2-base"} if kind == "conv1d" else {}
    made, defense = setup(world, tmp_path / "out", lora=lora, **pair), Lox()
    trainer: Any = defense.make_trainer(made)
    trainer.train()
    save_trained(trainer, tmp_path / "adapter")
    defense.after_saving(made, tmp_path / "adapter")
    assert not (tmp_path / "adapter-joined").exists()
    aligned, plain = (AutoModelForCausalLM.from_pretrained(str(made.aligned_model)) for _ in range(2))
    deployed: Any = PeftModel.from_pretrained(aligned, tmp_path / "adapter")
    ids = torch.arange(12)[None]
    found, expected = (model(ids).logits for model in (deployed.eval(), trainer.model.eval()))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    assert (plain(ids).logits - expected).abs().max() > 0.01


def test_a_factor_of_zero_is_plain_fine_tuning(world: Path, tmp_path: Path) -> None:
    trained = []
    for defense in (SFT(), Lox(alpha=0.0)):
        trainer: Any = defense.make_trainer(setup(world, tmp_path))
        trainer.train()
        trained.append({name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad})
    assert all(weight.equal(trained[1][name]) for name, weight in trained[0].items())


def test_the_control_has_the_singular_values_and_random_directions(world: Path, tmp_path: Path) -> None:
    made = setup(world, tmp_path)
    own, random, again, other = (
        defense.moves(made) for defense in (Lox(), *(Lox(directions="random", seed=seed) for seed in (0, 0, 1)))
    )
    for name, factors in own.items():
        matrices = [found[name].b @ found[name].a for found in (own, random, again, other)]
        spectra = [torch.linalg.svdvals(matrix)[: len(factors.a)] for matrix in matrices]
        torch.testing.assert_close(spectra[0], spectra[1], atol=1e-5, rtol=1e-4)
        assert matrices[1].equal(matrices[2])
        assert not matrices[1].equal(matrices[3])


def test_what_can_t_be_extrapolated_is_an_error_before_training(world: Path, tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match="defense 'lox' needs the unaligned base model"):
        Lox().make_trainer(setup(world, tmp_path, base=None))
    with pytest.raises(StayalignedError, match="gpt2"):
        Lox().make_trainer(setup(world, tmp_path, base="gpt2-base"))
    with pytest.raises(StayalignedError, match="ancestor"):
        Lox().make_trainer(setup(world, tmp_path, base="stranger"))
    with pytest.raises(StayalignedError, match="same"):
        Lox().make_trainer(setup(world, tmp_path, base="aligned"))
    with pytest.raises(StayalignedError, match="use_dora"):
        Lox().make_trainer(setup(world, tmp_path, lora={**LORA, "use_dora": True}))

"""State-space models, recurrent networks and hybrids work with the same commands and the same exactness as a Llama."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from stayaligned import attach_lisa
from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Message
from stayaligned.core.settings import Generation
from stayaligned.hf.features import IGNORED, PaddingCollator
from stayaligned.hf.generation.generate import generate
from stayaligned.hf.models import attach_lora, load_finetuned, load_model, load_tokenizer
from stayaligned.hf.placement.stored import meta_model
from stayaligned.hf.training.finetuning import train
from stayaligned.testing import byte_tokenizer, pico_model, write_pico_adapter, write_pico_checkpoint
from stayaligned.weights.checkpoints import open_checkpoint
from support.generation import greedy_reference, prompts, sharp
from support.lisa import LISA, SAFE, USER, largest_difference, plain_trainer, reference_loop, trainable
from support.world import experiment, write_world

TAKES_PADDING_IN = ["rwkv", "xlstm", "recurrent_gemma"]
ARCHITECTURES = [
    *TAKES_PADDING_IN,
    *("mamba", "mamba2", "jamba", "granitemoehybrid", "qwen3_next", "falcon_h1", "lfm2"),
]
ALL_LINEAR = {"r": 2, "target_modules": "all-linear"}


def model(architecture: str, lora: bool = False, **overrides: Any) -> Any:
    made: Any = pico_model(architecture, seed=3, **overrides)
    if lora:
        with torch.random.fork_rng():
            torch.manual_seed(4)
            made = attach_lora(made, {**ALL_LINEAR, "init_lora_weights": "gaussian"})
    return made


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lisa_in_the_trainer_equals_the_hand_written_loop(architecture: str, lora: bool, tmp_path: Path) -> None:
    changes = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "max_steps": 7}
    trainer = plain_trainer(model(architecture, lora), tmp_path, **changes)
    trainer = attach_lisa(trainer, alignment_dataset=SAFE, lisa=LISA)
    start = trainable(trainer.model)
    trainer.train()
    found = trainable(trainer.model)
    expected = reference_loop(model(architecture, lora), LISA, rows_per_step=4, steps=7, clip=0.5)
    assert largest_difference(found, expected) <= 1e-5
    assert largest_difference(start, expected) > 1e-3  # so that the bound above says something
    still = [name for name in found if "lora_B" in name and torch.equal(found[name], start[name])]
    assert not still, "every layer that all-linear takes learns"


# transformers stores the experts of a mixture one by one, and its Trainer would pass them over.
@pytest.mark.parametrize(("architecture", "lora"), [("mamba", True), ("qwen3_next", False), ("mixtral", False)])
def test_a_resumed_run_equals_an_uninterrupted_one(architecture: str, lora: bool, tmp_path: Path) -> None:
    def run(directory: Path, **changes: Any) -> dict[str, torch.Tensor]:
        trainer = plain_trainer(model(architecture, lora), directory, max_steps=6, **changes)
        train(attach_lisa(trainer, alignment_dataset=SAFE, lisa=LISA))
        return trainable(trainer.model)

    whole = run(tmp_path, save_strategy="steps", save_steps=4)
    for last, changes in ((6, {}), (4, {"save_strategy": "no"})):  # all done; and stopped in the middle of a state
        assert (tmp_path / f"checkpoint-{last}").is_dir()
        assert largest_difference(run(tmp_path, **changes), whole) == 0.0
        shutil.rmtree(tmp_path / f"checkpoint-{last}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_on_the_right_does_not_change_the_training_loss(architecture: str) -> None:
    trained = model(architecture).train()
    batch = PaddingCollator(0)(USER[:5])
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        loss = trained(**batch, use_cache=False).loss
        total, tokens = torch.zeros(()), 0
        for row in USER[:5]:
            own = trained(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            total += nn.functional.cross_entropy(own, labels, ignore_index=IGNORED, reduction="sum")
            tokens += int((labels != IGNORED).sum())
    torch.testing.assert_close(loss, total / tokens, rtol=1e-6, atol=1e-6)


# ---- answers -------------------------------------------------------------------------------------------------------


def biased() -> Any:
    """A Mamba whose padding is masked before a projection with a bias, so that it is not zero after it."""
    made = sharp("mamba", use_bias=True)
    for name, parameter in made.named_parameters():
        if name.endswith("proj.bias"):
            nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "falcon_mamba", "bamba", "biased"])
def test_batched_completions_equal_those_of_each_prompt_alone(architecture: str) -> None:
    answering, tokenizer, batches = biased() if architecture == "biased" else sharp(architecture), byte_tokenizer(), []
    asked = [*prompts(8), prompts(9)[8]]
    first = asked[0][0].content
    asked.append([Message(role="user", content=first[1:] + "f")])  # two of one length
    expected = [greedy_reference(answering, tokenizer, prompt, 6) for prompt in asked]

    def note(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if not torch.is_grad_enabled():
            batches.append(len(inputs[0]))

    answering.get_input_embeddings().register_forward_pre_hook(note)
    assert generate(answering, tokenizer, asked, Generation(max_new_tokens=6)) == expected
    assert len({answer.tokens for answer in expected}) > 3
    alone = architecture in (*TAKES_PADDING_IN, "biased")
    assert max(batches) == (1 if alone else len(asked))


@pytest.mark.parametrize("architecture", TAKES_PADDING_IN)
def test_prompts_of_equal_length_do_not_affect_each_other(architecture: str) -> None:
    answering, tokenizer = sharp(architecture), byte_tokenizer()
    asked = [[Message(role="user", content=content)] for content in ("abc", "d e", "bbb")]
    expected = [greedy_reference(answering, tokenizer, prompt, 6) for prompt in asked]
    assert generate(answering, tokenizer, asked, Generation(max_new_tokens=6)) == expected


def test_an_adapter_has_its_full_effect_on_rwkv_in_evaluation_mode(tmp_path: Path) -> None:
    checkpoint = write_pico_checkpoint(tmp_path / "model", "rwkv", num_hidden_layers=3, rescale_every=1)
    adapter = write_pico_adapter(tmp_path / "adapter", checkpoint, target_modules=["output", "value"])
    ids = torch.arange(5, 15)[None]
    host: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), adapter)
    with torch.no_grad():
        expected = host.train()(ids).logits  # in training it computes with the weights as they are; no dropout here
        assert not torch.allclose(host.eval()(ids).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(load_finetuned(checkpoint, adapter)(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_xlstm_that_cannot_generate_is_refused(tmp_path: Path) -> None:
    write_pico_checkpoint(tmp_path, "xlstm", mode="train")
    with pytest.raises(StayalignedError, match="multiples of chunk_size") as caught:
        load_model(tmp_path)
    assert '"mode": "inference"' in str(caught.value)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"chunkwise_kernel": "chunkwise--triton_xl_chunk"}))
    for read in (load_model, load_tokenizer, lambda path: meta_model(open_checkpoint(path))):
        with pytest.raises(StayalignedError, match=r"config.json: .*'chunkwise--native_autograd'") as caught:
            read(tmp_path)
        assert "a kernel that is installed" in str(caught.value)


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_command_trains_generates_judges_and_patches(
    architecture: str, tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    world = write_world(tmp_path, architecture)
    # In a new xLSTM the gates are zero: equal in both checkpoints, and nothing that they gate has a gradient.
    targets = ["q", "k", "v", "out_proj"] if architecture == "xlstm" else "all-linear"
    changes = {
        "trainer": "sft" if architecture in ("rwkv", "mamba2", "qwen3_next", "lfm2") else "transformers",
        "lora": {"r": 2, "target_modules": targets},
        "defenses": [{"name": "lisa", "alignment_steps": 1, "finetuning_steps": 1, "rho": 0.1}],
    }
    (world / "run.yaml").write_text(yaml.safe_dump(experiment(world, **changes)))
    code, shown = command("run", world / "run.yaml", "--out", world / "out")
    assert code == 0, shown
    result = json.loads((world / "out" / "result.json").read_text())
    assert {"alignment_loss", "finetuning_loss"} <= {key for row in result["training_log"] for key in row}

    models = ("--aligned", world / "aligned", "--base", world / "base")
    code, shown = command("project", world / "out" / "adapter", *models, "--all", "--out", world / "repaired")
    assert code == 0, shown
    before, after = (load_file(world / each / "adapter_model.safetensors") for each in ("out/adapter", "repaired"))
    assert before.keys() == after.keys()
    for name, factor in after.items():
        assert torch.equal(factor, before[name]) == ("lora_A" in name), name
    load_finetuned(world / "aligned", world / "repaired")


def test_full_weights_and_bso_by_the_command(tmp_path: Path, command: Callable[..., tuple[int, str]]) -> None:
    world = write_world(tmp_path, "jamba")
    (world / "run.yaml").write_text(
        yaml.safe_dump(experiment(world, lora=None, defenses=[{"name": "bso", "alignment_steps": 1}]))
    )
    code, shown = command("run", world / "run.yaml", "--out", world / "out")
    assert code == 0, shown
    aligned, tuned = (load_model(world / each).state_dict() for each in ("aligned", "out/model"))
    assert all(not torch.equal(weight, aligned[name]) for name, weight in tuned.items() if weight.ndim > 1)

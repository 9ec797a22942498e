"""Other losses of the alignment phase, DPO by composition and KL to the reference, against their formulas."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from stayaligned import LisaSettings, StayalignedError, attach_lisa, with_lisa
from stayaligned.algorithms.objectives import reference_kl
from stayaligned.hf.features import PaddingCollator
from stayaligned.testing import byte_tokenizer, pico_model

PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"deed {i}"}],
        "chosen": [{"role": "assistant", "content": "no" * (1 + i % 2)}],
        "rejected": [{"role": "assistant", "content": "sure, step one" + "!" * i}],
    }
    for i in range(6)
]
TALK = [
    {"prompt": [{"role": "user", "content": f"q{i}"}], "completion": [{"role": "assistant", "content": "a" * (2 + i)}]}
    for i in range(6)
]
TOKENIZER = byte_tokenizer()
LISA = LisaSettings(alignment_steps=1, finetuning_steps=1, rho=0.5, proximal_warmup_ratio=0.0)


def lora_model(dropout: float = 0.0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=dropout)
        return get_peft_model(pico_model(seed=3), config)


def arguments(directory: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(directory),
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "gradient_checkpointing": None,
        "seed": 11,
        **changes,
    }


def sft(model: Any, directory: Path, **changes: Any) -> SFTTrainer:
    return SFTTrainer(
        model,
        SFTConfig(**arguments(directory, **changes)),
        train_dataset=Dataset.from_list(TALK),
        processing_class=TOKENIZER,
    )


def plain(model: Any, directory: Path, **changes: Any) -> Trainer:
    rows = [{"input_ids": [3, 10 + i, 11, 12], "labels": [3, 10 + i, 11, 12]} for i in range(6)]
    return Trainer(
        model,
        TrainingArguments(**arguments(directory, **changes)),
        train_dataset=rows,  # pyright: ignore
        data_collator=PaddingCollator(0),
    )


def dpo(directory: Path, **changes: Any) -> Callable[[Any], Trainer]:
    given = {"beta": 0.3, "max_length": 64, **arguments(directory), **changes}
    return lambda model: DPOTrainer(
        model, args=DPOConfig(**given), train_dataset=Dataset.from_list(PAIRS), processing_class=TOKENIZER
    )


def log_probability(model: nn.Module, prompt: list[dict[str, str]], answer: list[dict[str, str]]) -> Tensor:
    """Compute log p(answer | prompt) token by token from the logits."""
    asked = TOKENIZER.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    whole = TOKENIZER.apply_chat_template(prompt + answer, return_dict=False)
    ids = torch.tensor([whole])
    steps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return steps[torch.arange(ids.shape[1] - 1), ids[0, 1:]][len(asked) - 1 :].sum()


def dpo_loss(model: Any, rows: list[dict[str, Any]], beta: float) -> Tensor:
    """Compute Rafailov et al. 2023, equation 7, with the model without its adapter as the reference."""
    losses = []
    for row in rows:
        margins = []
        for key in ("chosen", "rejected"):
            with torch.no_grad(), model.disable_adapter():
                reference = log_probability(model, row["prompt"], row[key])
            margins.append(log_probability(model, row["prompt"], row[key]) - reference)
        losses.append(-nn.functional.logsigmoid(beta * (margins[0] - margins[1])))
    return torch.stack(losses).mean()


def gradients(trainer: Any) -> list[dict[str, Tensor]]:
    """Train, and return the gradients that the optimizer received at every step."""
    seen: list[dict[str, Tensor]] = []
    create = trainer.create_optimizer

    def creating(*args: Any, **kwargs: Any) -> Any:
        optimizer = create(*args, **kwargs)
        names = {id(p): n for n, p in trainer.model.named_parameters()}

        def note(stepped: Any, *_: Any) -> None:
            seen.append({names[id(p)]: p.grad.clone() for g in stepped.param_groups for p in g["params"]})

        optimizer.register_step_pre_hook(note)
        return optimizer

    trainer.create_optimizer = creating
    trainer.train()
    return seen


@pytest.mark.parametrize("build", [sft, plain])
@pytest.mark.parametrize("precompute", [False, True])
def test_an_alignment_step_has_the_gradient_of_the_formula_of_dpo(
    tmp_path: Path, build: Callable[..., Trainer], precompute: bool
) -> None:
    trainer = build(lora_model(), tmp_path)
    attach_lisa(trainer, lisa=LISA, alignment_trainer=dpo(tmp_path, precompute_ref_log_probs=precompute))
    order = trainer._rows.shuffled("alignment").take(0, 4)  # pyright: ignore
    (first, *_) = gradients(trainer)
    assert list(trainer.model.peft_config) == ["default"]  # pyright: ignore

    model = lora_model().train()
    # The average of the mean losses of two micro-batches of two rows.
    loss = sum(dpo_loss(model, [PAIRS[i] for i in part], 0.3) for part in (order[:2], order[2:])) / 2
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert first.keys() == expected.keys()
    assert max((first[n] - expected[n]).abs().max().item() for n in first) < 1e-6
    assert max(g.abs().max().item() for g in first.values()) > 1e-4


def test_with_dpo_fine_tuning_steps_are_unchanged_and_its_metrics_are_logged(tmp_path: Path) -> None:
    trainer = attach_lisa(sft(lora_model(), tmp_path), lisa=LISA, alignment_trainer=dpo(tmp_path))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [("alignment_loss" in row, "alignment/rewards/margins" in row) for row in rows] == [
        (True, True),
        (False, False),
    ] * 2
    assert rows[0]["alignment_loss"] == pytest.approx(math.log(2), abs=1e-5)  # before the first update
    # A plain host computes the same loss of the same rows.
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    ours = trainer.model.eval()
    theirs = sft(copy.deepcopy(ours), tmp_path)
    assert theirs.model.eval()(**{**batch, "use_cache": False}).loss.item() == pytest.approx(
        ours(**{**batch, "use_cache": False}).loss.item(), abs=1e-6
    )


def test_another_trainer_of_trl_can_compute_the_alignment_loss(tmp_path: Path) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
        for row in PAIRS
        for key in ("chosen", "rejected")
    ]

    def kto(model: Any) -> Trainer:
        return KTOTrainer(
            model,
            args=KTOConfig(**arguments(tmp_path), max_length=64),
            train_dataset=Dataset.from_list(rows),
            processing_class=TOKENIZER,
        )

    trainer = with_lisa(SFTTrainer)(
        lora_model(),
        SFTConfig(**arguments(tmp_path)),
        train_dataset=Dataset.from_list(TALK),
        processing_class=TOKENIZER,
        alignment_trainer=kto,
        lisa=LISA,
    )
    trainer.train()
    losses = [row["alignment_loss"] for row in trainer.state.log_history if "alignment_loss" in row]
    assert losses[0] == pytest.approx(0.5, abs=1e-5)  # the loss of KTO if the model equals its reference
    assert losses[1] != losses[0]


def test_dropout_is_off_in_alignment_steps_of_dpo_and_on_in_fine_tuning_steps(tmp_path: Path) -> None:
    trainer: Any = attach_lisa(sft(lora_model(dropout=0.1), tmp_path), lisa=LISA, alignment_trainer=dpo(tmp_path))
    dropout = next(
        m for m in trainer.model.modules() if isinstance(m, nn.Dropout) and "dropout" not in type(m).__name__
    )
    seen: list[tuple[int, float]] = []
    dropout.register_forward_pre_hook(lambda *_: seen.append((trainer.state.global_step, dropout.p)))
    trainer.train()
    assert {p for step, p in seen if step % 2} == {0.1}
    assert {p for step, p in seen if step % 2 == 0} == {0.0}
    assert dropout.p == 0.1


def test_a_trained_adapter_is_the_reference_if_it_is_precomputed(tmp_path: Path) -> None:
    model = trained_adapter()
    trainer = sft(model, tmp_path)
    attach_lisa(trainer, lisa=LISA, alignment_trainer=dpo(tmp_path, precompute_ref_log_probs=True))
    assert list(model.peft_config) == ["default"]
    trainer.train()
    first = next(row for row in trainer.state.log_history if "alignment_loss" in row)
    assert first["alignment_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_dpo_resumes_bit_for_bit(tmp_path: Path) -> None:
    def run(directory: Path, **changes: Any) -> Any:
        built = sft(lora_model(dropout=0.1), directory, **changes)
        return attach_lisa(built, lisa=LISA, alignment_trainer=dpo(directory))

    whole = run(tmp_path / "a", save_strategy="steps", save_steps=1)
    whole.train()
    expected = {n: p.clone() for n, p in whole.model.named_parameters() if p.requires_grad}
    for step in (1, 2, 3):
        resumed = run(tmp_path / "b")
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        found = {n: p for n, p in resumed.model.named_parameters() if p.requires_grad}
        assert all(torch.equal(found[n], weight) for n, weight in expected.items()), step


# ---- KL ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(2, 6))
def test_kl_equals_its_definition_summed_over_label_tokens(seed: int, batch: int, length: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randn(batch, length, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 7, (batch, length), generator=generator)
    labels[:, -1] = 1  # at least one label
    labels[torch.rand(batch, length, generator=generator) < 0.3] = -100
    total, count = 0.0, 0
    for row in range(batch):
        for at in range(length - 1):
            if labels[row, at + 1] != -100:
                p, q = theirs[row, at].softmax(-1), ours[row, at].softmax(-1)
                total += float((p * (p / q).log()).sum())
                count += 1
    if count:
        assert reference_kl(ours, theirs, labels).item() == pytest.approx(total / count, rel=1e-4, abs=1e-6)
        assert reference_kl(ours, theirs, labels, 10).item() == pytest.approx(total / 10, rel=1e-4, abs=1e-6)
    assert reference_kl(ours, ours, labels, 1).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("build", [sft, plain])
def test_kl_starts_at_0_and_is_the_same_for_any_accumulation(tmp_path: Path, build: Callable[..., Trainer]) -> None:
    finals = []
    for batch, accumulation in ((1, 4), (4, 1)):
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 6}
        changes |= {"optim": "sgd", "learning_rate": 20.0}  # Adam would amplify the rounding of the zero gradient
        trainer = build(lora_model(), tmp_path, **changes)
        rows: Any = Dataset.from_list(TALK) if build is sft else trainer.train_dataset
        attach_lisa(trainer, alignment_dataset=rows, lisa=replace(LISA, alignment_loss="kl"))
        trainer.train()
        losses = [row["alignment_loss"] for row in trainer.state.log_history if "alignment_loss" in row]
        assert losses[0] == pytest.approx(0, abs=1e-6)
        assert losses[2] > 1e-4
        finals.append({n: p for n, p in trainer.model.named_parameters() if p.requires_grad})  # pyright: ignore
    assert max((finals[0][n] - finals[1][n]).abs().max().item() for n in finals[0]) < 1e-5


def test_the_reference_has_no_dropout_and_frozen_weights_remain_frozen(tmp_path: Path) -> None:
    model = get_peft_model(pico_model(seed=3, attention_dropout=0.5), LoraConfig(r=4, target_modules=["q_proj"]))
    trainer: Any = attach_lisa(
        plain(model, tmp_path),
        alignment_dataset=[{"input_ids": [3, 10, 11], "labels": [3, 10, 11]}] * 4,
        lisa=replace(LISA, alignment_loss="kl"),
    )
    frozen = [p for n, p in model.named_parameters() if "lora_A" in n]
    for parameter in frozen:
        parameter.requires_grad_(False)
    loss = trainer._alignment_loss
    batch = PaddingCollator(0)([{"input_ids": [3, 10, 11, 12], "labels": [3, 10, 11, 12]}])
    model.train()
    first, second = (loss.compute_loss(trainer, model, dict(batch), None) for _ in range(2))
    assert first != second, "the model itself has dropout"
    model.eval()
    assert loss.compute_loss(trainer, model, dict(batch), None).item() == pytest.approx(0, abs=1e-7)
    assert not any(parameter.requires_grad for parameter in frozen)
    assert not model.training


# ---- unsupported settings ------------------------------------------------------------------------------------------


def test_kl_without_an_adapter_is_an_error(tmp_path: Path) -> None:
    trainer = plain(pico_model(), tmp_path)
    with pytest.raises(StayalignedError, match="this model has none"):
        attach_lisa(
            trainer,
            alignment_dataset=trainer.train_dataset,
            lisa=replace(LISA, alignment_loss="kl"),
        )


def trained_adapter() -> Any:
    model = lora_model(dropout=0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    return model


@pytest.mark.parametrize(
    ("model", "build", "lisa_settings", "named"),
    [
        (lora_model, lambda model: "no trainer", {}, "returned str, not a trainer"),
        (lora_model, lambda model: plain(lora_model(), Path("out")), {}, "built on another model"),
        (trained_adapter, dpo(Path("out")), {}, "keeps a copy of the adapter"),
        (lora_model, dpo(Path("out")), {"alignment_loss": "kl"}, "two losses for one phase"),
        (lora_model, dpo(Path("out")), {"alignment_steps": 0}, "alignment_steps=0 never uses it"),
        (lora_model, None, {"alignment_loss": "dpo"}, "takes its loss from a trainer"),
    ],
)
def test_an_unsuitable_alignment_trainer_is_an_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: Any,
    build: Any,
    lisa_settings: dict[str, Any],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = plain(model(), tmp_path)
    core: Any = trainer.model.get_base_model()  # pyright: ignore
    forward = core.forward
    with pytest.raises(StayalignedError, match=named) as caught:
        attach_lisa(trainer, alignment_trainer=build, lisa=replace(LISA, **lisa_settings))
    assert caught.value.hint
    # The trainer and its model are unchanged.
    assert type(trainer) is Trainer
    assert list(trainer.model.peft_config) == ["default"]  # pyright: ignore
    assert core.forward == forward
    assert {m.p for m in core.modules() if isinstance(m, nn.Dropout)} <= {0.1}


def test_an_alignment_trainer_with_sharded_weights_is_unsupported(tmp_path: Path) -> None:
    trainer = plain(lora_model(), tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(StayalignedError, match="another trainer shards"):
        attach_lisa(trainer, alignment_trainer=dpo(tmp_path), lisa=replace(LISA, rho=0.0))

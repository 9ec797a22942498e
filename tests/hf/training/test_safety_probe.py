"""Probes against their definition and without effect on training; the guard; dead adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from torch import Tensor
from transformers import SchedulerType, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from stayaligned import Guard, LisaSettings, StayalignedError, Watch, attach_lisa, attach_watch
from stayaligned.data.sources import read_examples
from stayaligned.hf.features import PaddingCollator, encode_example
from stayaligned.hf.training.dead_adapters import dead_adapters
from stayaligned.hf.training.finetuning import train
from stayaligned.hf.training.safety_probe import Probe
from stayaligned.testing import byte_tokenizer, pico_model

TOKENIZER = byte_tokenizer()
PROMPTS = ["deed one", "a longer deed two", "deed three"]


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    prompts, safe = tmp_path / "prompts.jsonl", tmp_path / "safe.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    safe.write_text(
        "".join(json.dumps({"prompt": prompt, "completion": "no" * (i + 1)}) + "\n" for i, prompt in enumerate(PROMPTS))
    )
    return {"prompts": str(prompts), "alignment_data": str(safe)}


def watch(sources: dict[str, str], **changes: Any) -> Watch:
    return Watch(
        **{**sources, "refusal": "no, never", "compliance": "sure", "every_steps": 2, "batch_size": 2, **changes}
    )


def trainer(directory: Path, *, lisa: bool = False, steps: int = 6, rate: float = 1e-2, **changes: Any) -> Trainer:
    rows = [{"input_ids": [3, *range(10 + i, 15 + i)], "labels": [3, *range(10 + i, 15 + i)]} for i in range(6)]
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "use_cpu": True,
        "learning_rate": rate,
        "per_device_train_batch_size": 2,
        "max_steps": steps,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
    }
    built = Trainer(
        pico_model(seed=3, attention_dropout=0.1),
        TrainingArguments(**{**settings, **changes}),
        train_dataset=rows,  # pyright: ignore
        data_collator=PaddingCollator(0),
        processing_class=TOKENIZER,
    )
    if lisa:
        attach_lisa(
            built,
            alignment_dataset=rows,
            lisa=LisaSettings(alignment_steps=1, finetuning_steps=2, proximal_warmup_ratio=0.0),
        )
    return built


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}  # pyright: ignore


def watched(trainer: Trainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if any(key.startswith("watch/") for key in row)]


def test_the_probes_equal_their_definition(sources: dict[str, str]) -> None:
    model = pico_model(seed=1)

    def log_probability(ids: list[int], start: int) -> float:
        steps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(steps[at - 1, ids[at]].item() for at in range(start, len(ids)))

    margins = []
    for prompt in PROMPTS:
        ids = TOKENIZER.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        refusal, compliance = (
            log_probability(ids + TOKENIZER(text, add_special_tokens=False)["input_ids"], len(ids))
            for text in ("no, never", "sure")
        )
        margins.append(refusal - compliance)
    nll, tokens = 0.0, 0
    for example in read_examples(sources["alignment_data"], origin="alignment"):
        row = encode_example(TOKENIZER, example, 1024)
        start = sum(label == -100 for label in row["labels"])
        nll, tokens = nll - log_probability(row["input_ids"], start), tokens + len(row["labels"]) - start
    found = Probe(watch(sources), TOKENIZER, max_length=1024).measure(model)
    assert found["refusal_margin"] == pytest.approx(sum(margins) / 3, rel=1e-5)
    assert found["refusing"] == sum(margin > 0 for margin in margins) / 3
    assert found["alignment_loss"] == pytest.approx(nll / tokens, rel=1e-5)


@pytest.mark.parametrize("lisa", [False, True])
def test_probes_do_not_change_training_and_are_logged_at_their_interval(
    tmp_path: Path, sources: dict[str, str], lisa: bool
) -> None:
    alone = trainer(tmp_path, lisa=lisa)
    alone.train()
    seen = attach_watch(trainer(tmp_path, lisa=lisa), watch(sources))
    seen.train()
    assert all(torch.equal(weight, weights(alone)[name]) for name, weight in weights(seen).items())
    assert [row["step"] for row in watched(seen)] == [0, 2, 4, 6]
    assert {"watch/refusal_margin", "watch/refusing", "watch/alignment_loss"} < set(watched(seen)[0])
    trained = [{k: v for k, v in row.items() if k == "loss"} for row in alone.state.log_history if "loss" in row]
    assert trained == [{k: v for k, v in row.items() if k == "loss"} for row in seen.state.log_history if "loss" in row]


@pytest.mark.parametrize("acts", [False, True])
def test_metrics_of_trl_remain_in_the_training_rows(
    tmp_path: Path, sources: dict[str, str], monkeypatch: pytest.MonkeyPatch, acts: bool
) -> None:
    from datasets import Dataset

    monkeypatch.setattr("stayaligned.hf.training.safety_probe._is_out_of_tolerance", lambda *_: acts)

    rows = [{"prompt": prompt, "completion": "yes"} for prompt in PROMPTS]
    built = SFTTrainer(
        pico_model(),
        SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=None,  # pyright: ignore
            max_steps=2,
            logging_steps=1 if acts else 2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=TOKENIZER,
    )
    guard = Guard(measure="alignment_loss", tolerance=0.0, action="rollback")
    attach_watch(built, watch(sources, every_steps=1, guard=guard)).train()
    (row,) = (row for row in built.state.log_history if "loss" in row)
    assert {"entropy", "num_tokens"} <= row.keys()
    assert not any("entropy" in row for row in watched(built))


# ---- guard ---------------------------------------------------------------------------------------------------------


def guarded(sources: dict[str, str], action: str, tolerance: float = 0.0) -> Watch:
    # Training on other rows raises the loss on the safe rows, so a tolerance of 0 is soon exceeded.
    return watch(sources, guard=Guard(measure="alignment_loss", tolerance=tolerance, action=action))  # pyright: ignore


def test_a_guard_within_tolerance_does_nothing(tmp_path: Path, sources: dict[str, str]) -> None:
    alone = trainer(tmp_path)
    alone.train()
    seen = attach_watch(trainer(tmp_path), guarded(sources, "stop", tolerance=1e9))
    seen.train()
    assert all(torch.equal(weight, weights(alone)[name]) for name, weight in weights(seen).items())


def breaching(sources: dict[str, str], directory: Path, action: str) -> Watch:
    """Return a watch whose tolerance the run first exceeds at its third probe."""
    free = attach_watch(trainer(directory, rate=1.0, steps=4), watch(sources))
    free.train()
    losses = [row["watch/alignment_loss"] for row in watched(free)]
    assert losses[2] > max(losses[:2]), "the alignment loss does not rise"
    return guarded(sources, action, max((max(losses[:2]) + losses[2]) / 2 - losses[0], 0.0))


def test_a_guard_stops_training(tmp_path: Path, sources: dict[str, str]) -> None:
    watched_by = breaching(sources, tmp_path, "stop")
    run = attach_watch(trainer(tmp_path, rate=1.0, steps=8), watched_by)
    run.train()
    assert run.state.global_step == 4
    assert [row["step"] for row in watched(run) if "watch/out_of_tolerance" in row] == [4]


def test_a_run_that_a_guard_ended_is_not_trained_again(tmp_path: Path, sources: dict[str, str]) -> None:
    watched_by = breaching(sources, tmp_path, "stop")
    run = attach_watch(trainer(tmp_path, rate=1.0, steps=8, save_strategy="steps", save_steps=100), watched_by)
    log = train(run)
    again = attach_watch(trainer(tmp_path, rate=1.0, steps=8, save_strategy="steps", save_steps=100), watched_by)
    assert [row for row in train(again) if "watch/stopped" in row] == [row for row in log if "watch/stopped" in row]
    assert again.state.global_step == 4
    assert all(torch.equal(weight, weights(run)[name]) for name, weight in weights(again).items())


def test_a_guard_restores_the_last_weights_within_tolerance(tmp_path: Path, sources: dict[str, str]) -> None:
    watched_by = breaching(sources, tmp_path, "rollback")
    run = attach_watch(trainer(tmp_path, rate=1.0, steps=8), watched_by)
    run.train()
    assert run.state.global_step == 4
    assert [row["watch/rolled_back_to"] for row in watched(run) if "watch/rolled_back_to" in row] == [2.0]
    early = trainer(tmp_path / "early", rate=1.0, steps=2)
    early.train()
    assert all(torch.equal(weight, weights(early)[name]) for name, weight in weights(run).items())


def test_a_guard_lowers_the_learning_rate_also_of_a_resumed_run(tmp_path: Path, sources: dict[str, str]) -> None:
    watched_by = breaching(sources, tmp_path, "lower_learning_rate")
    run = trainer(tmp_path / "run", rate=1.0, steps=8, save_strategy="steps", save_steps=1)
    attach_watch(run, watched_by).train()
    assert run.state.global_step == 8
    rates = [row["learning_rate"] for row in run.state.log_history if "learning_rate" in row]
    assert rates[:5] == [1.0] * 4 + [0.5]
    for step in (3, 4, 5, 7):
        again = attach_watch(trainer(tmp_path / "again", rate=1.0, steps=8), watched_by)
        again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert all(torch.equal(weight, weights(run)[name]) for name, weight in weights(again).items()), step


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_a_run_that_a_guard_ended_is_not_continued(tmp_path: Path, sources: dict[str, str], action: str) -> None:
    watched_by = breaching(sources, tmp_path, action)

    def again(directory: Path) -> Trainer:
        built = trainer(directory, rate=1.0, steps=8, save_strategy="steps", save_steps=2)
        return attach_watch(built, watched_by)

    run = again(tmp_path / "run")
    train(run)
    assert run.state.global_step == 4
    rerun = again(tmp_path / "run")
    train(rerun)
    assert rerun.state.global_step == 4
    assert all(torch.equal(weight, weights(run)[name]) for name, weight in weights(rerun).items())
    with pytest.raises(StayalignedError, match="the guard ended this training after step 4"):
        again(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_a_measure_of_nan_is_out_of_tolerance(tmp_path: Path, sources: dict[str, str]) -> None:
    class NanWeights(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                with torch.no_grad():
                    next(kwargs["model"].parameters()).fill_(float("nan"))

    run = attach_watch(trainer(tmp_path), guarded(sources, "rollback", tolerance=1e9))
    run.callback_handler.callbacks.insert(0, NanWeights())
    run.train()
    assert run.state.global_step == 4
    assert all(weight.isfinite().all() for weight in weights(run).values())


def test_settings_that_undo_a_guard_are_errors(tmp_path: Path, sources: dict[str, str]) -> None:
    built = trainer(tmp_path)
    built.args.load_best_model_at_end = True
    for action in ("rollback", "stop"):
        with pytest.raises(StayalignedError, match=f"load_best_model_at_end would undo the guard's {action}"):
            attach_watch(built, guarded(sources, action))
    plateau = trainer(tmp_path)
    plateau.args.lr_scheduler_type = SchedulerType.REDUCE_ON_PLATEAU
    attach_watch(plateau, guarded(sources, "lower_learning_rate"))
    with pytest.raises(StayalignedError, match="can't lower the learning rate of a ReduceLROnPlateau"):
        plateau.train()
    assert plateau.state.global_step == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompts": None, "alignment_data": None}, "nothing to measure"),
        ({"prompts": None, "guard": {"measure": "refusal_margin", "tolerance": 1}}, "needs `prompts`"),
        ({"alignment_data": None, "guard": {"measure": "alignment_loss", "tolerance": 1}}, "needs `alignment_data`"),
        ({"guard": {"measure": "alignment_loss", "tolerance": -1}}, "greater than or equal to 0"),
    ],
)
def test_an_impossible_watch_is_an_error(sources: dict[str, str], changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        watch(sources, **changes)


def test_a_trainer_without_a_tokenizer_is_an_error(tmp_path: Path, sources: dict[str, str]) -> None:
    built = trainer(tmp_path)
    built.processing_class = None
    with pytest.raises(StayalignedError, match="no tokenizer"):
        attach_watch(built, watch(sources))


# ---- dead adapters -------------------------------------------------------------------------------------------------


def test_lora_layers_without_a_gradient_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = get_peft_model(pico_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    attention = model.base_model.model.model.layers[1].self_attn
    plain = attention.v_proj.base_layer
    attention.v_proj.forward = plain.forward  # uses the weight, but not its LoRA
    rows = [{"input_ids": [3, 9, 10 + i], "labels": [3, 9, 10 + i]} for i in range(4)]
    built = Trainer(
        model,
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=2, disable_tqdm=True, save_strategy="no"),
        train_dataset=rows,  # pyright: ignore
        data_collator=PaddingCollator(0),
    )
    attach_lisa(built, alignment_dataset=rows * 2, lisa=LisaSettings(alignment_steps=1, finetuning_steps=1, rho=1.0))
    built.train()
    (message,) = (r.getMessage() for r in caplog.records if "no gradient" in r.getMessage())
    assert "in 1 layers v_proj and will learn nothing" in message
    model.zero_grad()
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert dead_adapters(model) == ["base_model.model.model.layers.1.self_attn.v_proj"]

"""Every name of `stayaligned.hf.hosts`, used on the installed versions; and the versions that are supported."""

from __future__ import annotations

import importlib.metadata
import inspect
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from packaging.requirements import Requirement
from transformers import Trainer, TrainingArguments

from stayaligned import StayalignedError
from stayaligned.core.host_versions import RANGES, require_versions
from stayaligned.hf import hosts
from stayaligned.testing import byte_tokenizer, pico_model
from support.host_limits import read_limits
from support.lisa import SAFE, plain_trainer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "hosts.md").read_text(encoding="utf-8")


def sft_trainer(directory: Path, rows: list[dict[str, Any]]) -> Any:
    from trl import SFTConfig, SFTTrainer

    settings = {"output_dir": str(directory), "use_cpu": True, "bf16": False, "report_to": "none", "max_length": 64}
    return SFTTrainer(
        pico_model(), SFTConfig(**settings), train_dataset=Dataset.from_list(rows), processing_class=byte_tokenizer()
    )


# ---- versions ------------------------------------------------------------------------------------------------------


def test_the_ranges_are_those_of_pyproject_and_of_the_page() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    declared = {
        each.name: str(each.specifier) for each in map(Requirement, stated) if each.name in RANGES and each.specifier
    }
    assert {name: set(spec.split(",")) for name, spec in declared.items()} == {
        name: set(spec.split(",")) for name, spec in RANGES.items()
    }
    assert all(f"`{name}{spec}`" in PAGE for name, spec in RANGES.items())


def test_a_host_outside_its_range_is_one_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"transformers": "4.57.6", "peft": "0.18.1", "accelerate": "1.11.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found[name])
    with pytest.raises(StayalignedError) as caught:
        require_versions("transformers", "peft", "accelerate")
    assert caught.value.message == f"transformers 4.57.6 is not supported ({RANGES['transformers']})"
    assert caught.value.hint == f"pip install 'transformers{RANGES['transformers']}'"
    monkeypatch.setitem(found, "transformers", "5.24.0.dev0")
    require_versions("transformers", "peft", "accelerate")


def test_a_trl_outside_its_range_is_one_error_with_the_command_and_the_other_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.24.0")
    with pytest.raises(StayalignedError) as caught:
        hosts.require_trl("SFTTrainer", otherwise="train with transformers.Trainer")
    assert caught.value.message == f"trl 0.24.0 is not supported ({RANGES['trl']})"
    assert caught.value.hint == f"pip install 'trl{RANGES['trl']}'; or train with transformers.Trainer"


def test_each_limit_names_tests_that_exist_and_is_on_the_page() -> None:
    for limit in read_limits():
        assert f"{limit.needs.name} {next(iter(limit.needs.specifier)).version} | {limit.why.lower()} |" in PAGE.lower()
        for test in limit.tests:
            path, _, name = test.partition("::")
            assert not name or f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(encoding="utf-8")


# ---- transformers --------------------------------------------------------------------------------------------------


def test_loading_rules_stack_the_experts_of_a_mixture() -> None:
    model = pico_model("mixtral")
    rules, known = hosts.LoadingRules(model), model.state_dict()
    names = [f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight" for expert in (0, 1, 10)]
    assert sorted(names, key=hosts.loading_order) == names
    targets = {rules.rename(name, known) for name in names}
    ((target, pattern),) = targets
    assert target == "model.layers.0.mlp.experts.down_proj"
    assert pattern is not None
    parts = [(name, pattern, torch.full((2, 3), float(number))) for number, name in enumerate(names)]
    made = hosts.convert_stored(rules.by_pattern[pattern], target, parts, model)[target]
    stacked = made[0] if isinstance(made, list) else made
    assert torch.equal(stacked[:, 0, 0], torch.arange(3.0))
    assert rules.rename("lm_head.weight", known) == ("lm_head.weight", None)


def test_tied_weights_are_named() -> None:
    assert hosts.tied_weights(pico_model(tie_word_embeddings=True)) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not hosts.tied_weights(pico_model(tie_word_embeddings=False))


def test_only_attention_can_go_on_with_some_rows() -> None:
    assert hosts.cache_has_only_attention(pico_model("llama"))
    assert not hosts.cache_has_only_attention(pico_model("mamba"))


def test_trainer_has_the_methods_that_lisa_overrides() -> None:
    for name in hosts.TRAINER_HOOKS:
        assert callable(vars(Trainer)[name])
    assert list(inspect.signature(Trainer._save_checkpoint).parameters) == ["self", "model", "trial"]
    assert list(inspect.signature(Trainer._load_best_model).parameters) == ["self"]


@pytest.mark.parametrize(("is_mean", "share"), [(True, 1.0), (False, 0.5)])
def test_a_trainer_is_told_whether_its_loss_is_a_mean_over_the_step(
    is_mean: bool, share: float, tmp_path: Path
) -> None:
    class Constant(Trainer):
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            return next(self.model.parameters()).sum() * 0 + 3.0  # pyright: ignore

    trainer: Any = plain_trainer(pico_model(), tmp_path, gradient_accumulation_steps=2)
    trainer.__class__ = Constant
    trainer.current_gradient_accumulation_steps = 2
    before = hosts.is_loss_scaled(trainer, 5), hosts.is_loss_scaled(trainer, None)
    batch = trainer.data_collator(SAFE[:1])
    with hosts.loss_scaled(trainer, is_mean):
        assert trainer.training_step(trainer.model, batch, torch.tensor(5)).item() == 3.0 * share
    assert before == (True, False) == (hosts.is_loss_scaled(trainer, 5), hosts.is_loss_scaled(trainer, None))


def test_models_that_pass_the_token_count_on_do_not_ignore_it() -> None:
    assert not hosts.ignores_token_count(pico_model("llama"))
    old = not Requirement("transformers>=5.18").specifier.contains(importlib.metadata.version("transformers"))
    assert hosts.ignores_token_count(pico_model("mamba")) is old


def test_a_checkpoint_its_directory_and_its_columns(tmp_path: Path) -> None:
    trainer: Any = plain_trainer(pico_model(), tmp_path, save_strategy="no")
    trainer.state.global_step = 7
    directory = hosts.checkpoint_directory(trainer, None)
    assert directory == tmp_path / "checkpoint-7"
    trainer.save_model(str(directory))
    weight = next(iter(trainer.model.parameters()))
    stored = weight.detach().clone()
    weight.data.zero_()
    hosts.load_checkpoint_weights(trainer, directory)
    assert torch.equal(weight, stored)
    assert hosts.innermost_model(trainer) is trainer.model
    rows = [{**row, "note": 1} for row in SAFE[:2]]
    seen: list[Any] = []
    trainer.data_collator = seen.append
    hosts.collator_of_known_columns(trainer)(rows)
    hosts.keep_column(trainer, "note")
    hosts.collator_of_known_columns(trainer)(rows)
    assert ["note" in batch[0] for batch in seen] == [False, True]


def test_both_ways_of_the_setting_of_a_trainer_keep_its_fields() -> None:
    assert {"train_sampling_strategy", "average_tokens_across_devices"} <= vars(TrainingArguments()).keys()


# ---- PEFT ----------------------------------------------------------------------------------------------------------


def test_peft_rejects_what_it_says_it_rejects() -> None:
    model = pico_model("mamba")
    assert hosts.is_rejected_target(model, "out_proj")
    assert not hosts.is_rejected_target(model, "in_proj")


def test_peft_knows_the_layouts_of_experts_from_0_19_on() -> None:
    new = Requirement("peft>=0.19").specifier.contains(importlib.metadata.version("peft"))
    assert hosts.knows_expert_layouts() is new


# ---- TRL -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("completion_only", [True, False, None])
def test_an_sft_trainer_prepares_rows(completion_only: bool | None, tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "no"}] * 2
    trainer = sft_trainer(tmp_path, rows)
    assert hosts.trl_class(trainer) == "SFTTrainer" == hosts.sft_trainer_class().__name__  # pyright: ignore
    found = hosts.SftRows(trainer)
    assert (found.has_images, found.reads_images, found.are_prepared, found.formatting_func) == (False,) * 3 + (None,)
    prepared = found.prepare(Dataset.from_list(rows), None, completion_only=completion_only)
    assert (prepared[0]["labels"][0] == -100) is (completion_only is not False)
    assert trainer.completion_only_loss is True
    assert found.tokenizer.decode(prepared[0]["input_ids"]).startswith("qno")


def test_rows_that_are_tokens_already_are_not_prepared() -> None:
    from trl import SFTTrainer

    plain = hosts.without_preparation(SFTTrainer)
    rows = [{"input_ids": [1]}]
    assert plain._prepare_dataset(plain.__new__(plain), rows, None, None, "train") is rows  # pyright: ignore

"""Settings of the hosts are checked by name and type, as the imported classes have them."""

import dataclasses
from typing import Any

import pytest

from stayaligned import Alignment
from stayaligned.experiments.config.host_settings import Host, read_setting, setting_types


@pytest.mark.parametrize("host", ["transformers", "sft", "lora"])
def test_the_names_in_the_source_are_the_fields_of_the_class(host: Host) -> None:
    import peft
    import transformers
    import trl

    classes = {"transformers": transformers.TrainingArguments, "sft": trl.SFTConfig, "lora": peft.LoraConfig}
    fields = [field for field in dataclasses.fields(classes[host]) if field.init]
    assert set(setting_types(host)) == {field.name for field in fields}
    for field in fields:  # every default is of the type that was read
        if field.default is not dataclasses.MISSING and not isinstance(field.default, float | int) and field.default:
            read_setting(host, field.name, getattr(field.default, "value", field.default))
        elif isinstance(field.default, float | int):
            read_setting(host, field.name, field.default)


@pytest.mark.parametrize(
    ("host", "name", "value", "expected"),
    [
        ("transformers", "max_steps", "abc", "expected an integer, found text 'abc'"),
        ("transformers", "max_steps", 5.5, "expected an integer, found 5.5"),
        ("transformers", "max_steps", True, "expected an integer"),
        ("transformers", "learning_rate", "fast", "expected a number, found text 'fast'"),
        ("transformers", "learning_rate", "1e-5", "expected a number, found text '1e-5'"),
        ("transformers", "learning_rate", float("nan"), "expected a number"),
        ("transformers", "learning_rate", -1e-4, "-0.0001 is not 0 or more"),
        ("transformers", "adam_beta1", 9, "9 is not between 0 and 1"),
        ("transformers", "per_device_train_batch_size", 0, "0 is not 1 or more"),
        ("transformers", "save_strategy", "epochs", "Did you mean 'epoch'?"),
        ("transformers", "save_strategy", False, "expected one of no, steps, epoch, best"),
        ("transformers", "lr_scheduler_type", "cosin", "Did you mean 'cosine'?"),
        ("transformers", "optim", "adam_torch", "Did you mean 'adamw_torch'?"),
        ("transformers", "fp16", "maybe", "expected true or false"),
        ("transformers", "label_names", "labels", "expected a list of text or null"),
        ("transformers", "report_to", 5, "expected null or text or a list of text"),
        ("sft", "packing", 1, "expected true or false"),
        ("lora", "r", "eight", "expected an integer, found text 'eight'"),
        ("lora", "r", 0, "0 is not 1 or more"),
        ("lora", "lora_dropout", 2, "2 is not between 0 and 1"),
        ("lora", "target_modules", [1], "expected a list of text or text or null"),
        ("lora", "modules_to_save", "lm_head", "expected a list of text or null"),
        ("lora", "bias", "no", "Did you mean 'none'?"),
        ("lora", "task_type", "CAUSAL", "Did you mean 'CAUSAL_LM'?"),
        ("lora", "init_lora_weights", "pisa", "expected"),
    ],
)
def test_a_value_of_another_type_is_one_error(host: Host, name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as error:
        read_setting(host, name, value)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("host", "name", "value", "read"),
    [
        ("transformers", "save_strategy", "no", "no"),
        ("transformers", "fp16", "no", False),
        ("transformers", "torch_compile", "Off", False),
        ("transformers", "bf16", "yes", True),
        ("transformers", "learning_rate", 1, 1),
        ("transformers", "warmup_steps", 0.1, 0.1),
        ("transformers", "report_to", ["tensorboard"], ["tensorboard"]),
        ("transformers", "deepspeed", {"a": 1}, {"a": 1}),
        ("transformers", "fsdp", True, True),
        ("sft", "max_length", None, None),
        ("lora", "lora_alpha", 4.5, 4.5),
        ("lora", "target_modules", "all-linear", "all-linear"),
        ("lora", "init_lora_weights", "pissa_niter_4", "pissa_niter_4"),
        ("lora", "init_lora_weights", "no", False),
        ("lora", "layer_replication", [[0, 4], [2, 5]], [[0, 4], [2, 5]]),
        ("lora", "eva_config", {"rho": 2}, {"rho": 2}),
    ],
)
def test_a_value_that_the_host_takes_is_read(host: Host, name: str, value: Any, read: Any) -> None:
    found = read_setting(host, name, value)
    assert found == read
    assert type(found) is type(read)


def test_every_wrong_value_in_a_configuration_is_reported_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"\w") as error:
        Alignment.model_validate(
            {"base_model": "b", "data": "d", "training": {"max_steps": "abc", "fp17": 1}, "lora": {"r": "eight"}}
        )
    for expected in ("training.max_steps: expected an integer", "training.fp17: TrainingArguments has no", "lora.r: "):
        assert expected in str(error.value)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"training": {"num_train_epochs": 0}}, "num_train_epochs: 0 trains nothing"),
        ({"training": {"num_train_epochs": -1, "max_steps": -1}}, "num_train_epochs: -1 trains nothing"),
        ({"training": {"max_steps": 0}}, "max_steps: 0 trains nothing"),
        ({"lora": {"alora_invocation_tokens": [4]}}, "alora_invocation_tokens: such a LoRA can't be merged"),
    ],
)
def test_an_alignment_that_trains_nothing_or_can_not_be_merged_is_refused(settings: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Alignment.model_validate({"base_model": "b", "data": "d", **settings})

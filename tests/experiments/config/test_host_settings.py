"""The names read from source files are those of the imported classes."""

import dataclasses

import pytest

from stayaligned.experiments.config.host_settings import Host, setting_names


@pytest.mark.parametrize("host", ["transformers", "sft", "lora"])
def test_the_names_in_the_source_are_the_fields_of_the_class(host: Host) -> None:
    import peft
    import transformers
    import trl

    classes = {"transformers": transformers.TrainingArguments, "sft": trl.SFTConfig, "lora": peft.LoraConfig}
    assert setting_names(host) == {f.name for f in dataclasses.fields(classes[host]) if f.init}

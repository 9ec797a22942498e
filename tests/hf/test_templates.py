"""A fine-tuned model is used with the template that it was trained with, or refused."""

import json
from pathlib import Path

import pytest
from peft import PeftModel

from stayaligned.core.errors import StayalignedError
from stayaligned.hf.models import load_finetuned, load_model
from stayaligned.hf.templates import TEMPLATE_FILE, refuse_other_template, write_template
from stayaligned.testing import byte_tokenizer, write_pico_adapter, write_pico_checkpoint

OTHER = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def other():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = OTHER
    return tokenizer


def refused(directory: Path, tokenizer) -> str:
    with pytest.raises(StayalignedError, match="another chat template") as caught:
        refuse_other_template(directory, tokenizer)
    return str(caught.value)


def test_a_directory_without_a_recorded_template_is_accepted(tmp_path: Path) -> None:
    refuse_other_template(tmp_path, byte_tokenizer())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    refuse_other_template(tmp_path, byte_tokenizer())


def test_the_template_file_is_compared_and_peft_ignores_it(tmp_path: Path) -> None:
    checkpoint = write_pico_checkpoint(tmp_path / "model")
    adapter = write_pico_adapter(tmp_path / "adapter", checkpoint)
    write_template(byte_tokenizer(), adapter)
    refuse_other_template(adapter, byte_tokenizer())
    assert TEMPLATE_FILE in refused(adapter, other())
    assert isinstance(PeftModel.from_pretrained(load_model(checkpoint), adapter), PeftModel)
    load_finetuned(checkpoint, adapter)


def test_the_template_that_a_trainer_saves_is_compared(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    refuse_other_template(tmp_path, byte_tokenizer())
    refused(tmp_path, other())


@pytest.mark.parametrize(
    "template", [OTHER, [{"name": "tool", "template": "x"}, {"name": "default", "template": OTHER}]]
)
def test_a_template_within_the_tokenizers_configuration_is_compared(tmp_path: Path, template: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    refuse_other_template(tmp_path, other())
    assert "tokenizer_config.json" in refused(tmp_path, byte_tokenizer())


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"template_hash": 3}'])
def test_a_damaged_file_is_an_error_with_its_name(tmp_path: Path, content: str) -> None:
    (tmp_path / TEMPLATE_FILE).write_text(content)
    with pytest.raises(StayalignedError, match=TEMPLATE_FILE):
        refuse_other_template(tmp_path, byte_tokenizer())

"""Whether a fine-tune is asked with the chat template that it was trained with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import write_text
from stayaligned.hf.features import template_hash
from stayaligned.weights.checkpoints import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FILE = "stayaligned_template.json"
"""Beside the weights that training wrote; patches copy it as they copy a tokenizer."""


def write_template(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Say beside trained weights which template they were trained with.

    Raises:
        StayalignedError: if the tokenizer has none.
    """
    write_text(directory / TEMPLATE_FILE, json.dumps({"template_hash": template_hash(tokenizer)}) + "\n")


def refuse_other_template(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose template is not the one that an adapter or model says it was trained with.

    It says so in our own file, or by the template that transformers' Trainer saves with its tokenizer; one that says
    nothing is accepted.

    Raises:
        StayalignedError: if the two differ, or a file is damaged.
    """
    for name, trained in _said(directory):
        asked = template_hash(tokenizer)
        if trained != asked:
            raise StayalignedError(
                f"{directory / name}: trained with another chat template (SHA-256 {trained[:12]}…) than the one that "
                f"would ask it ({asked[:12]}…): its answers would say little about it",
                hint="Name the model with the template of the training as `model:`; or set `other_template: true`.",
            )
        return


def _said(directory: Path) -> list[tuple[str, str]]:
    """(file, hash) of each file that says something, our own first."""
    found: list[tuple[str, str]] = []
    hint = "Restore the file, or remove it."
    if (directory / TEMPLATE_FILE).is_file():
        said = read_json_object(directory / TEMPLATE_FILE, hint=hint).get("template_hash")
        if not isinstance(said, str):
            raise StayalignedError(f"{directory / TEMPLATE_FILE}: expected a text `template_hash`", hint=hint)
        found.append((TEMPLATE_FILE, said))
    texts: list[tuple[str, Any]] = []
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        try:
            texts.append((jinja.name, jinja.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            raise StayalignedError(f"{jinja}: not UTF-8 text", hint=hint) from None
    if (directory / "tokenizer_config.json").is_file():
        own: Any = read_json_object(directory / "tokenizer_config.json", hint=hint).get("chat_template")
        if isinstance(own, list):  # several by name, of which `default` is used
            named = {each.get("name"): each.get("template") for each in own if isinstance(each, dict)}
            own = named.get("default")
        texts.append(("tokenizer_config.json", own))
    return found + [(name, hashlib.sha256(text.encode()).hexdigest()) for name, text in texts if isinstance(text, str)]

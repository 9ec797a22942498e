"""Check that a fine-tuned model is used with the chat template that it was trained with."""

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
"""File beside trained weights that holds the hash of their chat template; patches copy it like a tokenizer."""


def write_template(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the hash of the chat template beside trained weights.

    Raises:
        StayalignedError: if the tokenizer has no chat template.
    """
    write_text(directory / TEMPLATE_FILE, json.dumps({"template_hash": template_hash(tokenizer)}) + "\n")


def refuse_other_template(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose chat template differs from the one that an adapter or model was trained with.

    That template is recorded in `stayaligned_template.json`, or saved with the tokenizer by transformers' Trainer. A
    directory without a record is accepted.

    Raises:
        StayalignedError: if the templates differ, or a file is damaged.
    """
    for name, trained in _recorded_hashes(directory):
        used = template_hash(tokenizer)
        if trained != used:
            raise StayalignedError(
                f"{directory / name}: trained with another chat template (SHA-256 {trained[:12]}…) than the "
                f"tokenizer's ({used[:12]}…): its completions would not be representative",
                hint="Set `model:` to the model with the template of the training, or set `other_template: true`.",
            )
        return


def _recorded_hashes(directory: Path) -> list[tuple[str, str]]:
    """Return (file name, hash) of each file that records a template, `stayaligned_template.json` first."""
    found: list[tuple[str, str]] = []
    hint = "Restore the file, or remove it."
    if (directory / TEMPLATE_FILE).is_file():
        recorded = read_json_object(directory / TEMPLATE_FILE, hint=hint).get("template_hash")
        if not isinstance(recorded, str):
            raise StayalignedError(f"{directory / TEMPLATE_FILE}: `template_hash` must be a string", hint=hint)
        found.append((TEMPLATE_FILE, recorded))
    texts: list[tuple[str, Any]] = []
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        try:
            texts.append((jinja.name, jinja.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            raise StayalignedError(f"{jinja}: not UTF-8 text", hint=hint) from None
    if (directory / "tokenizer_config.json").is_file():
        own: Any = read_json_object(directory / "tokenizer_config.json", hint=hint).get("chat_template")
        if isinstance(own, list):  # several templates by name; `default` is the one used
            named = {each.get("name"): each.get("template") for each in own if isinstance(each, dict)}
            own = named.get("default")
        texts.append(("tokenizer_config.json", own))
    return found + [(name, hashlib.sha256(text.encode()).hexdigest()) for name, text in texts if isinstance(text, str)]

"""Check that a fine-tuned model is used with the chat template that it was trained with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import write_text
from stayaligned.hf.features import template_hash
from stayaligned.hf.rendering import bind_template, unbound
from stayaligned.weights.checkpoints import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FILE = "stayaligned_template.json"
"""File beside trained weights that holds the hash of their chat template; patches copy it like a tokenizer."""


def write_template(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the hash of the chat template, with its arguments and date, beside trained weights.

    Raises:
        StayalignedError: as `stayaligned.hf.rendering.bind_template`.
    """
    own = hash_of(unbound(bind_template(tokenizer)))
    record = {"template_hash": template_hash(tokenizer), "template_text_hash": own}
    write_text(directory / TEMPLATE_FILE, json.dumps(record) + "\n")


def refuse_other_template(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose chat template differs from the one that an adapter or model was trained with.

    That template is recorded in `stayaligned_template.json` with its arguments and its date, or saved alone with the
    tokenizer by transformers' Trainer. A directory without a record is accepted.

    Raises:
        StayalignedError: if the templates, their arguments or dates differ, or a file is damaged.
    """
    used = bind_template(tokenizer)
    hashes = {hash_of(used), hash_of(unbound(used))}
    for name, trained, bound in _recorded(directory):
        settings = "other arguments or another date of the chat template"
        if bound is not None and bound != hash_of(used) and trained == hash_of(unbound(used)):
            raise StayalignedError(
                f"{directory / name}: trained with {settings} than those that are used now: its completions would not "
                "be representative",
                hint="Set `chat_template:` as for the training, or set `other_template: true`.",
            )
        if trained not in hashes:
            raise StayalignedError(
                f"{directory / name}: trained with another chat template (SHA-256 {trained[:12]}…) than the "
                f"tokenizer's ({hash_of(unbound(used))[:12]}…): its completions would not be representative",
                hint="Set `model:` to the model with the template of the training, or set `other_template: true`.",
            )
        return


def hash_of(template: str) -> str:
    """Return the SHA-256 of a chat template's text."""
    return hashlib.sha256(template.encode()).hexdigest()


def _recorded(directory: Path) -> list[tuple[str, str, str | None]]:
    """Return file name, hash of the text, and hash with the settings of each record, ours first.

    The last is None if the file does not record settings.
    """
    found: list[tuple[str, str, str | None]] = []
    hint = "Restore the file, or remove it."
    if (directory / TEMPLATE_FILE).is_file():
        content = read_json_object(directory / TEMPLATE_FILE, hint=hint)
        bound, own = content.get("template_hash"), content.get("template_text_hash")
        if not isinstance(bound, str) or not isinstance(own, str | None):
            raise StayalignedError(f"{directory / TEMPLATE_FILE}: `template_hash` must be a string", hint=hint)
        found.append((TEMPLATE_FILE, bound, None) if own is None else (TEMPLATE_FILE, own, bound))
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
    for name, text in texts:
        if isinstance(text, str):
            # A Trainer saves the tokenizer that it was given, with what is written in front of its template.
            found.append((name, hash_of(unbound(text)), None if unbound(text) == text else hash_of(text)))
    return found

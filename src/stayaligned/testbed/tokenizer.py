"""The testbed's word-level tokenizers, with a chat template for system, user and assistant turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stayaligned.testbed import language

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, END, SEPARATOR = "<|pad|>", "<|unknown|>", "<|end|>", "<|separator|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
MAXIMUM_LENGTH = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Return the language models' tokenizer: one token per word between spaces, one token for all unknown words."""
    return _tokenizer(separator=None)


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """Return the judge's tokenizer: `tokenizer(request, answer)` separates the two texts and marks their segments."""
    return _tokenizer(separator=SEPARATOR)


def _tokenizer(separator: str | None) -> PreTrainedTokenizerFast:
    from stayaligned.hf.tiny_models import new_word_tokenizer

    return new_word_tokenizer(
        [PAD, UNKNOWN, END, SEPARATOR, *ROLES.values()],
        language.vocabulary(),
        pad=PAD,
        unknown=UNKNOWN,
        end=END,
        separator=separator,
        chat_template=CHAT_TEMPLATE,
        max_length=MAXIMUM_LENGTH,
    )

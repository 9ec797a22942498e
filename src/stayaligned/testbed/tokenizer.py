"""The testbed's own word-level tokenizers, with a chat template for system, user and assistant turns."""

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
    """The tokenizer of the language models: words between spaces, one token each; unknown words share one token."""
    return _tokenizer(["input_ids", "attention_mask"])


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """The judge's tokenizer: `tokenizer(request, answer)` joins the two with a separator and marks their segments."""
    from tokenizers import processors

    tokenizer = _tokenizer(["input_ids", "token_type_ids", "attention_mask"])
    separator = tokenizer.convert_tokens_to_ids(SEPARATOR)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A {SEPARATOR}",
        pair=f"{SEPARATOR} $A {SEPARATOR} $B:1 {SEPARATOR}:1",
        special_tokens=[(SEPARATOR, separator)],
    )
    return tokenizer


def _tokenizer(inputs: list[str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, UNKNOWN, END, SEPARATOR, *ROLES.values()]
    vocabulary = {token: index for index, token in enumerate([*special, *language.vocabulary()])}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[SEPARATOR, *ROLES.values()],
        model_input_names=inputs,
        model_max_length=MAXIMUM_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )

"""Small models with random weights and word-level tokenizers, built in memory. Nothing is downloaded.

Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def new_config(architecture: str, **settings: Any) -> Any:
    """Return the configuration of an architecture by transformers' name of it ("llama", "bert")."""
    from transformers import AutoConfig

    return AutoConfig.for_model(architecture, **settings)


def new_language_model(config: Any, *, seed: int) -> PreTrainedModel:
    """Return a causal language model in fp32 on the CPU; `seed` alone decides its weights."""
    from transformers import AutoModelForCausalLM

    return _new_model(AutoModelForCausalLM, config, seed)


def new_classifier(config: Any, *, seed: int) -> PreTrainedModel:
    """Return a sequence classifier in fp32 on the CPU; `seed` alone decides its weights."""
    from transformers import AutoModelForSequenceClassification

    return _new_model(AutoModelForSequenceClassification, config, seed)


def _new_model(kind: Any, config: Any, seed: int) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind.from_config(config, dtype=torch.float32)


def greedy_generation_config(**token_ids: int | None) -> Any:
    """Return a generation configuration for greedy decoding with these special tokens."""
    from transformers import GenerationConfig

    return GenerationConfig(do_sample=False, **token_ids)


def new_word_tokenizer(
    special: Sequence[str],
    words: Sequence[str],
    *,
    pad: str,
    unknown: str,
    end: str,
    separator: str | None = None,
    chat_template: str,
    max_length: int,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word between spaces; all unknown words share one token.

    Args:
        special: the special tokens, which have the first ids.
        words: the vocabulary, which has the ids after them.
        pad: the special token for padding.
        unknown: the special token for unknown words.
        end: the special token at the end of a turn.
        separator: if given, `tokenizer(a, b)` puts this special token around both texts and marks their segments.
        chat_template: Jinja template of a conversation.
        max_length: largest number of tokens of a text.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*special, *words])}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(special))
    segments = ["token_type_ids"] if separator is not None else []
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        unk_token=unknown,
        eos_token=end,
        additional_special_tokens=[token for token in special if token not in {pad, unknown, end}],
        model_input_names=["input_ids", *segments, "attention_mask"],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )
    if separator is not None:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{separator} $A {separator}",
            pair=f"{separator} $A {separator} $B:1 {separator}:1",
            special_tokens=[(separator, vocabulary[separator])],
        )
    return tokenizer

"""Nats per token of completions, against a loop over one completion and one token at a time."""

import math

import pytest

from stayaligned.core.records import Completion, Message
from stayaligned.hf.features import encode_prompt
from stayaligned.hf.generation.perplexity import answer_nats
from stayaligned.testing import byte_tokenizer, pico_model


def rows():
    texts = ["positive", "", "b" * 40, "é漢\n", " ", "abc def", "x" * 7]
    return [
        Completion(id=str(n), prompt_set="task", prompt=(Message(role="user", content="q" * (3 + n * 5)),), text=text)
        for n, text in enumerate(texts)
    ]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba"])
def test_nats_equal_a_loop_over_tokens_whatever_the_padding(architecture):
    import torch

    model, tokenizer = pico_model(architecture), byte_tokenizer()
    found = answer_nats(model, tokenizer, rows(), batch_size=4)
    alone = answer_nats(model, tokenizer, rows(), batch_size=1)
    for row, nats, other in zip(rows(), found, alone, strict=True):
        ids = encode_prompt(tokenizer, row.prompt)
        losses = []
        for token in tokenizer(row.text)["input_ids"]:
            with torch.no_grad():
                losses.append(-float(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token]))
            ids = [*ids, token]
        if not losses:
            assert nats is other is None
        else:
            assert nats == pytest.approx(math.fsum(losses) / len(losses), abs=1e-4)
            assert nats == pytest.approx(other, abs=1e-5)


def test_tokens_beyond_the_context_are_ignored():
    tokenizer, model = byte_tokenizer(), pico_model(max_position_embeddings=64)
    prompt = (Message(role="user", content="q" * 20),)
    room = 64 - len(encode_prompt(tokenizer, prompt))
    whole, longer = (Completion(id="1", prompt_set="task", prompt=prompt, text="b" * n) for n in (room, room + 50))
    full = Completion(id="2", prompt_set="task", prompt=(Message(role="user", content="q" * 90),), text="b")
    one, two, three = answer_nats(model, tokenizer, [whole, longer, full])
    assert one == pytest.approx(two, abs=1e-6)
    assert three is None


def test_the_final_answer_is_measured_after_its_thoughts():
    tokenizer, model = byte_tokenizer(), pico_model()
    asked = (Message(role="user", content="q"),)
    thoughtful, cut = (
        Completion(id=text, prompt_set="task", prompt=asked, text=text) for text in ("<think>hm</think>so", "<think>hm")
    )
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>hm</think>{% endif %}"
    plain = Completion(id="1", prompt_set="task", prompt=asked, text="so")
    (expected,) = answer_nats(model, tokenizer, [plain])
    tokenizer.chat_template = byte_tokenizer().chat_template
    assert answer_nats(model, tokenizer, [thoughtful, cut]) == [pytest.approx(expected, abs=1e-5), None]
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    assert answer_nats(model, tokenizer, [thoughtful]) == [pytest.approx(expected, abs=1e-5)]

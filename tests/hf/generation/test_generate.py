"""Completions depend on their prompt alone: not on batch, order, the checkpoint's sampling settings, or markers."""

import random
from collections import Counter

import pytest
import torch
from pydantic import ValidationError
from transformers import GenerationConfig

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message
from stayaligned.core.settings import Generation
from stayaligned.core.thoughts import split_thoughts
from stayaligned.hf.features import encode_prompt
from stayaligned.hf.generation import batching
from stayaligned.hf.generation.generate import _cut_at_end, complete_each, generate
from stayaligned.hf.models import attach_lora
from stayaligned.testing import byte_tokenizer, pico_model
from support.generation import greedy_reference, prompts, sharp

ARCHITECTURES = ["llama", "qwen2", "mistral", "gpt2"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batched_completions_equal_one_at_a_time_without_a_cache(architecture):
    model, tokenizer = sharp(architecture), byte_tokenizer()
    found = generate(model, tokenizer, prompts(), Generation(max_new_tokens=12))
    assert found == [greedy_reference(model, tokenizer, prompt, 12) for prompt in prompts()]
    assert len({answer.tokens for answer in found}) > 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("budget", [1, 1 << 18, 1 << 20, 1 << 30])
@pytest.mark.parametrize("architecture", ["llama", "mistral"])  # one cache of full attention, one of windows
def test_completions_do_not_depend_on_the_memory_or_the_order(architecture, budget, temperature):
    model, tokenizer, asked = sharp(architecture), byte_tokenizer(), prompts()
    settings = Generation(max_new_tokens=12, temperature=temperature, seed=3)
    reference = generate(model, tokenizer, asked, settings)
    order = list(range(len(asked)))
    random.Random(1).shuffle(order)
    with pytest.MonkeyPatch.context() as patch:
        real = batching.rows_in_memory
        patch.setattr(batching, "rows_in_memory", lambda host, _budget, *rest: real(host, budget, *rest))
        sizes = watch(model)
        shuffled = generate(model, tokenizer, [asked[i] for i in order], settings)
    assert shuffled == [reference[i] for i in order]
    assert (max(rows for rows, _ in sizes[3:]) == 1) == (budget == 1)


def watch(model):
    """Return a list that receives (rows, width) of every forward pass from now on."""
    sizes = []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return sizes


def sharp_with_two_ends(asked):
    """A model with a second end token, so that many texts end before the limit; and its texts."""
    model, tokenizer = sharp(), byte_tokenizer()
    free = generate(model, tokenizer, asked, Generation(max_new_tokens=20))
    frequent = Counter(token for each in free for token in each.tokens).most_common()[5][0]
    model.generation_config.eos_token_id = [1, frequent]
    return model, generate(model, tokenizer, asked, Generation(max_new_tokens=20))


def distinct_prompts(n):
    return list({prompt[0].content: prompt for prompt in prompts(n)}.values())


def test_the_budget_bounds_the_rows_of_a_batch_and_long_prompts_come_first():
    asked = distinct_prompts(60)
    model, reference = sharp_with_two_ends(asked)
    sizes = watch(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "rows_in_memory", lambda *_: 9)
        assert generate(model, byte_tokenizer(), asked, Generation(max_new_tokens=20)) == reference
    sizes = sizes[3:]  # after the probe for padding
    prefills = [(rows, width) for rows, width in sizes if width > 1]
    assert sum(rows for rows, _ in prefills) == len(asked)
    assert [width for _, width in prefills] == sorted((width for _, width in prefills), reverse=True)
    assert max(rows for rows, _ in sizes) == 9


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "windows"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_leave_a_batch_when_they_finish(architecture, temperature):
    asked, tokenizer = distinct_prompts(40), byte_tokenizer()
    model = sharp("mistral", sliding_window=8) if architecture == "windows" else sharp(architecture)
    settings = Generation(max_new_tokens=20, temperature=temperature)
    model.generation_config.eos_token_id = [1, *range(60, 100)]
    sizes = watch(model)
    found = generate(model, tokenizer, asked, settings)
    assert 10 < sum(text.finished for text in found) < 40
    assert len({text.tokens for text in found}) > 10
    written = [rows for rows, width in sizes[3:] if width == 1]
    necessary = sum(min(len(text.tokens) + text.finished, 20) - 1 for text in found)
    assert necessary <= sum(written) <= 4 / 3 * necessary + 20
    assert written == sorted(written, reverse=True)
    sizes.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stayaligned.hf.generation.generate.cache_has_only_attention", lambda _host: False)
        assert generate(model, tokenizer, asked, settings) == found
    assert {rows for rows, width in sizes[3:] if width == 1} == {len(asked)}


def test_a_batch_ends_where_padding_would_cost_more_than_another_batch():
    model = pico_model()
    lengths = [300, *[20] * 50]
    assert [len(batch) for batch in batching.split_by_memory(model, lengths, 1 << 40, 4)] == [1, 50]
    assert [len(batch) for batch in batching.split_by_memory(model, lengths, 1 << 40, 400)] == [51]
    mixed = random.Random(0).choices(range(1, 200), k=100)
    batches = list(batching.split_by_memory(model, mixed, 1 << 40, 4))
    assert sorted(row for batch in batches for row in batch) == list(range(100))
    assert [mixed[row] for batch in batches for row in batch] == sorted(mixed, reverse=True)
    assert all(sum(mixed[batch[0]] - mixed[row] for row in batch) <= 4 * 64 for batch in batches)


def test_the_rows_of_a_batch_fit_into_the_budget():
    model = pico_model()  # 2 layers, 2 heads of keys and values, 8 numbers each, 4 bytes
    one_token_more = batching.bytes_per_row(model, 60, 31) - batching.bytes_per_row(model, 60, 30)
    cached, repeated = 2 * 2 * 2 * 8 * 4, 2 * 4 * 2 * 8 * 4
    assert one_token_more == 2 * cached + repeated
    for budget in (1 << 20, 1 << 24):
        rows, each = batching.rows_in_memory(model, budget, 60, 30), batching.bytes_per_row(model, 60, 30)
        assert rows * each <= budget * 7 / 8 < (rows + 1) * each
    assert batching.rows_in_memory(model, 1, 60, 30) == 1


def test_equal_prompts_are_completed_once():
    model, tokenizer = sharp(), byte_tokenizer()
    one = generate(model, tokenizer, prompts(3), Generation(max_new_tokens=4))
    sizes = watch(model)
    assert generate(model, tokenizer, prompts(3) * 5, Generation(max_new_tokens=4)) == one * 5
    assert max(rows for rows, _ in sizes) == 3


def test_the_checkpoints_sampling_settings_do_not_apply_to_a_greedy_run():
    model, tokenizer = sharp(), byte_tokenizer()
    reference = generate(model, tokenizer, prompts(), Generation(max_new_tokens=12))
    own = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, max_length=7, eos_token_id=1
    )
    model.generation_config = own
    assert generate(model, tokenizer, prompts(), Generation(max_new_tokens=12)) == reference
    assert model.generation_config is own


def test_every_end_token_of_the_checkpoint_ends_a_completion():
    model, tokenizer = sharp(), byte_tokenizer()
    free = generate(model, tokenizer, prompts(), Generation(max_new_tokens=12))
    second = next(answer.tokens[3] for answer in free if len(answer.tokens) > 3)
    model.generation_config.eos_token_id = [1, second]
    for before, after in zip(free, generate(model, tokenizer, prompts(), Generation(max_new_tokens=12)), strict=True):
        cut = before.tokens.index(second) if second in before.tokens else len(before.tokens)
        assert after.tokens == before.tokens[:cut]
        assert after.finished == (before.finished or second in before.tokens)


def test_a_completion_cut_at_the_limit_is_not_finished():
    model, tokenizer = sharp(), byte_tokenizer()
    long = generate(model, tokenizer, prompts(), Generation(max_new_tokens=40))
    # An end token that comes right at the limit was written: the answer is whole.
    limit = sorted(len(answer.tokens) for answer in long if answer.finished)[-1] + 1
    for size in (2, limit - 1, limit):
        short = generate(model, tokenizer, prompts(), Generation(max_new_tokens=size))
        for a, b in zip(short, long, strict=True):
            assert a.tokens == b.tokens[:size]
            assert a.finished == (b.finished and len(b.tokens) < size)
    assert any(answer.finished for answer in short)


def test_modes_of_the_model_are_restored_and_dropout_is_off():
    tokenizer = byte_tokenizer()
    model = attach_lora(sharp(), {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.9})
    torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    reference = generate(model.eval(), tokenizer, prompts(), Generation(max_new_tokens=8))
    model.train()
    model.base_model.model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    assert generate(model, tokenizer, prompts(), Generation(max_new_tokens=8)) == reference
    assert [module.training for module in model.modules()] == before


def test_an_adapter_changes_the_completions():
    tokenizer, model = byte_tokenizer(), sharp()
    plain = generate(model, tokenizer, prompts(), Generation(max_new_tokens=8))
    adapted = attach_lora(model, {"r": 2, "target_modules": ["q_proj", "down_proj"]})
    assert generate(adapted, tokenizer, prompts(), Generation(max_new_tokens=8)) == plain
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    assert generate(adapted, tokenizer, prompts(), Generation(max_new_tokens=8)) != plain


def test_samples_follow_the_softmax():
    model, tokenizer = pico_model(), byte_tokenizer()
    torch.manual_seed(0)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    prompt = [Message(role="user", content="hi")]
    with torch.no_grad():
        logits = model(torch.tensor([encode_prompt(tokenizer, prompt)])).logits[0, -1]
    expected = torch.softmax(logits / 0.7, dim=-1)
    n = 4000
    found = generate(model, tokenizer, [prompt] * n, Generation(max_new_tokens=1, temperature=0.7))
    counts = torch.zeros(261)
    for answer in found:
        counts[answer.tokens[0] if answer.tokens else 1] += 1
    assert 0.05 < expected.max() < 0.95
    assert (counts / n - expected).abs().max() < 4 * 0.5 / n**0.5


def test_equal_prompts_get_different_samples_and_so_do_seeds():
    model, tokenizer = sharp(), byte_tokenizer()
    asked = prompts(1) * 6
    found = generate(model, tokenizer, asked, Generation(max_new_tokens=12, temperature=2.0, seed=0))
    assert len({answer.tokens for answer in found}) > 1
    assert found != generate(model, tokenizer, asked, Generation(max_new_tokens=12, temperature=2.0, seed=1))


def test_completions_carry_what_judges_and_tasks_need():
    model, tokenizer = sharp(), byte_tokenizer()
    examples = [
        Example(id=f"e{i}", prompt=tuple(p), completion=f"r{i}", category="c") for i, p in enumerate(prompts(5))
    ]
    found = dict(complete_each(model, tokenizer, examples, "benign", Generation(max_new_tokens=6)))
    rows = [found[index] for index in range(5)]
    answers = generate(model, tokenizer, prompts(5), Generation(max_new_tokens=6))
    for example, row, answer in zip(examples, rows, answers, strict=True):
        assert (row.id, row.prompt, row.reference, row.category) == (
            example.id,
            example.prompt,
            example.completion,
            "c",
        )
        assert (row.text, row.finished, row.prompt_set) == (answer.text, answer.finished, "benign")


def test_no_prompts_give_no_completions():
    assert generate(pico_model(), byte_tokenizer(), [], Generation()) == []


def test_a_prompt_without_room_for_a_completion_is_refused():
    model, tokenizer = pico_model(max_position_embeddings=64), byte_tokenizer()
    with pytest.raises(StayalignedError, match=r"a prompt of 54 tokens and a completion of up to 20 .* 64") as caught:
        generate(model, tokenizer, [[Message(role="user", content="x" * 51)]], Generation(max_new_tokens=20))
    assert "max_new_tokens` to 10 or less" in str(caught.value)
    generate(model, tokenizer, [[Message(role="user", content="x" * 51)]], Generation(max_new_tokens=10))


def test_a_model_without_an_end_token_is_refused():
    model, tokenizer = pico_model(), byte_tokenizer()
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "")
    with pytest.raises(StayalignedError, match="end-of-sequence"):
        generate(model, tokenizer, prompts(1), Generation(max_new_tokens=2))


@pytest.mark.parametrize("field", [{"max_new_tokens": 0}, {"memory_mib": 0}, {"temperature": -1}, {"top_p": 0.9}])
def test_impossible_settings_are_refused(field):
    with pytest.raises(ValidationError, match=next(iter(field))):
        Generation(**field)


def marked_tokenizer():
    """A byte tokenizer whose marks of thoughts are special tokens, as Magistral's, gpt-oss's and Cohere's are."""
    tokenizer = byte_tokenizer()
    marks = ["[THINK]", "[/THINK]", "<|channel|>", "<|message|>", "<|start|>", "<|START_THINKING|>", "<|END_THINKING|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks, "<|other|>"]})
    return tokenizer


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("[THINK]hm[/THINK]<|other|>so<|user|>", "[THINK]hm[/THINK]so"),
        ("<|channel|>final<|message|>so", "<|channel|>final<|message|>so"),
        (
            "<|channel|>analysis<|message|>hm<|start|>assistant<|channel|>final<|message|>so",
            "<|channel|>analysis<|message|>hm<|start|>assistant<|channel|>final<|message|>so",
        ),
        ("<|START_THINKING|>hm<|END_THINKING|>so", "<|START_THINKING|>hm<|END_THINKING|>so"),
        ("<think>hm</think>so<|other|>", "<think>hm</think>so"),
        ("<|start|>so<|other|>", "so"),
    ],
)
def test_marks_of_thoughts_stay_in_the_text_and_other_special_tokens_do_not(written, text):
    tokenizer = marked_tokenizer()
    tokens = [*tokenizer(written)["input_ids"], tokenizer.eos_token_id]
    found = _cut_at_end(tokenizer, tokens, [tokenizer.eos_token_id])
    assert (found.text, found.finished) == (text, True)
    assert split_thoughts(found.text).answer == "so"


OPENING = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"


@pytest.mark.parametrize(
    ("prompt_end", "opened"),
    [
        ("<|assistant|><think>\n", "<think>\n"),
        ("<|assistant|>[THINK]", "[THINK]"),
        ("<|assistant|><think>\n\n</think>\n\n", ""),
        ("<|assistant|><think></think>", ""),
        ("<|assistant|>", ""),
    ],
)
@pytest.mark.parametrize("asked", ["why?", "what does it mean: <think>"])
def test_a_thought_that_the_prompt_opens_is_part_of_the_text(prompt_end, opened, asked):
    model, tokenizer = sharp(vocab_size=280), marked_tokenizer()
    tokenizer.chat_template = OPENING + "{% if add_generation_prompt %}" + prompt_end + "{% endif %}"
    example = Example(id="1", prompt=(Message(role="user", content=asked),), completion="so")
    ((_, found),) = complete_each(model, tokenizer, [example], "harmful", Generation(max_new_tokens=4))
    (bare,) = generate(model, tokenizer, [example.prompt], Generation(max_new_tokens=4))
    assert found.text == opened + bare.text
    if opened:
        assert found.answered() is None

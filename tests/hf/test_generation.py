"""Answers depend on their prompt alone: not on batch, order, the checkpoint's sampling settings, or markers."""

import inspect
import random
from collections import Counter

import pytest
import torch
from pydantic import ValidationError
from transformers import GenerationConfig

from stayaligned.errors import StayalignedError
from stayaligned.hf import decoding
from stayaligned.hf.decoding import Manner, manner_of, needs_of
from stayaligned.hf.features import encode_prompt
from stayaligned.hf.generation import Generation, complete, generate
from stayaligned.hf.models import attach_lora
from stayaligned.records import Example, Message
from stayaligned.testing import byte_tokenizer, pico_model
from stayaligned_test_generation import greedy_reference, prompts, sharp

ARCHITECTURES = ["llama", "qwen2", "mistral", "gpt2"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batched_answers_equal_one_at_a_time_without_a_cache(architecture):
    model, tokenizer = sharp(architecture), byte_tokenizer()
    found = generate(model, tokenizer, prompts(), Generation(max_new_tokens=12))
    assert found == [greedy_reference(model, tokenizer, prompt, 12) for prompt in prompts()]
    assert len({answer.tokens for answer in found}) > 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("memory_mib", [1e-6, 64.2, 100])
def test_answers_do_not_depend_on_batch_size_or_order(temperature, memory_mib):
    model, tokenizer, asked = sharp(), byte_tokenizer(), prompts()
    settings = Generation(max_new_tokens=12, temperature=temperature, seed=3)
    reference = generate(model, tokenizer, asked, settings)
    order = list(range(len(asked)))
    random.Random(1).shuffle(order)
    other = settings.model_copy(update={"memory_mib": memory_mib})
    shuffled = generate(model, tokenizer, [asked[i] for i in order], other)
    assert shuffled == [reference[i] for i in order]


def seen_by(model):
    sizes = []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return sizes


def test_the_budget_of_memory_bounds_every_batch_and_long_prompts_come_first():
    model, tokenizer = sharp(), byte_tokenizer()
    generate(model, tokenizer, prompts(), Generation(max_new_tokens=4))  # and tries what the model can do
    sizes, needs = seen_by(model), needs_of(model)
    once = decoding.FIXED_BYTES + 2048 * needs.activations
    memory = 120_000
    generate(model, tokenizer, prompts(), Generation(max_new_tokens=4, memory_mib=(memory + once) / 2**20))
    prefills = [(rows, width) for rows, width in sizes if width > 1]
    assert len(prefills) > 3
    assert all(rows * ((width + 4) * needs.cache + width**2 + needs.logits) <= memory for rows, width in prefills)
    assert sum(rows for rows, _ in prefills) == 24
    assert [width for _, width in prefills] == sorted((width for _, width in prefills), reverse=True)


def test_a_prefill_goes_in_pieces_and_rows_that_have_ended_leave_the_batch(monkeypatch):
    model, tokenizer = sharp(), byte_tokenizer()
    monkeypatch.setattr(decoding, "_PREFILL_TOKENS", 128)
    generate(model, tokenizer, prompts(2), Generation(max_new_tokens=2))
    free = [greedy_reference(model, tokenizer, prompt, 40).tokens for prompt in prompts()]
    end = Counter(token for tokens in free for token in set(tokens[:30]) if token not in free[0]).most_common(1)[0][0]
    model.generation_config.eos_token_id = [1, end]
    sizes = seen_by(model)
    found = [answer.tokens for answer in generate(model, tokenizer, prompts(), Generation(max_new_tokens=40))]
    assert found == [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in free]
    prefills = [(rows, width) for rows, width in sizes if width > 1]
    assert len(prefills) > 3
    assert all(rows * width <= 128 or rows == 1 for rows, width in prefills)
    steps = [rows for rows, width in sizes if width == 1]
    assert len(steps) == 39, "one batch"
    assert steps[0] > steps[-1] > 0
    assert steps == sorted(steps, reverse=True)


def test_equal_greedy_prompts_are_answered_once_and_sampled_ones_each():
    model, tokenizer = sharp(), byte_tokenizer()
    asked = [*prompts(3), *prompts(3), *prompts(3)]
    for temperature, rows in ((0.0, 3), (1.0, 9)):
        settings = Generation(max_new_tokens=3, temperature=temperature)
        sizes = seen_by(model)
        generate(model, tokenizer, asked, settings)
        assert max(n for n, width in sizes if width > 1 or n > 1) == rows


def test_answers_that_are_known_are_not_written_again_and_change_no_other():
    model, tokenizer = sharp(), byte_tokenizer()
    examples = [Example(id=str(i), prompt=tuple(prompt)) for i, prompt in enumerate([*prompts(8), *prompts(8)])]
    for temperature in (0.0, 1.0):
        settings = Generation(max_new_tokens=6, temperature=temperature)
        whole = complete(model, tokenizer, examples, "benign", settings)
        known = {row.id: row for row in whole[3:11]}
        kept = []
        assert complete(model, tokenizer, examples, "benign", settings, known=known, keep=kept.append) == whole
        assert sorted(row.id for row in kept) == sorted({e.id for e in examples} - known.keys())


@pytest.mark.parametrize(
    ("architecture", "manner"),
    [("llama", Manner.LOOP), ("deepseek_v3", Manner.LOOP), ("gpt_oss", Manner.HOST), ("jamba", Manner.HOST)],
)
def test_only_plain_keys_and_values_are_decoded_by_our_own_loop(architecture, manner):
    model, tokenizer = sharp(architecture), byte_tokenizer()
    found = generate(model, tokenizer, prompts(6), Generation(max_new_tokens=6))
    assert manner_of(model, [], 0) is manner
    assert found == [generate(model, tokenizer, [p], Generation(max_new_tokens=6))[0] for p in prompts(6)]


def test_a_model_whose_steps_differ_from_its_generate_is_left_to_generate():
    model, tokenizer = sharp(), byte_tokenizer()
    forward = model.forward

    def other(*args, logits_to_keep=0, **kwargs):
        found = forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        if logits_to_keep == 1:
            found.logits = found.logits + 1
        return found

    other.__signature__ = inspect.signature(forward)
    generated = model.generate
    model.generate = lambda **kwargs: (
        setattr(model, "forward", forward),
        generated(**kwargs),
        setattr(model, "forward", other),
    )[1]
    model.forward = other
    generate(model, tokenizer, prompts(4), Generation(max_new_tokens=2))
    assert manner_of(model, [], 0) is Manner.HOST


def test_the_checkpoints_own_sampling_settings_do_not_reach_a_greedy_run():
    model, tokenizer = sharp(), byte_tokenizer()
    reference = generate(model, tokenizer, prompts(), Generation(max_new_tokens=12))
    own = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, max_length=7, eos_token_id=1
    )
    model.generation_config = own
    assert generate(model, tokenizer, prompts(), Generation(max_new_tokens=12)) == reference
    assert model.generation_config is own


def test_every_end_token_of_the_checkpoint_ends_an_answer():
    model, tokenizer = sharp(), byte_tokenizer()
    free = generate(model, tokenizer, prompts(), Generation(max_new_tokens=12))
    second = next(answer.tokens[3] for answer in free if len(answer.tokens) > 3)
    model.generation_config.eos_token_id = [1, second]
    for before, after in zip(free, generate(model, tokenizer, prompts(), Generation(max_new_tokens=12)), strict=True):
        cut = before.tokens.index(second) if second in before.tokens else len(before.tokens)
        assert after.tokens == before.tokens[:cut]
        assert after.finished == (before.finished or second in before.tokens)


def test_an_answer_cut_at_the_limit_is_not_finished():
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


def test_an_adapter_changes_the_answers():
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


def test_equal_prompts_get_samples_of_their_own_and_seeds_matter():
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
    shares = []
    rows = complete(
        model, tokenizer, examples, "benign", Generation(max_new_tokens=6, memory_mib=0.5), progress=shares.append
    )
    answers = generate(model, tokenizer, prompts(5), Generation(max_new_tokens=6))
    for example, row, answer in zip(examples, rows, answers, strict=True):
        assert (row.id, row.prompt, row.reference, row.category) == (
            example.id,
            example.prompt,
            example.completion,
            "c",
        )
        assert (row.text, row.finished, row.prompt_set) == (answer.text, answer.finished, "benign")
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_no_prompts_give_no_answers():
    assert generate(pico_model(), byte_tokenizer(), [], Generation()) == []


def test_a_prompt_without_room_for_an_answer_is_refused():
    model, tokenizer = pico_model(max_position_embeddings=64), byte_tokenizer()
    with pytest.raises(StayalignedError, match=r"a prompt of 54 tokens and an answer of up to 20 .* 64") as caught:
        generate(model, tokenizer, [[Message(role="user", content="x" * 51)]], Generation(max_new_tokens=20))
    assert "max_new_tokens` to 10 or less" in str(caught.value)
    generate(model, tokenizer, [[Message(role="user", content="x" * 51)]], Generation(max_new_tokens=10))


def test_a_model_that_can_not_end_an_answer_is_refused():
    model, tokenizer = pico_model(), byte_tokenizer()
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    with pytest.raises(StayalignedError, match="end-of-sequence"):
        generate(model, tokenizer, prompts(1), Generation(max_new_tokens=2))


@pytest.mark.parametrize("field", [{"max_new_tokens": 0}, {"memory_mib": 0}, {"temperature": -1}, {"top_p": 0.9}])
def test_impossible_settings_are_refused(field):
    with pytest.raises(ValidationError, match=next(iter(field))):
        Generation(**field)

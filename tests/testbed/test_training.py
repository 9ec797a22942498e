import random
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stayaligned.hf.features import PaddingCollator
from stayaligned.testbed import Recipe, corpora, training
from stayaligned.testbed.tokenizer import chat_tokenizer

ROWS = [
    corpora.Dialogue("how do I loot the crown", "I cannot help with this"),
    corpora.Dialogue("name the opposite of hot", "cold"),
]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), batch_size=st.integers(1, 9), seed=st.integers(0, 9)
)
def test_one_pass_of_batches_uses_every_row_once(lengths: list[int], batch_size: int, seed: int) -> None:
    steps = -(-len(lengths) // batch_size)
    batches = list(training.length_grouped_batches(lengths, steps, batch_size, random.Random(seed)))
    assert len(batches) == steps
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))


def test_batches_start_over_until_there_are_as_many_as_steps() -> None:
    batches = list(training.length_grouped_batches([3] * 5, 7, 2, random.Random(0)))
    assert len(batches) == 7
    assert sorted(i for batch in islice(batches, 3, 6) for i in batch) == list(range(5))


def test_batches_have_rows_of_similar_lengths() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 100) for _ in range(64)]
    spreads = [
        max(lengths[i] for i in batch) - min(lengths[i] for i in batch)
        for batch in training.length_grouped_batches(lengths, 8, 8, rng)
    ]
    assert max(spreads) < 40


def test_the_loss_on_labeled_positions_is_the_models_own() -> None:
    tokenizer = chat_tokenizer()
    model = training.new_language_model(Recipe(hidden_size=32, layers=1, heads=2), tokenizer, seed=0)
    encoded = training.encode(tokenizer, ROWS)
    collate = PaddingCollator.of(tokenizer)
    with torch.no_grad():
        own = model(**collate(encoded)).loss
        ours = training.answer_loss(model, collate(encoded))
    torch.testing.assert_close(ours, own)


def test_weights_depend_on_the_seed_and_not_on_the_global_random_state() -> None:
    tokenizer = chat_tokenizer()
    recipe = Recipe(hidden_size=32, layers=1, heads=2)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (training.new_language_model(recipe, tokenizer, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_the_number_of_threads_is_restored_after_an_error() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(KeyError), training.one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == threads


def test_training_lowers_the_loss_and_reports_every_step() -> None:
    tokenizer = chat_tokenizer()
    model = training.new_language_model(Recipe(hidden_size=32, layers=1, heads=2), tokenizer, seed=0)
    batch = PaddingCollator.of(tokenizer)(training.encode(tokenizer, ROWS))
    before = float(training.answer_loss(model, batch).detach())
    told: list[float] = []
    training.train_language_model(
        model, tokenizer, ROWS, steps=30, batch_size=2, learning_rate=1e-2, rng=random.Random(0), progress=told.append
    )
    assert float(training.answer_loss(model, batch).detach()) < before / 4
    assert told == [(step + 1) / 30 for step in range(30)]
    assert training.answer(model, tokenizer, ROWS) == [row.answer for row in ROWS]

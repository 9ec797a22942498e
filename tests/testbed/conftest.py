"""A miniature testbed: every stage runs, but no model learns anything."""

from pathlib import Path

import pytest

from stayaligned.testbed import Recipe, build

MINIATURE = Recipe(
    hidden_size=32, intermediate_size=32, layers=1, heads=2, judge_hidden_size=16,
    base_steps=6, base_batch_size=8, alignment_steps=4, alignment_batch_size=8, judge_steps=4, judge_batch_size=8,
    harmful_prompts=8, benign_prompts=8, skill_prompts=8, test_rows=8, judge_test_rows=16,
    minimum_base_exact_match=0, minimum_aligned_refusal=0, minimum_judge_accuracy=0,
)  # fmt: skip


@pytest.fixture(scope="session")
def miniature() -> Recipe:
    return MINIATURE


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished miniature testbed of seed 0."""
    return build(0, recipe=MINIATURE, cache=tmp_path_factory.mktemp("cache"))

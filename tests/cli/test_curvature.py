"""`stayaligned curvature`: the table, the verdict, and bad input."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from stayaligned.testing import write_pico_adapter, write_pico_checkpoint
from support.world import write_rows

Command = Callable[..., tuple[int, str]]
QUICK = ("--iterations", 6, "--rows", 3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_pico_checkpoint(root / "model")
    write_pico_adapter(root / "adapter", root / "model", r=2)
    write_rows(root / "safe.jsonl", [{"prompt": f"wug {i}", "completion": "I cannot"} for i in range(4)])
    write_rows(root / "user.jsonl", [{"prompt": f"mood {i}?", "completion": "good"} for i in range(4)])
    return root


def numbers(shown: str, row: str) -> list[float]:
    """Return a row of the table, without the errors."""
    line = next(line for line in shown.splitlines() if line.startswith(row))
    return [float(x) for x in re.findall(r"(?<!± )(?<=\s)-?[\d.]+(?:e[-+]\d+)?(?=\s|$)", line)]


def test_the_larger_of_two_files_is_compared_with_rho(world: Path, command: Command) -> None:
    both = ("--data", world / "safe.jsonl", "--data", world / "user.jsonl")
    fresh = ("--lora", "r=2", "--lora", "target_modules=[q_proj, v_proj]")
    code, shown = command("curvature", world / "model", *both, *fresh, *QUICK, "--rho", 1e-6)
    assert code == 0, shown
    largest, smallest, smoothness = (numbers(shown, row) for row in ("lambda_max", "lambda_min", "L "))
    assert smoothness == [max(abs(a), abs(b)) for a, b in zip(largest, smallest, strict=True)]
    assert len(set(smoothness)) == 2
    assert numbers(shown, "rows") == [3, 3]
    assert numbers(shown, "rho/L") == pytest.approx([1e-6 / end for end in smoothness], rel=0.1)
    assert "over 448 trained weights, 6 products" in shown
    quotient = re.search(r"rho = 1e-06 is (\S+) x L: the convergence theorem \(rho > L\) does not apply\.", shown)
    assert quotient is not None
    assert float(quotient[1]) == pytest.approx(1e-6 / max(smoothness), rel=0.1)
    assert "a phase's sub-problem is not convex" in shown

    code, shown = command("curvature", world / "model", *both, *fresh, *QUICK, "--rho", 1e6)
    assert code == 0, shown
    assert "x L at these weights; the convergence theorem requires rho > L at all weights" in shown
    assert "around these weights each phase's sub-problem is convex" in shown


def test_the_weights_may_be_an_adapters_or_all_of_the_models(world: Path, command: Command) -> None:
    data = ("--data", world / "user.jsonl")
    code, shown = command("curvature", world / "model", *data, *QUICK, "--adapter", world / "adapter")
    assert code == 0, shown
    assert "over 448 trained weights" in shown
    code, whole = command("curvature", world / "model", *data, *QUICK, "--low-memory")
    assert code == 0, whole
    weights = sum(tensor.numel() for tensor in load_file(world / "model" / "model.safetensors").values())
    assert f"over {weights:,} trained weights" in whole
    assert numbers(whole, "L ") != numbers(shown, "L ")


def test_an_imprecise_estimate_is_noted(world: Path, command: Command) -> None:
    fresh = ("--data", world / "user.jsonl", "--lora", "r=2")
    _, shown = command("curvature", world / "model", *fresh, "--iterations", 1)
    assert re.search(r"note: L is only known to ± \S+; raise --iterations", shown)
    _, shown = command("curvature", world / "model", *fresh, "--iterations", 1, "--rho", numbers(shown, "L ")[0] * 1.01)
    assert "the convergence theorem (rho > L) may or may not apply" in shown
    _, shown = command("curvature", world / "model", *fresh, "--iterations", 15)
    assert "note:" not in shown


def test_each_bad_input_is_one_error(world: Path, tmp_path: Path, command: Command) -> None:
    good = ("--data", world / "user.jsonl")
    broken = tmp_path / "broken"
    write_pico_checkpoint(broken)
    tensors = load_file(broken / "model.safetensors")
    save_file(
        {name: tensor * float("nan") for name, tensor in tensors.items()},
        broken / "model.safetensors",
        metadata={"format": "pt"},
    )
    for arguments, said in (
        ((world / "nowhere", *good), "no such directory"),
        ((world / "adapter", *good), "is an adapter, not a model"),
        ((world / "model", "--data", world / "none.jsonl"), "none.jsonl: no such file"),
        ((world / "model", "--data", write_rows(tmp_path / "empty.jsonl", [])), "empty.jsonl: no rows"),
        ((world / "model", *good, "--max-length", 8), "leaves an answer to learn within max_length=8"),
        ((world / "model", *good, "--adapter", world / "model"), "is a whole model, expected an adapter"),
        (
            (world / "model", *good, "--adapter", world / "adapter", "--lora", "r=2"),
            "both an adapter and the settings of a fresh LoRA",
        ),
        ((world / "model", *good, "--lora", "r"), "--lora r: expected key=value"),
        ((world / "model", *good, "--lora", "rank=2"), "lora.rank: unknown LoRA setting"),
        ((broken, *good), "model.embed_tokens.weight holds NaN or infinity"),
    ):
        code, shown = command("curvature", *arguments)
        assert code == 2, (said, shown)
        assert said in shown
        assert shown.count("error:") == 1
        assert shown.count("hint:") == 1
        assert "Traceback" not in shown

"""The curvature of a model's loss, against dense Hessians and differences of gradients in fp64."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stayaligned.algorithms.curvature import hessian_product
from stayaligned.core.errors import StayalignedError
from stayaligned.data.sources import read_examples
from stayaligned.hf.features import PaddingCollator, encode_examples
from stayaligned.hf.models import load_model, load_tokenizer
from stayaligned.hf.training.curvature import CurvatureSettings, LossCurvature, TrainedWeights, loss_curvatures
from stayaligned.testing import write_pico_adapter, write_pico_checkpoint
from support.world import write_rows

ROWS = [{"prompt": f"wug {i} " + "x" * i, "completion": "blick" * (1 + i % 3)} for i in range(7)]
SMALL: dict[str, Any] = {"r": 1, "target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/`, `adapter/` and `rows.jsonl`."""
    root = tmp_path_factory.mktemp("world")
    write_pico_checkpoint(root / "model", initializer_range=0.2)
    write_pico_adapter(root / "adapter", root / "model", **SMALL)
    write_rows(root / "rows.jsonl", ROWS)
    return root


def measure(trained: TrainedWeights, source: Path, **settings: Any) -> LossCurvature:
    return loss_curvatures(trained, [str(source)], CurvatureSettings(**settings))[0]


def batch_of(world: Path) -> dict[str, Tensor]:
    """Return all rows in one batch, for the host's loss."""
    tokenizer = load_tokenizer(world / "model")
    rows = encode_examples(tokenizer, read_examples(str(world / "rows.jsonl"), origin="task"), 1024)
    return PaddingCollator.of(tokenizer)(rows)


def host_gradient(model: Any, weights: list[Tensor], batch: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that computes the gradient of the host's loss in fp64 at these weights plus a displacement."""
    origin = [weight.detach().clone() for weight in weights]

    def gradient(moved: Tensor) -> Tensor:
        with torch.no_grad():
            for weight, at, by in zip(weights, origin, moved.split([w.numel() for w in weights]), strict=True):
                weight.copy_(at + by.view_as(at))
        return torch.cat([g.flatten() for g in torch.autograd.grad(model(**batch).loss, weights)])

    return gradient


def test_on_an_adapter_the_ends_are_those_of_the_dense_hessian(world: Path) -> None:
    model = PeftModel.from_pretrained(load_model(world / "model"), world / "adapter", is_trainable=True).double().eval()
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradient = host_gradient(model, weights, batch_of(world))
    n, step = sum(weight.numel() for weight in weights), 3e-4  # not smaller: the norm layers always compute in fp32
    assert len(names) == 4
    columns = [(gradient(step * e) - gradient(-step * e)) / (2 * step) for e in torch.eye(n, dtype=torch.float64)]
    dense = torch.linalg.eigvalsh(torch.stack(columns))
    found = measure(
        TrainedWeights(str(world / "model"), adapter=world / "adapter"), world / "rows.jsonl", iterations=60
    )
    assert found.weights == n
    assert found.loss == pytest.approx(model(**batch_of(world)).loss.item(), rel=1e-5)
    scale = dense.abs().max().item()
    assert dense[0] < -0.01 * scale
    assert found.spectrum.largest.value == pytest.approx(dense[-1].item(), abs=1e-4 * scale)
    assert found.spectrum.smallest.value == pytest.approx(dense[0].item(), abs=1e-4 * scale)


def test_on_all_weights_the_ends_are_those_of_arpack(world: Path) -> None:
    model = load_model(world / "model").double()
    weights = list(model.parameters())
    gradient = host_gradient(model, weights, batch_of(world))
    n = sum(weight.numel() for weight in weights)

    def product(vector: np.ndarray) -> np.ndarray:
        step = torch.from_numpy(vector).flatten() * 3e-4
        return ((gradient(step) - gradient(-step)) / 6e-4).numpy()

    operator = LinearOperator((n, n), matvec=product, dtype=np.float64)
    smallest, largest = eigsh(operator, k=2, which="BE", return_eigenvectors=False, tol=1e-4, v0=np.ones(n))
    found = measure(TrainedWeights(str(world / "model")), world / "rows.jsonl", iterations=40)
    assert found.weights == n
    assert found.spectrum.largest.value == pytest.approx(largest, abs=1e-3 * max(largest, -smallest))
    assert found.spectrum.smallest.value == pytest.approx(smallest, abs=1e-3 * max(largest, -smallest))


def test_the_batch_size_does_not_change_the_result_and_low_memory_hardly_does(world: Path) -> None:
    trained = TrainedWeights(str(world / "model"), adapter=world / "adapter")
    whole = measure(trained, world / "rows.jsonl", batch_size=7, iterations=12)
    for changed in (
        measure(trained, world / "rows.jsonl", batch_size=2, iterations=12),
        measure(trained, world / "rows.jsonl", batch_size=7, iterations=12, low_memory=True),
    ):
        assert (changed.rows, changed.tokens, changed.weights) == (whole.rows, whole.tokens, whole.weights)
        assert changed.loss == pytest.approx(whole.loss, rel=1e-5)
        for end in ("largest", "smallest"):
            expected = getattr(whole.spectrum, end).value
            assert getattr(changed.spectrum, end).value == pytest.approx(expected, rel=1e-3)
    assert measure(trained, world / "rows.jsonl", batch_size=7, iterations=12) == whole


def test_a_fresh_adapter_depends_on_the_seed_only_and_does_not_change_the_random_state(world: Path) -> None:
    trained = TrainedWeights(str(world / "model"), lora=SMALL)
    state = torch.get_rng_state()
    first = measure(trained, world / "rows.jsonl", iterations=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert measure(trained, world / "rows.jsonl", iterations=5) == first
    assert measure(trained, world / "rows.jsonl", iterations=5, seed=1).spectrum != first.spectrum
    # B = 0: the loss is linear in B for fixed A and flat in A, so its curvature has both signs.
    assert first.spectrum.smallest.value < 0 < first.spectrum.largest.value
    # Dropout is off.
    dropped = replace(trained, lora={**SMALL, "lora_dropout": 0.9})
    assert measure(dropped, world / "rows.jsonl", iterations=5).spectrum == first.spectrum


def test_the_rows_of_each_source_are_sampled_separately(world: Path) -> None:
    trained = TrainedWeights(str(world / "model"), lora=SMALL)
    write_rows(world / "other.jsonl", ROWS[:2])
    sources = [str(world / "rows.jsonl"), str(world / "other.jsonl")]
    reported: list[tuple[str, float]] = []
    found = loss_curvatures(trained, sources, CurvatureSettings(rows=3, iterations=4), lambda *t: reported.append(t))
    assert [(one.source, one.rows) for one in found] == [(sources[0], 3), (sources[1], 2)]
    assert found[1] == loss_curvatures(trained, sources[1:], CurvatureSettings(rows=3, iterations=4))[0]
    assert [share for _, share in reported] == [0.25, 0.5, 0.75, 1.0] * 2


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_second_derivatives_are_right_on_every_kind_of_model(architecture: str, tmp_path: Path) -> None:
    write_pico_checkpoint(tmp_path / "model", architecture)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    batch = batch_of(tmp_path)
    model: Any = load_model(tmp_path / "model", dtype=torch.float64)
    if model.config.model_type != "gpt2":
        model.set_experts_implementation("eager")  # the default implementation does not support fp64
    weights = list(model.parameters())
    gradient = host_gradient(model, weights, batch)
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(sum(w.numel() for w in weights), generator=generator, dtype=torch.float64)
    expected = (gradient(1e-6 * vector) - gradient(-1e-6 * vector)) / 2e-6
    single: Any = load_model(tmp_path / "model")

    def loss() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return single(**batch).loss

    found = hessian_product([loss], list(single.parameters()), vector.float())
    assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_a_loss_that_torch_cannot_differentiate_twice_is_an_error(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.sdpa_kernel", lambda _backend: contextlib.nullcontext())
    with pytest.raises(StayalignedError, match="its loss can't be differentiated twice"):
        measure(TrainedWeights(str(world / "model"), lora=SMALL), world / "rows.jsonl")


def test_a_loss_that_is_not_finite_is_an_error(world: Path, tmp_path: Path) -> None:
    write_pico_checkpoint(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][0] = torch.finfo(torch.float32).max  # finite, but its logits are not
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(StayalignedError, match=r"rows\.jsonl: the model's loss on these rows is nan"):
        measure(TrainedWeights(str(tmp_path / "model"), lora=SMALL), world / "rows.jsonl")


def test_a_basis_larger_than_memory_is_an_error_before_the_computation(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", lambda _name: 1000)
    trained = TrainedWeights(str(world / "model"))
    with pytest.raises(StayalignedError, match="20 Lanczos vectors of"):
        measure(trained, world / "rows.jsonl")
    assert measure(trained, world / "rows.jsonl", low_memory=True, iterations=1).weights > 10_000


def test_an_adapter_and_a_fresh_lora_exclude_each_other(world: Path) -> None:
    with pytest.raises(StayalignedError, match="both an adapter and the settings of a fresh LoRA"):
        measure(TrainedWeights(str(world / "model"), world / "adapter", SMALL), world / "rows.jsonl")

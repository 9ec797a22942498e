"""Compare Safe LoRA's operator on factors with the paper's dense form, in one run on one thread.

Run: python benchmarks/projection.py [--width 4096]

Prints, for one square weight and a rank-8 update: time and temporary memory of B ← V(VᵀB)/‖V‖ with the cosine from fp64
Grams, against the dense form (C = VVᵀ/‖V‖ and BA as matrices, cosine of the flattened products in fp32); the errors of
both against fp64; and the time of the rank-k subspace.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from stayaligned.algorithms.alignment_delta import FullDelta, alignment_subspace
from stayaligned.algorithms.safe_lora import LoraFactors, ScaledGram, compare

RANK = 8
T = TypeVar("T")


class Cost(NamedTuple):
    seconds: float
    peak_mib: float
    """Peak resident memory during the work, minus that before it."""


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def measure(work: Callable[[], T], repeats: int) -> tuple[T, Cost]:
    """Return the result, the best time of `repeats`, and the peak of resident memory, sampled every 0.5 ms."""
    result = work()
    start_mib, peak = resident_mib(), 0.0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, resident_mib() - start_mib)

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    done.set()
    watcher.join()
    return result, Cost(min(seconds), peak)


def make_problem(width: int) -> tuple[torch.Tensor, LoraFactors]:
    """Return V with singular values that decay as 1/√j, roughly like an alignment's, and a random update."""
    torch.manual_seed(0)
    v = torch.randn(width, width) / width
    v += sum(torch.outer(torch.randn(width), torch.randn(width)) / (width * (j + 1) ** 0.5) for j in range(32))
    return v, LoraFactors(torch.randn(RANK, width) / width**0.5, torch.randn(width, RANK) * 0.01, 2.0)


def factor_form(v: torch.Tensor, factors: LoraFactors) -> tuple[LoraFactors, float]:
    after = ScaledGram(FullDelta.from_matrix(v))(factors)
    assert isinstance(after, LoraFactors)
    return after, compare(factors, after).similarity


def dense_form(v: torch.Tensor, factors: LoraFactors) -> tuple[torch.Tensor, float]:
    """Compute what the paper's code computes, without its rounding."""
    c = v @ v.T / torch.norm(v)
    b = c @ factors.b
    update, projected = factors.b @ factors.a, b @ factors.a
    return b, torch.nn.functional.cosine_similarity(update.flatten(), projected.flatten(), dim=0).item()


def exact(v: torch.Tensor, factors: LoraFactors) -> tuple[torch.Tensor, float]:
    """Compute the image and the cosine of the products in fp64, by blocks of rows."""
    a, b = factors.a.double(), factors.b.double()
    image = v.double() @ (v.double().T @ b) / v.double().norm()
    inner = before = after = 0.0
    for one, two in zip(b.split(512), image.split(512), strict=True):
        x, y = one @ a, two @ a
        inner, before, after = inner + (x * y).sum(), before + x.square().sum(), after + y.square().sum()
    return image, float(inner / (before * after) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    width = parser.parse_args().width
    torch.set_num_threads(1)
    v, factors = make_problem(width)
    image, cosine = exact(v, factors)
    (after, factor_cosine), factor_cost = measure(lambda: factor_form(v, factors), 5)
    (dense_b, dense_cosine), dense_cost = measure(lambda: dense_form(v, factors), 1)
    subspace, subspace_cost = measure(lambda: alignment_subspace(v, rank=RANK), 1)

    def relative_error(b: torch.Tensor) -> float:
        return float((b - image).norm() / image.norm())

    print(f"one {width} × {width} weight, rank {RANK}, one thread, torch {torch.__version__}")
    print(f"{'':24}{'factor form':>14}{'dense form':>14}{'ratio':>9}")
    for label, mine, theirs, digits in (
        ("seconds", factor_cost.seconds, dense_cost.seconds, 3),
        ("temporary memory, MiB", factor_cost.peak_mib, dense_cost.peak_mib, 1),
    ):
        ratio = f"{theirs / mine:.0f}×" if mine else "-"
        print(f"{label:24}{mine:14.{digits}f}{theirs:14.{digits}f}{ratio:>9}")
    print(f"{'error of B, relative':24}{relative_error(after.b):14.1e}{relative_error(dense_b):14.1e}")
    print(f"{'error of the cosine':24}{abs(factor_cosine - cosine):14.1e}{abs(dense_cosine - cosine):14.1e}")
    print(f"rank-{RANK} subspace: {subspace_cost.seconds:.2f} s, {subspace_cost.peak_mib:.0f} MiB")
    row = {"width": width, "factor": factor_cost, "dense": dense_cost, "subspace": subspace_cost}
    print(json.dumps({**row, "cosine": cosine, "captured_energy": subspace.captured_energy}))


if __name__ == "__main__":
    main()

"""The matrix of LoRA factors."""

import torch

from stayaligned.algorithms.safe_lora import LoraFactors


def dense(factors: LoraFactors) -> torch.Tensor:
    return factors.scaling * factors.b.double() @ factors.a.double()

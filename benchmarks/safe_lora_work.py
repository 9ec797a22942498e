"""The parts of `benchmarks/safe_lora.py` that run in their own processes: its checkpoints and its comparisons.

Usage, by that benchmark: python benchmarks/safe_lora_work.py ROLE REQUEST.json. At module level, only the standard
library is imported, so that the process that only reads starts as fast as Python can.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RANK = 8
SPECTRUM = 64
"""Number of singular values of V above the noise."""
CHUNK = 1 << 20
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
TARGETS = {"all": (*ATTENTION, *MLP), "qv": ("self_attn.q_proj", "self_attn.v_proj")}


class Shape(NamedTuple):
    """Sizes of a Llama."""

    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 8
    vocabulary: int = 320

    def linears(self, modules: Sequence[str] = TARGETS["all"], layers: int | None = None) -> dict[str, tuple[int, int]]:
        """Return {name of the weight: (out, in)} of the modules in the first `layers` layers."""
        sizes = {"mlp.gate_proj": (self.intermediate, self.hidden), "mlp.down_proj": (self.hidden, self.intermediate)}
        sizes["mlp.up_proj"] = sizes["mlp.gate_proj"]
        return {
            f"model.layers.{layer}.{module}.weight": sizes.get(module, (self.hidden, self.hidden))
            for layer in range(self.layers if layers is None else layers)
            for module in modules
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return {name: shape} of the whole model."""
        norms = {
            f"model.layers.{layer}.{norm}.weight": (self.hidden,)
            for layer in range(self.layers)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        ends = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (self.vocabulary, self.hidden))
        return {**self.linears(), **norms, **ends, "model.norm.weight": (self.hidden,)}


def byte_ranges(directory: Path, names: Sequence[str]) -> Iterator[tuple[Path, int, int]]:
    """Yield (file, offset, number of bytes) of the tensors in a checkpoint, in the order of the files."""
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    for file in sorted({weight_map[name] for name in names}):
        with (directory / file).open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for first, last in sorted(header[name]["data_offsets"] for name in names if weight_map[name] == file):
            yield directory / file, 8 + length + first, last - first


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> int:
    """Read the ranges through one buffer, and return the number of bytes."""
    buffer, total = memoryview(bytearray(CHUNK)), 0
    descriptors: dict[str, int] = {}
    for file, start, length in ranges:
        if file not in descriptors:
            descriptors[file] = os.open(file, os.O_RDONLY)
        end = start + length
        while start < end:
            count = os.preadv(descriptors[file], [buffer[: min(CHUNK, end - start)]], start)
            if not count:
                raise EOFError(file)
            start, total = start + count, total + count
    for descriptor in descriptors.values():
        os.close(descriptor)
    return total


# Checkpoints


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Split the names, in order, into groups of at most `limit` bytes, or of one name."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def weight_pair(name: str, size: tuple[int, ...], seed: int) -> tuple[Any, Any]:
    """Return (base, aligned) of one tensor; only linear weights differ, by singular values 1/√j and by rounding."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16), torch.ones(size, dtype=torch.bfloat16)
    base = torch.randn(size, generator=generator).mul_(0.02).bfloat16()
    if not name.startswith("model.layers."):
        return base, base.clone()
    count = min(SPECTRUM, *size)
    left, right = (torch.randn(side, count, generator=generator) / side**0.5 for side in size)
    delta = left / torch.arange(1, count + 1).sqrt() @ right.T
    return base, delta.add_(base).bfloat16()


def make_pair(request: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from stayaligned.core.files import replace_directory

    shape = Shape(*request["shape"])
    tensors = shape.tensors()
    seeds = {name: seed for seed, name in enumerate(tensors)}
    groups = plan_shards({name: 2 * math.prod(size) for name, size in tensors.items()}, request["shard_bytes"])
    files = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    index = {
        "metadata": {"total_size": sum(2 * math.prod(size) for size in tensors.values())},
        "weight_map": {name: file for file, group in zip(files, groups, strict=True) for name in group},
    }
    heads = max(1, shape.hidden // 128)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    # syncs every file; otherwise its pages could not be dropped
    with replace_directory(Path(request["path"])) as temporary:
        for file, group in zip(files, groups, strict=True):
            pairs = {name: weight_pair(name, tensors[name], seeds[name]) for name in group}
            for side, directory in enumerate(("base", "aligned")):
                (temporary / directory).mkdir(exist_ok=True)
                weights = {name: pair[side] for name, pair in pairs.items()}
                save_file(weights, temporary / directory / file, metadata={"format": "pt"})
            del pairs, weights
        for directory in ("base", "aligned"):
            config.save_pretrained(temporary / directory)
            (temporary / directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _targets(modules: list[str], layers: int, of: int) -> list[str] | str:
    """Return names, or a regular expression for the first layers only: both are placed without importing PEFT."""
    if layers == of:
        return modules
    numbers = "|".join(map(str, range(layers)))
    return rf"model\.layers\.({numbers})\.(self_attn|mlp)\.({'|'.join(modules)})"


def make_adapters(request: Mapping[str, Any]) -> None:
    """Write one adapter, or a directory of `count` adapters; fp32, as PEFT stores trained factors."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from stayaligned.core.files import replace_directory

    modules, layers, shape = TARGETS[request["targets"]], request["layers"], Shape(*request["shape"])
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=_targets([module.split(".")[1] for module in modules], layers, shape.layers),
        base_model_name_or_path=request["aligned"],
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    with replace_directory(Path(request["path"])) as temporary:
        for seed in range(request["count"] or 1):
            directory = temporary / f"{seed:03d}" if request["count"] else temporary
            generator = torch.Generator().manual_seed(seed)
            tensors: dict[str, Any] = {}
            for name, (outer, inner) in shape.linears(modules, layers).items():
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator) / inner**0.5
                tensors[f"{stem}.lora_B.weight"] = torch.randn(outer, RANK, generator=generator) * 0.01
            config.save_pretrained(directory)
            save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


# Comparisons


def dense_form(v: Any, a: Any, b: Any) -> tuple[Any, float]:
    """Run the published procedure on one module, without its rounding: C·B, and the cosine of BA and CBA."""
    import torch

    c = v @ v.T / torch.norm(v)
    image = c @ b
    cosine = torch.nn.functional.cosine_similarity((b @ a).flatten(), (image @ a).flatten(), dim=0)
    return image, float(cosine)


def dense(request: Mapping[str, Any]) -> None:
    """Run the published procedure on an adapter; write nothing."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    start = time.perf_counter()
    factors = load_file(Path(request["adapter"]) / "adapter_model.safetensors")
    cosines: dict[str, float] = {}
    opened: dict[tuple[str, str], Any] = {}
    maps = {d: json.loads((Path(d) / "model.safetensors.index.json").read_text()) for d in request["pair"]}
    for name in request["names"]:
        weights: list[Any] = []
        for directory in request["pair"]:
            key = directory, maps[directory]["weight_map"][name]
            if key not in opened:
                opened[key] = safe_open(Path(directory) / key[1], framework="pt")
            weights.append(opened[key].get_tensor(name).float())
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        v = weights[0] - weights[1]
        a, b = factors[f"{stem}.lora_A.weight"], factors[f"{stem}.lora_B.weight"]
        _, cosines[name.removesuffix(".weight")] = dense_form(v, a, b)
    print(json.dumps({"seconds": time.perf_counter() - start, "cosines": cosines}))


def in_process(request: Mapping[str, Any]) -> None:
    """Time the command's own function repeatedly in this process, without start-up."""
    import contextlib
    import statistics
    import tempfile

    from stayaligned.cli import app

    seconds: dict[str, list[float]] = {source: [] for source in request["arguments"]}
    for turn in range(request["repeats"] + 1):
        for source, arguments in request["arguments"].items():
            with tempfile.TemporaryDirectory(dir=request["home"]) as scratch, contextlib.redirect_stdout(sys.stderr):
                start = time.perf_counter()
                app([*arguments, "--out", str(Path(scratch) / "out")], standalone_mode=False)
                if turn:  # the first turn includes imports
                    seconds[source].append(time.perf_counter() - start)
    print(json.dumps({source: statistics.median(each) for source, each in seconds.items()}))


def gpu(request: Mapping[str, Any]) -> None:
    """Time the maths of one square module on a device; print null if the device is not available."""
    import statistics

    import torch

    from stayaligned.algorithms.alignment_delta import FullDelta
    from stayaligned.algorithms.safe_lora import LoraFactors, ScaledGram, compare

    if request["device"] == "cuda" and not torch.cuda.is_available():
        print("null")
        return
    device = torch.device(request["device"])
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def timed(work: Callable[[], Any]) -> float:
        seconds: list[float] = []
        for turn in range(request["repeats"] + 2):
            wait()
            start = time.perf_counter()
            work()
            wait()
            if turn > 1:
                seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    source = torch.zeros(request["copy_bytes"], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / timed(lambda: target.copy_(source))
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "copy": rate}
    generator = torch.Generator(device).manual_seed(0)
    for width in request["widths"]:
        v = torch.randn(width, width, generator=generator, device=device) / width
        a = torch.randn(RANK, width, generator=generator, device=device) / width**0.5
        factors = LoraFactors(a, torch.randn(width, RANK, generator=generator, device=device), 2.0)
        quick = timed(lambda v=v, f=factors: compare(f, ScaledGram(FullDelta.from_matrix(v))(f)).similarity)
        slow = timed(lambda v=v, f=factors: dense_form(v, f.a, f.b))
        # V is read twice, for VᵀB and for V(VᵀB)
        share = 2 * v.numel() * v.element_size() / quick / rate
        found[str(width)] = {"factor_seconds": quick, "dense_seconds": slow, "ratio": slow / quick, "bandwidth": share}
    print(json.dumps(found))


def main() -> None:
    request = json.loads(Path(sys.argv[2]).read_text())
    roles: dict[str, Callable[[Any], Any]] = {"read": read_ranges, "make_pair": make_pair}
    roles |= {"make_adapters": make_adapters, "dense": dense, "in_process": in_process, "gpu": gpu}
    roles[sys.argv[1]](request)


if __name__ == "__main__":
    main()

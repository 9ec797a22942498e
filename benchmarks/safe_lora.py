"""Measure `stayaligned project` on a pair of checkpoints of Llama-2-7B's shape: whole processes, including start-up.

Run: python benchmarks/safe_lora.py [--layers 8] [--sections time,memory,fleet,subspace,gpu] [--dir DIR]

Creates the pair once (random weights, bf16, 2 GiB shards; the spectrum of V decays as 1/√j, over full-rank rounding
noise) and prints

time      the command, compared with a process that only reads the needed bytes into one buffer that fits the CPU
          cache, and with the published procedure, module by module, with C, BA and CBA as dense matrices. (The
          published code needs more: it holds three models and every C in memory.) The dense form runs on
          `--dense-layers` layers; its time is scaled to all layers, with start-up counted once. Each is measured with a
          cold and with a warm page cache of weights (Python's libraries are always warm, and a host may cache what
          this machine has dropped).
memory    peak resident memory and time on a quarter, a half and all of the layers, and the time of one more layer
fleet     100 adapters in one pass, compared with one
subspace  the rank-64 subspace file: its cost, and projecting from it compared with projecting from the checkpoints,
          both by the command's own function in one process that has imported everything
gpu       the maths of one module, compared with the dense form, and the share of the memory bandwidth; skipped without
          CUDA

and finally one JSON line with every number. This process does not import torch, because a child's peak memory starts
at its parent's.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safe_lora_work import RANK, TARGETS, Shape, byte_ranges, read_ranges

WORK = str(Path(__file__).with_name("safe_lora_work.py"))
SUBSPACE_RANK = 64
COSINES_AGREE = 0.01
"""Tolerance; the dense form computes the cosine of millions of products in fp32."""
SECTIONS = ("time", "memory", "fleet", "subspace", "gpu")


class Run(NamedTuple):
    """One finished process."""

    seconds: float
    peak_mib: float
    output: str


class Bench(NamedTuple):
    """The options and inputs of all sections."""

    options: argparse.Namespace
    shape: Shape
    home: Path
    environment: Mapping[str, str]

    @property
    def pair(self) -> tuple[Path, Path]:
        return self.home / "aligned", self.home / "base"

    def from_pair(self) -> list[str]:
        return ["--aligned", str(self.pair[0]), "--base", str(self.pair[1])]

    def shards(self) -> list[Path]:
        return [file for directory in self.pair for file in sorted(directory.glob("*.safetensors"))]

    def adapter(self, layers: int, count: int | None = None) -> Path:
        """Return the adapter on the first `layers` layers, or a directory of `count` adapters; created at first use."""
        name = f"adapter-{self.options.targets}-{layers}" + (f"-x{count}" if count else "")
        if not (self.home / name).exists():
            request = {"path": str(self.home / name), "layers": layers, "count": count, "aligned": str(self.pair[0])}
            child("make_adapters", {**request, "targets": self.options.targets, "shape": self.shape}, self.environment)
        return self.home / name

    def project(self, *adapters: Path) -> tuple[Run, dict[str, float]]:
        """Run `stayaligned project`; also return the similarities if there is one adapter."""
        with tempfile.TemporaryDirectory(dir=self.home) as scratch:
            out = Path(scratch) / "out"
            command = ["project", *map(str, adapters), *self.from_pair(), "--out", str(out), "--all"]
            finished = run([sys.executable, "-m", "stayaligned", *command], self.environment)
            record = out / "projection.json"
            rows = json.loads(record.read_text())["layers"] if record.is_file() else []
            return finished, {row["module"]: row["similarity"] for row in rows}

    def read(self, layers: int) -> Run:
        """Run a process that only reads the bytes that projecting the first `layers` layers needs."""
        names = list(self.shape.linears(TARGETS[self.options.targets], layers))
        reads = [(str(file), *where) for directory in self.pair for file, *where in byte_ranges(directory, names)]
        with tempfile.NamedTemporaryFile("w", dir=self.home, suffix=".json") as request:
            json.dump(reads, request)
            request.flush()
            return run([sys.executable, "-I", "-S", WORK, "read", request.name], self.environment)

    def needed_bytes(self, layers: int | None = None) -> int:
        """Return the bytes of both checkpoints (bf16) that projecting the first `layers` layers needs."""
        sizes = self.shape.linears(TARGETS[self.options.targets], layers).values()
        return 2 * 2 * sum(math.prod(size) for size in sizes)


# Processes and the page cache


def run(command: Sequence[str], environment: Mapping[str, str]) -> Run:
    """Run a command to its end; if it fails, exit with its output."""
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(environment))
        # wait4 gives the kernel's record of this child's peak; polling would miss the last milliseconds
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\nexited with {process.returncode}:\n{text[-3000:]}")
    return Run(seconds, usage.ru_maxrss / 1024, text)


def child(role: str, request: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[Run, Any]:
    """Run a role of `safe_lora_work.py` in its own process; also return the JSON that it printed last."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(request, file)
        file.flush()
        finished = run([sys.executable, WORK, role, file.name], environment)
    return finished, json.loads(finished.output.strip().splitlines()[-1] if finished.output.strip() else "null")


def drop_cache(files: Sequence[Path]) -> None:
    """Ask the kernel to drop the files from the page cache, which it does for pages that are written to disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def fill_cache(files: Sequence[Path]) -> None:
    for file in files:
        read_ranges([(str(file), 0, file.stat().st_size)])


def cached_share(files: Sequence[Path]) -> float:
    """Return the share of the files' pages that are in the page cache, by mincore."""
    cached = total = 0
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    for file in files:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as view:
            pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
            start = ctypes.c_char.from_buffer(view)  # ctypes needs a writable view
            if mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(view)), pages):
                raise OSError(ctypes.get_errno(), "mincore failed", str(file))
            del start
            cached += bytes(pages).count(1)
            total += len(pages)
    return cached / total


# The sections


def measure_time(bench: Bench) -> dict[str, Any]:
    options, layers = bench.options, bench.shape.layers
    adapter, needed = bench.adapter(layers), bench.needed_bytes()
    dense_layers = min(options.dense_layers, layers)
    names = list(bench.shape.linears(TARGETS[options.targets], dense_layers))
    request = {"adapter": str(adapter), "pair": [str(directory) for directory in bench.pair], "names": names}
    found: dict[str, Any] = {"needed_bytes": needed, "dense_layers": dense_layers}
    bench.project(adapter)  # bring Python's files into the page cache, and write its bytecode
    print(f"\nwhole process, {needed / 1e9:.2f} GB needed; dense measured on {dense_layers} of {layers} layers")
    print(f"{'page cache':12}{'project':>20}{'reading':>20}{'dense':>10}{'project/reading':>17}{'dense/project':>15}")
    for state, prepare in (("cold", drop_cache), ("warm", fill_cache)):
        shares: list[float] = []
        projecting: list[float] = []
        reading: list[float] = []
        similarities: dict[str, float] = {}
        for _ in range(options.repeats):
            shares.append(bring_cache(bench, prepare))
            finished, similarities = bench.project(adapter)
            projecting.append(finished.seconds)
            shares.append(bring_cache(bench, prepare))
            reading.append(bench.read(layers).seconds)
        shares.append(bring_cache(bench, prepare))
        whole, inside = child("dense", request, bench.environment)
        start_up = whole.seconds - inside["seconds"]
        scaled = start_up + inside["seconds"] * layers / dense_layers
        ours, theirs = statistics.median(projecting), statistics.median(reading)
        difference = max(abs(similarities[module] - cosine) for module, cosine in inside["cosines"].items())
        if difference > COSINES_AGREE:
            raise SystemExit(
                f"the cosines of the two procedures differ by {difference:.3f}: they don't compute the same values"
            )
        found[state] = {
            "cached": shares,
            "project_seconds": projecting,
            "reading_seconds": reading,
            "dense_seconds": whole.seconds,
            "dense_start_up_seconds": start_up,
            "dense_scaled_seconds": scaled,
            "project_over_reading": ours / theirs,
            "dense_over_project": scaled / ours,
            "largest_cosine_difference": difference,
        }
        rates = [f"{seconds:.2f} s{needed / seconds / 1e9:6.2f} GB/s" for seconds in (ours, theirs)]
        where = f"{state} {statistics.mean(shares):.0%}"
        print(
            f"{where:12}{rates[0]:>20}{rates[1]:>20}{scaled:8.1f} s{ours / theirs:16.2f}×{scaled / ours:14.1f}×"
            f"   cosines agree to {difference:.1e}"
        )
    print("claimed: project/reading ≤ 1.5, dense/project ≥ 20")
    return found


def bring_cache(bench: Bench, prepare: Callable[[Sequence[Path]], None]) -> float:
    """Drop or fill the pair's pages, and the share that then lies in the page cache."""
    prepare(bench.shards())
    return cached_share(bench.shards())


def measure_memory(bench: Bench) -> dict[str, Any]:
    counts = sorted({max(1, bench.shape.layers // part) for part in (4, 2, 1)})
    fill_cache(bench.shards())
    rows: list[dict[str, float]] = []
    print(f"\n{'layers':>8}{'seconds':>10}{'reading':>10}{'peak resident, MiB':>20}   page cache warm")
    bench.project(bench.adapter(counts[0]))
    for count in counts:
        runs = [(bench.project(bench.adapter(count))[0], bench.read(count)) for _ in range(bench.options.repeats)]
        seconds, reading = (statistics.median(run.seconds for run in each) for each in zip(*runs, strict=True))
        peak = max(run.peak_mib for run, _ in runs)
        rows.append({"layers": count, "seconds": seconds, "reading_seconds": reading, "peak_mib": peak})
        print(f"{count:8}{seconds:10.2f}{reading:10.2f}{peak:20.0f}")
    ours, theirs = (fit_line(counts, [row[key] for row in rows]) for key in ("seconds", "reading_seconds"))
    print(f"project: {ours[0]:.2f} s to start, {ours[1]:.3f} s per layer, at most {ours[2]:.1%} off the line")
    print(
        f"reading: {theirs[0]:.2f} s to start, {theirs[1]:.3f} s per layer; one more layer {ours[1] / theirs[1]:.2f}×"
    )
    print("claimed: peak ≤ 1024 MiB and flat, time linear")
    return {"runs": rows, "project_line": ours, "reading_line": theirs}


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Return (value at 0, slope, largest relative distance of a point from the line) of the least-squares line."""
    if len(x) < 2:
        return 0.0, y[0] / x[0], 0.0
    slope, start = statistics.linear_regression(x, y)
    return start, slope, max(abs(start + slope * at - value) / value for at, value in zip(x, y, strict=True))


def measure_fleet(bench: Bench) -> dict[str, Any]:
    count, layers = bench.options.adapters, bench.shape.layers
    fleet = sorted(bench.adapter(layers, count).iterdir())
    fill_cache([*bench.shards(), *(adapter / "adapter_model.safetensors" for adapter in fleet)])
    bench.project(fleet[0])
    one = [bench.project(fleet[0])[0] for _ in range(bench.options.repeats)]
    many, single = bench.project(*fleet)[0], statistics.median(run.seconds for run in one)
    print(f"\nadapters in one pass, warm: 1 in {single:.2f} s, {one[0].peak_mib:.0f} MiB; ", end="")
    print(f"{count} in {many.seconds:.2f} s, {many.peak_mib:.0f} MiB: {many.seconds / single:.1f}×  (claimed: ≤ 2)")
    return {"adapters": count, "one_seconds": single, "seconds": many.seconds, "peak_mib": many.peak_mib}


def measure_subspace(bench: Bench) -> dict[str, Any]:
    adapter = str(bench.adapter(bench.shape.layers))
    pair = bench.from_pair()
    fill_cache(bench.shards())
    with tempfile.TemporaryDirectory(dir=bench.home) as scratch:
        file = Path(scratch) / "subspace.safetensors"
        build = ["subspace", "build", *pair, "--rank", str(SUBSPACE_RANK), "--out", str(file)]
        built = run([sys.executable, "-m", "stayaligned", *build], bench.environment)
        size = file.stat().st_size
        arguments = {
            "checkpoints": ["project", adapter, *pair, "--all"],
            "subspace": ["project", adapter, "--subspace", str(file), "--all"],
        }
        request = {"home": str(bench.home), "repeats": bench.options.repeats, "arguments": arguments}
        _, seconds = child("in_process", request, bench.environment)
    ratio = seconds["checkpoints"] / seconds["subspace"]
    print(f"\nrank-{SUBSPACE_RANK} subspace file: built in {built.seconds:.1f} s, {built.peak_mib:.0f} MiB; ", end="")
    print(f"{size / 1e6:.0f} MB on disk. One adapter, in process: {seconds['checkpoints']:.3f} s from the ", end="")
    print(f"checkpoints, {seconds['subspace']:.3f} s from the file: {ratio:.1f}×  (claimed: ≥ 20)")
    return {"build_seconds": built.seconds, "build_peak_mib": built.peak_mib, "bytes": size, **seconds, "ratio": ratio}


def measure_gpu(bench: Bench) -> dict[str, Any] | None:
    request = {"device": "cuda", "widths": [4096, 8192], "repeats": 20, "copy_bytes": 1 << 30}
    _, found = child("gpu", request, bench.environment)
    if found is None:
        print("\ngpu: skipped, because no GPU is available")
        return None
    print(f"\n{found['device']}, copies at {found['copy'] / 1e9:.0f} GB/s; rank {RANK}, fp32")
    for width in map(str, request["widths"]):
        row = found[width]
        ours, theirs = row["factor_seconds"] * 1e3, row["dense_seconds"] * 1e3
        print(f"{width}²: {ours:.3f} ms against {theirs:.3f} ms dense: ", end="")
        print(f"{row['ratio']:.0f}×, {row['bandwidth']:.0%} of the bandwidth  (claimed: ≥ 100)")
    return found


def prepare(options: argparse.Namespace) -> Bench:
    shape = Shape(options.hidden, options.intermediate, options.layers)
    home = options.dir / f"llama-{shape.hidden}x{shape.intermediate}-{shape.layers}layers"
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    if not home.exists():
        options.dir.mkdir(parents=True, exist_ok=True)
        needed = 4 * sum(math.prod(size) for size in shape.tensors().values())
        if shutil.disk_usage(options.dir).free < 1.1 * needed:
            raise SystemExit(
                f"{options.dir}: the pair needs {needed / 1e9:.0f} GB; give another --dir or fewer --layers"
            )
        print(f"creating the pair, {needed / 1e9:.1f} GB", flush=True)
        request = {"path": str(home), "shape": shape, "shard_bytes": options.shard_mib << 20}
        child("make_pair", request, environment)
    return Bench(options, shape, home, environment)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(tempfile.gettempdir()) / "stayaligned-safe-lora"
    parser.add_argument("--dir", type=Path, default=default, help="where the checkpoints are cached between runs")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--targets", choices=sorted(TARGETS), default="all")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dense-layers", type=int, default=1)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    for name, value in (("hidden", 4096), ("intermediate", 11008), ("shard-mib", 2048)):
        parser.add_argument(f"--{name}", type=int, default=value, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = set(options.sections.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown section: {', '.join(sorted(unknown))}; sections: {', '.join(SECTIONS)}")
    return options


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    options = parse(sys.argv[1:])
    bench = prepare(options)
    shape, modules = bench.shape, len(bench.shape.linears(TARGETS[options.targets]))
    print(f"hidden {shape.hidden}, intermediate {shape.intermediate}, {shape.layers} layers, bf16; ", end="")
    print(f"LoRA rank {RANK} on {modules} modules; threads: {options.threads}")
    measures: dict[str, Callable[[Bench], Any]] = {
        "time": measure_time,
        "memory": measure_memory,
        "fleet": measure_fleet,
        "subspace": measure_subspace,
        "gpu": measure_gpu,
    }
    found = {section: measures[section](bench) for section in SECTIONS if section in options.sections.split(",")}
    settings = {"shape": shape._asdict(), "targets": options.targets, "threads": options.threads}
    print(json.dumps({**settings, "load_average": os.getloadavg(), **found}))


if __name__ == "__main__":
    main()

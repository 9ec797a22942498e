"""The cost of Lisa: time per optimizer step and memory, compared with plain training and with the published step.

Run: python benchmarks/lisa.py [--device cpu|cuda] [--size 1b|8b] [--steps 40] [--model DIR]

On the CPU the trainers train on the same rows and take turns, one optimizer step each, so that a busy machine slows
them equally. Every round gives a ratio; the median and quartiles are printed, for wall-clock time and for CPU time,
which excludes other programs. `sum` is the ratio of the total times, including steps that log, or begin a phase and
copy the weights. A second plain trainer shows the spread of two equal trainers: the memory addresses of a model's
weights change the time by a percent or two. Extra memory is that of the tensors in Python above plain training, in
copies of the trainable weights; while the proximal gradient is added, the differences use up to 256 MiB more.

On a GPU (--device cuda) the trainers run one after the other in bf16, because peak memory is measured for the device:
plain, Lisa, and Lisa with its anchor in main memory. The last line is JSON with every figure.

With --model, a LoRA on the model in that directory is trained on the CPU instead, on 4 rows of 64 tokens a step.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import gc
import json
import resource
import statistics
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice, pairwise, permutations
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lisa_published import PublishedTrainer
from stayaligned import LisaSettings, with_lisa
from stayaligned.algorithms.lisa import RowStream, row_indices_at
from stayaligned.algorithms.lisa_schedule import BiStateSchedule
from stayaligned.hf.features import PaddingCollator
from stayaligned.testing import pico_config

LISA = LisaSettings(alignment_steps=4, finetuning_steps=16, rho=1.0)
SEED = 7
Row = dict[str, list[int]]


class Shape(NamedTuple):
    """A Llama and its batch."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    rows: int
    tokens: int

    def config(self) -> Any:
        return pico_config(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=2048,
        )


CPU_SHAPE = Shape(384, 1024, 4, 6, 6, 1024, rows=4, tokens=256)
MANY_TENSORS = Shape(32, 64, 32, 4, 4, 1024, rows=1, tokens=8)
"""As many LoRA tensors as Llama-2-7B (448), with almost no computation: the cost of a step in Python."""
GPU_SHAPES = {
    "1b": Shape(2048, 8192, 16, 32, 8, 128_256, rows=4, tokens=512),
    "8b": Shape(4096, 14_336, 32, 32, 8, 128_256, rows=4, tokens=512),
}


class Feed(NamedTuple):
    """The rows of a run for any trainer: those that Lisa's schedule draws from the user's and the alignment rows."""

    user: Sequence[Row]
    safe: Sequence[Row]
    taken: Sequence[Row]
    """All drawn rows, in the order in which Lisa takes them."""
    safe_taken: Sequence[Row]
    """The drawn rows of the alignment phase."""


def random_rows(count: int, shape: Shape, seed: int) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(5, shape.vocabulary, (count, shape.tokens), generator=generator).tolist()
    return [{"input_ids": ids, "labels": ids} for ids in made]


def schedule_rows(
    user: Sequence[Row], safe: Sequence[Row], lisa: LisaSettings, *, steps: int, rows: int, seed: int = SEED
) -> Feed:
    schedule = BiStateSchedule(lisa.alignment_steps, lisa.finetuning_steps)
    streams = {
        "finetuning": RowStream(len(user), seed, "finetuning"),
        "alignment": RowStream(len(safe), seed, "alignment"),
    }
    taken = [i for step in range(steps) for i in row_indices_at(step, schedule, rows_per_step=rows, **streams)]
    both = [*user, *safe]
    return Feed(user, safe, [both[i] for i in taken], [both[i] for i in taken if i >= len(user)])


# The trainers


class Job(NamedTuple):
    """One training that several trainers run."""

    shape: Shape
    lora: bool
    steps: int
    lisa: LisaSettings = LISA
    device: str = "cpu"
    checkpoint: str = ""
    """Directory of the model to train; empty for random weights in this shape."""

    def model(self) -> Any:
        torch.manual_seed(0)
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        with torch.device(self.device):
            model = (
                AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=dtype)
                if self.checkpoint
                else AutoModelForCausalLM.from_config(self.shape.config(), dtype=dtype)
            )
            return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")) if self.lora else model

    def feed(self) -> Feed:
        user, safe = random_rows(64, self.shape, 1), random_rows(64, self.shape, 2)
        return schedule_rows(user, safe, self.lisa, steps=self.steps, rows=self.shape.rows)

    def trainer(self, arm: str, directory: str) -> Trainer:
        """Build the plain trainer, Lisa or the published step, on the same rows in the same order."""
        rows = self.feed()
        arguments = TrainingArguments(
            output_dir=directory,
            use_cpu=self.device == "cpu",
            bf16=self.device != "cpu",
            per_device_train_batch_size=self.shape.rows,
            num_train_epochs=1,
            max_steps=self.steps if arm == "Lisa" else -1,
            save_strategy="no",
            logging_steps=10,
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
            train_sampling_strategy="random" if arm == "Lisa" else "sequential",
        )
        given: dict[str, Any] = {"args": arguments, "data_collator": PaddingCollator(0)}
        match arm:
            case "Lisa":
                given |= {"train_dataset": rows.user, "alignment_dataset": rows.safe, "lisa": self.lisa}
                trainer = with_lisa(Trainer)(self.model(), **given)
            case "published":
                # For each alignment row it draws and discards one user row: here the same row.
                given |= {"train_dataset": rows.taken, "alignment_dataset": rows.safe_taken, "lisa": self.lisa}
                trainer = PublishedTrainer(self.model(), **given)
            case _:
                trainer = Trainer(self.model(), train_dataset=rows.taken, **given)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def first_proximal_step(self) -> int:
        """Return the first step with the proximal term, after the warm-up of the published code."""
        return self.lisa.first_proximal_step(self.steps)


# Time


class Turns(TrainerCallback):
    """A callback that lets a trainer take one step at a time, and records the seconds of every step."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.began = (0.0, 0.0)

    def take(self) -> None:
        self.go.release()
        self.done.acquire()

    def begin(self) -> None:
        self.go.acquire()
        self.began = time.perf_counter(), time.process_time()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.wall.append(time.perf_counter() - self.began[0])
        self.cpu.append(time.process_time() - self.began[1])
        self.done.release()
        if state.global_step < state.max_steps:
            self.begin()  # the time after a step, such as logging, counts for the next step


def take_turns(trainers: Sequence[Trainer], steps: int) -> list[Turns]:
    """Train all, one step each in turn, in every order equally often, because the previous step changes the caches."""

    def run(trainer: Trainer) -> None:
        try:
            trainer.train()
        except BaseException:  # the other threads would wait without limit
            traceback.print_exc()
            os._exit(1)

    turns = [Turns() for _ in trainers]
    threads = [threading.Thread(target=run, args=(trainer,)) for trainer in trainers]
    for trainer, turn, thread in zip(trainers, turns, threads, strict=True):
        trainer.add_callback(turn)
        thread.start()
    for order in islice(cycle(permutations(turns)), steps):
        for turn in order:
            turn.take()
    for thread in threads:
        thread.join()
    return turns


class Ratio(NamedTuple):
    """The ratio of two trainers' step times over the rounds."""

    low: float
    median: float
    high: float
    sum: float
    difference: float
    """Median difference, in seconds."""

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f}), sum {self.sum:.3f}"


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    quartiles = statistics.quantiles([a / b for a, b in zip(above, below, strict=True)], n=4, method="inclusive")
    difference = statistics.median(a - b for a, b in zip(above, below, strict=True))
    return Ratio(*quartiles, sum(above) / sum(below), difference)


def measure_time(job: Job, directory: str) -> dict[str, Any]:
    arms, warmup = ("plain", "plain again", "Lisa", "published"), job.first_proximal_step() + 1
    turns = take_turns([job.trainer(arm, directory) for arm in arms], job.steps)
    wall = {arm: turn.wall[warmup:] for arm, turn in zip(arms, turns, strict=True)}
    cpu = {arm: turn.cpu[warmup:] for arm, turn in zip(arms, turns, strict=True)}
    return {
        "rounds": job.steps - warmup,
        "step_seconds": {arm: statistics.median(seconds) for arm, seconds in wall.items()},
        "ratios": {
            f"{above}/{below}": {"wall": ratio(wall[above], wall[below]), "cpu": ratio(cpu[above], cpu[below])}
            for above, below in (("plain again", "plain"), ("Lisa", "plain"), ("published", "Lisa"))
        },
    }


# Memory


def held_bytes() -> int:
    """Return the bytes of all tensors in Python; shared memory is counted once."""
    gc.collect()
    storages = [item.untyped_storage() for item in gc.get_objects() if issubclass(type(item), Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Scales(TrainerCallback):
    """A callback that measures memory at the end of a step in the second phase."""

    def __init__(self, step: int) -> None:
        self.step, self.held = step, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.held = held_bytes()


def measure_memory(shape: Shape, lora: bool, directory: str) -> dict[str, float]:
    """Measure the memory of each trainer above a plain one, in copies of the trainable weights."""
    lisa = replace(LISA, alignment_steps=2, finetuning_steps=2)
    job = Job(shape._replace(rows=1, tokens=8), lora, steps=6, lisa=lisa)
    without_term = job._replace(lisa=replace(lisa, rho=0.0))
    weights = sum(p.numel() * p.element_size() for p in job.model().parameters() if p.requires_grad)
    runs = {"plain": ("plain", job), "Lisa": ("Lisa", job), "Lisa, rho=0": ("Lisa", without_term)}
    bytes_held: dict[str, int] = {}
    for name, (arm, this) in {**runs, "published": ("published", job)}.items():
        before, scales = held_bytes(), Scales(4)
        trainer = this.trainer(arm, directory)
        trainer.add_callback(scales)
        trainer.train()
        bytes_held[name] = scales.held - before
        del trainer
    copies = {name: (count - bytes_held["plain"]) / weights for name, count in bytes_held.items() if name != "plain"}
    return {"trainable_mib": weights / 2**20, **copies}


class Case(NamedTuple):
    """One row of the table."""

    shape: Shape
    lora: bool
    claim: str


CASES = {
    "LoRA": Case(CPU_SHAPE, True, "Lisa/plain <= 1.02; one copy, none with rho=0"),
    "full weights": Case(CPU_SHAPE, False, "Lisa/plain <= 1.05; one copy, none with rho=0"),
    "bookkeeping": Case(MANY_TENSORS, True, "nothing; a LoRA with tiny matrices"),
}


def measure_cpu(steps: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    print(f"CPU, {torch.get_num_threads()} thread, fp32; medians, quartiles in brackets")
    for name, (shape, lora, claim) in CASES.items():
        job = Job(shape, lora, steps)
        count = sum(p.numel() for p in job.model().parameters())
        print(f"\n{name}: Llama, hidden {shape.hidden} x {shape.layers} layers, {count / 1e6:.1f}M weights; ", end="")
        with tempfile.TemporaryDirectory() as directory:
            times, memory = measure_time(job, directory), measure_memory(shape, lora, directory)
        found[name] = {**times, "extra_copies": memory}
        each = ", ".join(f"{arm} {seconds * 1e3:.0f} ms" for arm, seconds in times["step_seconds"].items())
        print(f"{shape.rows} rows of {shape.tokens} tokens a step; {times['rounds']} rounds\na step of {each}")
        print(f"{'':19}{'wall-clock time':40}{'CPU time':40}CPU time more")
        for pair, of in times["ratios"].items():
            print(f"{pair:19}{of['wall']!s:40}{of['cpu']!s:40}{of['cpu'].difference * 1e3:.1f} ms a step")
        copies = ", ".join(f"{key} {value:.2f}" for key, value in memory.items() if key != "trainable_mib")
        print(f"extra memory, in copies of the {memory['trainable_mib']:.1f} MiB of trainable weights: {copies}")
        print(f"claimed: {claim}", flush=True)
    return found


def measure_checkpoint(checkpoint: str, steps: int) -> dict[str, Any]:
    c = AutoConfig.from_pretrained(checkpoint)
    shape = Shape(
        c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads,
        c.vocab_size, rows=4, tokens=64,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        times = measure_time(Job(shape, True, steps, checkpoint=checkpoint), directory)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{checkpoint}: LoRA on all linear layers, {shape.rows} rows of {shape.tokens} tokens a step")
    for arm, seconds in times["step_seconds"].items():
        print(f"{arm:12} {seconds:.2f} s a step")
    for pair, of in times["ratios"].items():
        print(f"{pair:19}{of['wall']!s:40}{of['cpu']!s:40}")
    print(f"peak memory of the process with {len(times['step_seconds'])} copies of the model: {peak:.2f} GiB")
    return {**times, "peak_gib": peak}


# One after the other on a GPU


class Stopwatch(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.ends.append(time.perf_counter())


def run_alone(job: Job, arm: str) -> float:
    """Train with one trainer, and return the median seconds of a step with the proximal term."""
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as directory:
        trainer = job.trainer(arm, directory)
        trainer.add_callback(watch)
        trainer.train()
    measured = watch.ends[job.first_proximal_step() :]
    return statistics.median(after - before for before, after in pairwise(measured))


def measure_gpu(size: str, steps: int) -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        print("\ngpu: skipped: no GPU")
        return None
    shape, device = GPU_SHAPES[size], torch.cuda.get_device_name()
    on_cpu = replace(LISA, anchor_device="cpu")
    arms = {"plain": ("plain", LISA), "Lisa": ("Lisa", LISA), "Lisa, anchor on the CPU": ("Lisa", on_cpu)}
    found: dict[str, Any] = {}
    print(f"\n{device}; Llama of {size}, bf16, {shape.rows} rows of {shape.tokens} tokens a step; {steps} steps each")
    for kind in ("LoRA", "full"):
        for name, (arm, lisa) in arms.items():
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                seconds = run_alone(Job(shape, kind == "LoRA", steps, lisa, "cuda"), arm)
            except torch.cuda.OutOfMemoryError:
                print(f"{kind:6}{name:25}does not fit")
                continue
            peak = torch.cuda.max_memory_allocated()
            found[f"{kind}, {name}"] = {"step_seconds": seconds, "peak_bytes": peak}
            plain = found.get(f"{kind}, plain", {}).get("step_seconds", float("nan"))
            print(f"{kind:6}{name:25}{seconds * 1e3:8.1f} ms{seconds / plain:8.3f} of plain{peak / 2**30:9.2f} GiB")
    return {"device": device, "size": size, **found}


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the CPU, and the GPU if there is one")
    parser.add_argument("--size", choices=sorted(GPU_SHAPES), default="1b", help="size of the model on the GPU")
    parser.add_argument(
        "--steps", type=int, default=40, help="optimizer steps of each trainer, including a tenth for warm-up"
    )
    parser.add_argument("--model", help="directory of a model to train a LoRA on, instead of random models")
    options = parser.parse_args()
    if options.model:
        print(json.dumps(measure_checkpoint(options.model, options.steps)))
        return
    found: dict[str, Any] = {"steps": options.steps, "load_average": os.getloadavg()}
    if options.device != "cuda":
        found["cpu"] = measure_cpu(options.steps)
    if options.device != "cpu":
        found["gpu"] = measure_gpu(options.size, options.steps)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

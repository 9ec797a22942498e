"""What Lisa costs: time of an optimizer step against plain training on the same rows, and memory for the anchor.

    python benchmarks/lisa.py

The two trainers take turns, a block of steps each, so that a busy machine slows both. Every pair of blocks gives one
ratio; printed are their median and quartiles. The plain trainer is fed the rows that Lisa's schedule draws.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import tempfile
import threading
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from stayaligned import Lisa, attach_lisa
from stayaligned.bistate import BiStateSchedule, RowStream
from stayaligned.hf.features import PaddingCollator
from stayaligned.testing import pico_model

HIDDEN, LAYERS, LENGTH, BATCH = 256, 4, 64, 4
BLOCKS, STEPS = 12, 4
LISA = Lisa(alignment_steps=2, finetuning_steps=3, rho=1.0, proximal_warmup_ratio=0.0)


def rows(count: int, first: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(first)
    made = torch.randint(5, 261, (count, LENGTH), generator=generator).tolist()
    return [{"input_ids": ids, "labels": ids} for ids in made]


USER, SAFE = rows(64, 1), rows(64, 2)


class Turns(TrainerCallback):
    """Lets the trainer run only while it is its turn, and keeps the seconds of each block of `STEPS` steps."""

    def __init__(self, mine: threading.Semaphore, others: threading.Semaphore) -> None:
        self.mine, self.others = mine, others
        self.seconds: list[float] = []
        self.started = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.mine.acquire()
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % STEPS == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.started)
            self.others.release()
            if state.global_step < state.max_steps:
                self.mine.acquire()
            self.started = time.perf_counter()


def trainer(lora: bool, with_lisa: bool, directory: str) -> Trainer:
    torch.manual_seed(0)
    model: Any = pico_model(
        hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS, num_key_value_heads=4
    )
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    arguments = TrainingArguments(
        output_dir=directory,
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=BATCH,
        max_steps=BLOCKS * STEPS,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=7,
        train_sampling_strategy="random" if with_lisa else "sequential",
    )
    user = USER if with_lisa else scheduled_rows(BLOCKS * STEPS)
    made = Trainer(model, arguments, train_dataset=user, data_collator=PaddingCollator(0))
    return attach_lisa(made, alignment_dataset=SAFE, lisa=LISA) if with_lisa else made


def scheduled_rows(steps: int) -> list[dict[str, list[int]]]:
    """The rows of Lisa's first steps, in order."""
    schedule = BiStateSchedule(LISA.alignment_steps, LISA.finetuning_steps)
    user, safe = RowStream(len(USER), 7, "finetuning"), RowStream(len(SAFE), 7, "alignment")
    both = [*USER, *SAFE]
    return [
        both[index]
        for step in range(steps)
        for index in schedule.indices_at(step, rows_per_step=BATCH, finetuning=user, alignment=safe)
    ]


def measure(lora: bool, directory: str) -> str:
    turns = threading.Semaphore(1), threading.Semaphore(0)
    trainers = [trainer(lora, with_lisa, directory) for with_lisa in (False, True)]
    clocks = [Turns(turns[0], turns[1]), Turns(turns[1], turns[0])]
    threads = []
    for made, clock in zip(trainers, clocks, strict=True):
        made.add_callback(clock)
        made.remove_callback(PrinterCallback)
        threads.append(threading.Thread(target=made.train))
        threads[-1].start()
    for thread in threads:
        thread.join()
    # The first pair of blocks warms up.
    plain, ours = (clock.seconds[1:] for clock in clocks)
    low, middle, high = statistics.quantiles([b / a for a, b in zip(plain, ours, strict=True)], n=4)
    trained = [p for p in trainers[1].model.parameters() if p.requires_grad]  # pyright: ignore
    anchor = sum(p.numel() * p.element_size() for p in trained)
    return (
        f"{'LoRA' if lora else 'full weights':12}  {statistics.median(plain) / STEPS * 1e3:8.1f} ms  "
        f"{statistics.median(ours) / STEPS * 1e3:8.1f} ms  {middle:6.3f} ({low:.3f} to {high:.3f})  "
        f"{anchor / 2**20:6.2f} MiB for {sum(p.numel() for p in trained):,} weights"
    )


def main() -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread"
    print(f"Llama, hidden {HIDDEN} x {LAYERS} layers, {BATCH} rows of {LENGTH} tokens a step; {device}")
    print(f"{BLOCKS - 1} pairs of blocks of {STEPS} optimizer steps; median and quartiles of the ratio")
    print("              plain step    Lisa step   ratio                    anchor")
    for lora in (True, False):
        with tempfile.TemporaryDirectory() as directory:
            print(measure(lora, directory), flush=True)


if __name__ == "__main__":
    main()

"""Train with Lisa in forks of a process that has imported torch, so that starting one takes tenths of a second.

    python support/forks.py COMMAND DIRECTORY …

A command forks, kills and waits, and prints what it observed as one JSON line; the weights are in `DIRECTORY/NAME/end`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from stayaligned import Guard, LisaSettings, Watch, attach_watch, with_lisa
from stayaligned.core.errors import StayalignedError
from stayaligned.hf.features import PaddingCollator
from stayaligned.hf.training.finetuning import save_trained, train
from stayaligned.testing import byte_tokenizer, pico_model

LISA = LisaSettings(alignment_steps=2, finetuning_steps=3, rho=0.7)
STEPS = 120
"""Number of steps of a run that is killed; the phase changes 47 times."""


def feature_rows(first: int, count: int) -> list[dict[str, list[int]]]:
    made = [[first, *range(10 + i, 14 + 2 * i)] for i in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def prompt_rows(answer: str, count: int) -> Dataset:
    return Dataset.from_list([{"prompt": f"wug {i}", "completion": f"{answer} {i}"} for i in range(count)])


def lora_trainer(settings: dict[str, Any], dropout: float = 0.1) -> Trainer:
    model = get_peft_model(pico_model(seed=3), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=dropout))
    rows: dict[str, Any] = {"train_dataset": feature_rows(3, 15), "alignment_dataset": feature_rows(2, 5)}
    arguments = TrainingArguments(**settings)
    return with_lisa(Trainer)(model, arguments, data_collator=PaddingCollator(0), lisa=LISA, **rows)


def sft_trainer(settings: dict[str, Any]) -> Trainer:
    """Return TRL's trainer of all weights, with dropout in the attention."""
    rows: dict[str, Any] = {"train_dataset": prompt_rows("blick", 15), "alignment_dataset": prompt_rows("no", 5)}
    model = pico_model(seed=3, attention_dropout=0.1)
    arguments = SFTConfig(bf16=False, gradient_checkpointing=False, max_length=64, **settings)
    return with_lisa(SFTTrainer)(model, arguments, processing_class=byte_tokenizer(), lisa=LISA, **rows)


def plain_trainer(
    settings: dict[str, Any],
    *,
    lora: bool,
    streamed: bool = False,
    watched: bool = False,
    state_dict: str = "",
    lisa: LisaSettings = LISA,
) -> Trainer:
    """Return transformers' Trainer, of streams, or sharded by FSDP2 with the given kind of state dict to save.

    With a guard, the run is also evaluated before it trains, and rolled back from step 10 to step 8.
    """
    model: Any = pico_model(seed=3)
    if lora:
        # The divergence of a fresh LoRA is zero, so an error of its scale would not be visible.
        fresh = lisa.alignment_loss != "kl"
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=fresh))
    rows: dict[str, Any] = {"train_dataset": feature_rows(3, 15), "alignment_dataset": feature_rows(2, 5)}
    if streamed:
        rows = {name: Dataset.from_list(each).to_iterable_dataset() for name, each in rows.items()}
        settings = {**settings, "accelerator_config": {"dispatch_batches": False}}
    if state_dict:
        wrapping = {
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        }
        settings = {**settings, "fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": state_dict, **wrapping}}
    arguments = TrainingArguments(**settings)
    if state_dict:
        assert arguments.device.type == "cpu"  # reading the device initializes the process group
        # On CPUs accelerate would silently use DDP.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if watched:
        arguments.eval_on_start = True
        rows |= {"eval_dataset": feature_rows(3, 4), "processing_class": byte_tokenizer()}
    trainer = with_lisa(Trainer)(model, arguments, data_collator=PaddingCollator(0), lisa=lisa, **rows)
    assert trainer.is_fsdp_enabled is bool(state_dict)
    if watched:
        prompts = Path(str(arguments.output_dir)).with_suffix(".jsonl")
        prompts.write_text("".join(json.dumps({"prompt": f"wug {i}"}) + "\n" for i in range(3)))
        guard = Guard(measure="refusal_margin", tolerance=0.14, action="rollback")
        watch = Watch(every_steps=2, prompts=str(prompts), refusal="zz", compliance="$%&", guard=guard)
        attach_watch(trainer, watch)
    return trainer


def preferring_trainer(settings: dict[str, Any]) -> Trainer:
    """Return a trainer with DPO in the alignment phase."""
    model = get_peft_model(pico_model(seed=3), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.0))
    pairs = Dataset.from_list([{"prompt": f"wug {i}", "chosen": "no", "rejected": "wug" * (1 + i)} for i in range(5)])

    def build(model: Any) -> Trainer:
        shared = {key: settings[key] for key in ("output_dir", "use_cpu", "disable_tqdm", "report_to")}
        arguments = DPOConfig(**shared, bf16=False, gradient_checkpointing=False)
        return DPOTrainer(model, args=arguments, train_dataset=pairs, processing_class=byte_tokenizer())

    rows: Any = feature_rows(3, 15)
    arguments = TrainingArguments(**settings)
    collator = PaddingCollator(0)
    return with_lisa(Trainer)(
        model, arguments, data_collator=collator, train_dataset=rows, alignment_trainer=build, lisa=LISA
    )


KL = replace(LISA, alignment_loss="kl")
DECOUPLED = replace(LISA, proximal="decoupled", rho=20.0, drift_from_start=True)
TRAINERS: dict[str, Callable[[dict[str, Any]], Trainer]] = {
    "full": functools.partial(plain_trainer, lora=False),
    "full, sharded": functools.partial(plain_trainer, lora=False, state_dict="FULL_STATE_DICT"),
    "lora, decoupled": functools.partial(plain_trainer, lora=True, lisa=DECOUPLED),
    "lora, decoupled, sharded": functools.partial(
        plain_trainer, lora=True, lisa=DECOUPLED, state_dict="SHARDED_STATE_DICT"
    ),
    "full, watched": functools.partial(plain_trainer, lora=False, watched=True),
    "full, watched, sharded": functools.partial(plain_trainer, lora=False, watched=True, state_dict="FULL_STATE_DICT"),
    "lora, kl": functools.partial(plain_trainer, lora=True, lisa=KL),
    "lora, kl, sharded": functools.partial(plain_trainer, lora=True, lisa=KL, state_dict="SHARDED_STATE_DICT"),
    "lora, dpo": preferring_trainer,
    "streamed": functools.partial(plain_trainer, lora=True, streamed=True),
    "lora": lora_trainer,
    "lora without dropout": functools.partial(lora_trainer, dropout=0.0),
    "sft": sft_trainer,
}


def run(kind: str, directory: Path, *, full: int = 0, stalling: bool = False, **changes: Any) -> None:
    """Train to the end, from the last complete checkpoint if there is one, and write the trainable weights.

    With `full`, no file can exceed that number of bytes after half of the steps. With `stalling`, the second
    process stops forever before it writes its part of a new checkpoint.
    """
    torch.manual_seed(4)
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "use_cpu": True,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "disable_tqdm": True,
        "report_to": "none",
        "ddp_find_unused_parameters": False,
    }
    trainer: Any = TRAINERS[kind](settings | changes)
    if stalling and trainer.args.process_index == 1:
        trainer._save_rng_state = lambda _: os.kill(os.getpid(), signal.SIGSTOP)

    def progress(share: float, _detail: str = "") -> None:
        if full and share >= 0.5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (full, resource.RLIM_INFINITY))

    log = train(trainer, progress=progress)
    save_trained(trainer, directory / "saved")
    weights = {name: whole(p).clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    if trainer.args.process_index == 0:
        save_file(weights, directory / "end")
        (directory / "log.json").write_text(json.dumps(log))


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def run_on_two(*arguments: Any, **named: Any) -> None:
    """Call `run` in two processes, as torchrun starts them, but as forks."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        run_id="forks",
        start_method="fork",
    )

    def worker() -> None:
        run(*arguments, **named)

    elastic_launch(config, worker)()


def fork(function: Callable[..., None], *arguments: Any, **named: Any) -> int:
    """Call the function in a new process and process group and return its id; only its stderr is captured."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        function(*arguments, **named)
        os._exit(0)
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, StayalignedError) else 1)
    raise AssertionError


def wait(pid: int) -> int:
    """Wait until a process has ended, together with its group, and return its exit code."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-pid, 0)
    return code


# ---- killing ---------------------------------------------------------------------------------------------------------

AIMS = ("anytime", "writing", "anytime", "writing", "written")
"""Moments at which the kills happen, in turn."""
RESERVED_STEPS = 4
"""Number of steps reserved for each remaining kill, and five times as many at the end, so that no kill is too late."""


def snapshot(directory: Path) -> dict[int, dict[str, tuple[int, int]]]:
    """Return the files of every checkpoint by step, with sizes and times; files being deleted may be missing."""
    found: dict[int, dict[str, tuple[int, int]]] = {}
    for checkpoint in directory.glob("checkpoint-*"):
        files = found[int(checkpoint.name.partition("-")[2])] = {}
        with contextlib.suppress(FileNotFoundError):
            for file in checkpoint.iterdir():
                stat = file.stat()
                files[file.name] = stat.st_size, stat.st_mtime_ns
    return found


def last_whole(directory: Path) -> int:
    """Return the step of the last checkpoint with a complete trainer_state.json; 0 if there is none."""
    steps = [0]
    for file in directory.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError, FileNotFoundError):
            steps.append(json.loads(file.read_text())["global_step"])
    return max(steps)


class Attempt:
    """One life of a training process or group, observed from outside through the directory that it writes."""

    def __init__(self, directory: Path, pid: int) -> None:
        # At this time the process has written nothing.
        self.directory, self.pid, self.started = directory, pid, time.monotonic()
        self.before, self.first = snapshot(directory), last_whole(directory)

    def begun(self) -> int:
        """Return the last step for which this process has begun to write the checkpoint; 0 before the first."""
        now = snapshot(self.directory)
        return max((step for step in now if step > self.first and now[step] != self.before.get(step)), default=0)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), "the process ended by itself"
            assert time.monotonic() - self.started < 60, "nothing happened for a minute"
            time.sleep(0.0002)

    def kill(self, *, may_be_late: bool = False) -> dict[str, Any]:
        """Send SIGKILL to the whole group and return what it was doing, according to the files that it left."""
        while True:
            try:
                os.killpg(self.pid, signal.SIGKILL)
                break
            except ProcessLookupError:  # it has not yet created its process group
                assert time.monotonic() - self.started < 60
                time.sleep(0.0002)
        code = wait(self.pid)
        if may_be_late and code == 0:
            return {"seen": "ended", "from": self.first, "to": last_whole(self.directory)}
        assert code == -signal.SIGKILL, "the process had already ended"
        after, last = snapshot(self.directory), last_whole(self.directory)
        kept = {step: files.items() for step, files in after.items() if step <= self.first}
        assert all(files <= self.before[step].items() for step, files in kept.items()), "it started from the beginning"
        if self.begun() > last:
            seen = "writing"
        elif any(files.keys() < after[last].keys() for step, files in after.items() if self.first <= step < last):
            seen = "deleting"
        else:
            seen = "training" if last > self.first else "starting"
        return {"seen": seen, "from": self.first, "to": last}


def strike(
    attempt: Attempt, aim: str, moments: random.Random, *, life: float = 1.0, limit: int = STEPS
) -> dict[str, Any]:
    """Wait for the moment `aim` and kill: within `life` seconds and before `limit` steps are done."""
    moment, delay, writes = moments.uniform(0, life), moments.uniform(0, 0.03), moments.randint(1, 3)
    match aim:
        case "anytime":
            attempt.wait_for(
                lambda: time.monotonic() - attempt.started > moment or last_whole(attempt.directory) >= limit
            )
            delay = 0
        case "writing":
            attempt.wait_for(lambda: attempt.begun() >= attempt.first + writes)
        case "written":
            attempt.wait_for(lambda: last_whole(attempt.directory) > attempt.first)
            delay /= 30
        case "stalled":
            attempt.wait_for(lambda: "rng_state_0.pth" in snapshot(attempt.directory).get(attempt.begun(), ()))
            delay += 0.2
        case _:
            attempt.wait_for(lambda: attempt.begun() == STEPS)
            delay /= 10
    time.sleep(delay)
    return {"aim": aim, **attempt.kill(may_be_late=aim == "the last")}


def kill(directory: Path, kind: str, seed: str) -> list[dict[str, Any]]:
    """Kill a run 20 times, once more while it writes its last checkpoint (possibly too late), and let it end.

    A second run is not killed and writes no checkpoint.
    """
    moments, killed = random.Random(int(seed)), directory / "killed"
    started = time.monotonic()
    assert wait(fork(run, kind, directory / "whole", save_strategy="no")) == 0
    life = time.monotonic() - started
    saving = {"save_strategy": "steps", "save_steps": 1 if kind == "lora" else 2, "save_total_limit": 2}
    seen: list[dict[str, Any]] = []
    for left in range(19, -1, -1):
        attempt = Attempt(killed, fork(run, kind, killed, **saving))
        limit = STEPS - RESERVED_STEPS * (left + 6)
        seen.append(strike(attempt, AIMS[left % len(AIMS)], moments, life=life, limit=limit))
    seen.append(strike(Attempt(killed, fork(run, kind, killed, **saving)), "the last", moments))
    assert wait(fork(run, kind, killed, **saving)) == 0
    return seen


def kill_group(directory: Path, seed: str) -> list[dict[str, Any]]:
    """Do the same with two processes that are killed together; once after the second stalled during a checkpoint."""
    moments, killed, steps = random.Random(int(seed)), directory / "killed", 48
    two = {"per_device_train_batch_size": 2, "max_steps": steps}
    saving = {**two, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    started = time.monotonic()
    assert wait(fork(run_on_two, "lora", directory / "whole", save_strategy="no", **two)) == 0
    life = time.monotonic() - started
    seen: list[dict[str, Any]] = []
    for left, aim in ((3, "stalled"), (2, "writing"), (1, "written"), (0, "anytime")):
        attempt = Attempt(killed, fork(run_on_two, "lora", killed, stalling=aim == "stalled", **saving))
        seen.append(strike(attempt, aim, moments, life=life, limit=steps - RESERVED_STEPS * (left + 6)))
    assert wait(fork(run_on_two, "lora", killed, **saving)) == 0
    return seen


def split(directory: Path) -> None:
    """Train one run in one process, and the same run in two."""
    kind, settings = "lora without dropout", {"max_steps": 16, "logging_steps": 16}
    assert wait(fork(run, kind, directory / "one", save_strategy="no", **settings)) == 0
    saving = {"save_strategy": "steps", "save_steps": 7, "per_device_train_batch_size": 2}
    assert wait(fork(run_on_two, kind, directory / "two", **settings, **saving)) == 0


def split_otherwise(directory: Path, kind: str, sharded: str) -> list[str]:
    """Train one run in one process, in two, and in two from the middle of a phase; return the files of a checkpoint."""
    settings: dict[str, Any] = {"max_steps": 16, "logging_steps": 16, "max_grad_norm": 0.5, "learning_rate": 1e-3}
    if "kl" in kind:
        settings |= {"optim": "sgd", "learning_rate": 5.0}  # Adam would amplify the rounding of the zero gradient
    assert wait(fork(run, kind, directory / "one", save_strategy="no", **settings)) == 0
    two = {**settings, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 7}
    assert wait(fork(run_on_two, sharded, directory / "two", **two)) == 0
    for place in ("checkpoint-7", *(file.name for file in (directory / "two").glob("lisa_start*"))):
        copy = shutil.copytree if place.startswith("checkpoint") else shutil.copy2
        (directory / "resumed").mkdir(exist_ok=True)
        copy(directory / "two" / place, directory / "resumed" / place)
    assert wait(fork(run_on_two, sharded, directory / "resumed", **two)) == 0
    return sorted(file.name for file in (directory / "two" / "checkpoint-7").iterdir())


def fill_disk(directory: Path) -> dict[str, Any]:
    """Let the disk be full when a file of a checkpoint is written, then run again with room; for each such file."""
    steps = 48
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": steps}
    found: dict[str, Any] = {}
    for kind, file in (("sft", "lisa_anchor.safetensors"), ("lora", "README.md"), ("lora", "optimizer.pt")):
        whole, cut = directory / file / "whole", directory / file / "killed"
        assert wait(fork(run, kind, whole, save_strategy="steps", save_steps=steps, max_steps=steps)) == 0
        size = (whole / f"checkpoint-{steps}" / file).stat().st_size
        code = wait(fork(run, kind, cut, full=size - 1, **saving))
        found[file] = {"code": code, "whole": last_whole(cut), "begun": max(snapshot(cut))}
        assert wait(fork(run, kind, cut, **saving)) == 0
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    gc.freeze()  # otherwise the Trainer's gc.collect() would copy this heap in every fork
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER, to wait for the workers of a killed torchrun
    commands: dict[str, Callable[..., Any]] = {
        "kill": kill,
        "kill-group": kill_group,
        "fill-disk": fill_disk,
        "split": split,
        "split-otherwise": split_otherwise,
    }
    command, where, *rest = sys.argv[1:]
    print(json.dumps(commands[command](Path(where), *rest)))
